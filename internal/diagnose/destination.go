package diagnose

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

func destinations(o Observation) []Finding {
	var found []Finding
	if o.Configured > len(o.Probed) {
		found = append(found, Finding{
			Check: "sample", Verdict: OK,
			Found: fmt.Sprintf("%d of %d destinations probed; egress-router diagnose DESTINATION probes one of the others", len(o.Probed), o.Configured),
		})
	}
	for _, d := range o.Probed {
		found = append(found, o.destination(d))
	}
	return found
}

// Title returns the server with its protocol, and the name and the ports of the line.
func (d Destination) Title() string {
	to, protocol := d.To.String(), d.Protocol
	if d.To.Port() == 0 {
		to = d.To.Addr().String()
	}
	if d.Name != "" {
		to = fmt.Sprintf("%s (%s)", to, d.Name)
	}
	if protocol == "" {
		protocol = "fallback"
	}
	if d.Local != "" {
		to += ", port " + d.Local
	}
	return protocol + " " + to
}

func (o Observation) destination(d Destination) Finding {
	f := Finding{Check: "destination", Subject: d.Title(), Verdict: OK}
	var found []string
	p := d.Probe
	switch {
	case p.Unknown != "":
		f.Verdict = Unknown
		found = append(found, "not probed: "+p.Unknown)
	case d.Protocol == "udp":
		found = append(found, o.datagram(d, &f))
	case d.Protocol == "tcp":
		found = append(found, o.connection(d, &f))
	default: // the fallback: no port is known
		if !d.Echo.Answered {
			f.Verdict = Unknown
		}
		found = append(found, "any port")
	}
	if text := d.Echo.path(&f); text != "" {
		found = append(found, text)
	} else if d.PathMTU > 0 {
		found = append(found, fmt.Sprintf("MTU of the route %d", d.PathMTU))
	}
	if n := o.Clients.Unreplied[d.To]; n > 0 {
		found = append(found, number(n, "connection")+" of clients without an answer")
	}
	f.Found = strings.Join(found, "; ")
	return f
}

// path returns what the echo requests show about the path, and makes a black hole a fault.
func (e Echo) path(f *Finding) string {
	switch {
	case e.Unknown != "":
		return ""
	case !e.Answered:
		return "echo not answered, so that the path MTU is not known"
	case e.Largest >= e.Size:
		return fmt.Sprintf("path MTU %d", e.Size)
	case e.Reported > 0:
		return fmt.Sprintf("path MTU %d, reported by %s", e.Reported, e.By)
	}
	if f.Verdict == OK {
		f.Verdict, f.Fault = Failed, MTUBlackHole
		f.Remedy = fmt.Sprintf("have the network report smaller MTUs (ICMP fragmentation needed), or set the MTU of the egress interface to %d", e.Largest)
	}
	return fmt.Sprintf("packets of %d bytes are lost without an ICMP error, %d bytes arrive: MTU black hole", e.Size, e.Largest)
}

// datagram returns what an empty datagram shows.
func (o Observation) datagram(d Destination, f *Finding) string {
	switch p := d.Probe; p.Outcome {
	case Connected:
		return fmt.Sprintf("answers a datagram in %s", round(p.Took))
	case Refused:
		f.Verdict, f.Fault = Failed, ServerRefuses
		f.Remedy = "nothing serves this port at the server, or a firewall rejects it"
		return "port unreachable, from " + p.by()
	case Unreachable, Unsent:
		f.Verdict, f.Fault = Failed, ServerUnreachable
		return p.Text + ", from " + p.by()
	case Silent, Reset:
	}
	f.Verdict = Unknown
	if d.Echo.Answered {
		f.Verdict = OK
	}
	return "an empty datagram was sent and nothing rejected it, which is all that can be known of UDP"
}

func (p Probe) by() string {
	if p.By.IsValid() {
		return p.By.String()
	}
	return "the pod's own kernel"
}

// connection returns how the connection ended, with its fault.
func (o Observation) connection(d Destination, f *Finding) string {
	p := d.Probe
	switch p.Outcome {
	case Connected:
		return fmt.Sprintf("connected in %s", round(p.Took))
	case Refused:
		f.Verdict, f.Fault = Failed, ServerRefuses
		f.Remedy = "nothing listens on this port of the server, or its firewall rejects " + p.Source.Addr().String() + ": ask its operator"
		if p.TTL > 0 && d.Echo.TTL > 0 && hops(p.TTL) != hops(d.Echo.TTL) {
			f.Fault = ResetBetween
			f.Remedy = "a firewall between rejects the connection: ask for " + p.Source.Addr().String() + " to be allowed"
			return fmt.Sprintf("refused in %s by a host in between: the reset made %d hops, the server's echo %d", round(p.Took), hops(p.TTL), hops(d.Echo.TTL))
		}
		return fmt.Sprintf("refused in %s: a reset answered the SYN", round(p.Took))
	case Reset:
		f.Verdict, f.Fault = Failed, ResetBetween
		f.Remedy = "a firewall, proxy or intrusion detection ends the connection after the handshake: ask its operator, with the sentence below"
		return fmt.Sprintf("accepted in %s, then reset before any data", round(p.Took))
	case Unreachable:
		f.Verdict, f.Fault = Failed, ServerUnreachable
		f.Remedy = "the sender of the error has no route or forbids the connection"
		if !p.By.IsValid() {
			f.Remedy = "nobody on the physical network has the next hop"
		}
		return p.Text + ", from " + p.by()
	case Unsent:
		f.Verdict, f.Found = Unknown, p.Text
		if !o.present() {
			return "not sent, since the reserved address is missing: " + p.Text
		}
		return "not sent: " + p.Text
	case Silent:
	}
	return o.silence(d, f)
}

// number returns a count with its noun.
func number(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// hops returns the number of routers that a packet has passed, by the first TTLs of common
// systems.
func hops(ttl int) int {
	for _, first := range []int{64, 128} {
		if ttl <= first {
			return first - ttl
		}
	}
	return 255 - ttl
}

// present reports whether all reserved addresses are on the interface.
func (o Observation) present() bool {
	return !slices.ContainsFunc(o.Addresses, func(a Address) bool { return !a.Present })
}

// silence returns why a connection had no answer, as far as there is evidence.
func (o Observation) silence(d Destination, f *Finding) string {
	p := d.Probe
	text := fmt.Sprintf("SYN sent %d times in %s, no answer", p.Sent, p.Took.Round(100*time.Millisecond))
	f.Verdict, f.Fault = Failed, DroppedBeyond
	switch g, known := o.gatewayOf(d); {
	case d.Stray != "":
		f.Fault = AsymmetricReturn
		f.Remedy = "the network routes the reserved address to " + d.Stray + ": correct the route of " + p.Source.Addr().String() + " on the gateway or the server"
		return text + " by " + o.Egress + ": the answer arrived by " + d.Stray
	case d.ConntrackOK:
		f.Fault = AsymmetricReturn
		f.Remedy = "an answer arrived by another interface than " + o.Egress + ", or a rule of another program drops it"
		return text + ", although the kernel tracked one"
	case known && g.MAC == "" && g.Unknown == "":
		f.Fault = GatewaySilent
		return text + ": the gateway does not answer"
	case known && g.Echo.Answered, d.Echo.Answered:
		f.Remedy = "a firewall beyond the gateway drops " + p.Source.Addr().String() + ": send the sentence below to its operator"
		if d.Echo.Answered {
			return text + ", while the server answers echo: a firewall drops the port"
		}
		f.Remedy = "a firewall beyond the gateway drops " + p.Source.Addr().String() + ", or the server is down: send the sentence below to its operator"
		return text + ", while the gateway answers echo"
	case known && g.MAC != "":
		f.Remedy = "a firewall drops the packets, or the gateway's table has another hardware address than " + orUnknown(o.Interface.MAC) + " for " + p.Source.Addr().String() + ": look at both"
		return text + "; the gateway answers " + g.Protocol + " and no IP packet of it came"
	}
	f.Remedy = "send the sentence below to the operator of the server's firewall"
	return text
}

// gatewayOf returns the gateway of a destination.
func (o Observation) gatewayOf(d Destination) (Gateway, bool) {
	i := slices.IndexFunc(o.Gateways, func(g Gateway) bool { return g.Address.Is6() == d.To.Addr().Is6() })
	if i < 0 {
		return Gateway{}, false
	}
	return o.Gateways[i], true
}

// worst returns the destination that the sentence is about: the first that failed,
// otherwise the first that was probed.
func (o Observation) worst() (Destination, bool) {
	tried := func(d Destination) bool {
		return d.Probe.Unknown == "" && d.Probe.Outcome != Unsent && d.Protocol != ""
	}
	i := slices.IndexFunc(o.Probed, func(d Destination) bool { return tried(d) && o.destination(d).Verdict == Failed })
	if i < 0 {
		i = slices.IndexFunc(o.Probed, tried)
	}
	if i < 0 {
		return Destination{}, false
	}
	return o.Probed[i], true
}

// sentence returns the result for the operator of the server, in one sentence.
func sentence(o Observation) string {
	d, ok := o.worst()
	if !ok {
		if len(o.Addresses) == 0 {
			return fmt.Sprintf("nothing was sent at %s", stamp(o.At))
		}
		return fmt.Sprintf("from %s, nothing was sent to a server at %s", o.Addresses[0].Prefix.Addr(), stamp(o.At))
	}
	p := d.Probe
	text := fmt.Sprintf("from %s to %s, ", p.Source.Addr(), d.To)
	what := "SYN"
	if d.Protocol != "tcp" {
		what = strings.ToUpper(d.Protocol) + " datagram"
	}
	text += fmt.Sprintf("%s sent %s at %s, ", what, number(max(p.Sent, 1), "time"), stamp(p.At))
	switch p.Outcome {
	case Connected:
		text += fmt.Sprintf("answered in %s", round(p.Took))
	case Refused:
		text += fmt.Sprintf("refused after %s", round(p.Took))
	case Reset:
		text += fmt.Sprintf("accepted after %s and then reset", round(p.Took))
	case Unreachable:
		text += p.Text + " from " + p.by()
	case Silent, Unsent:
		text += "no answer"
	}
	if d.Echo.Unknown == "" && d.Echo.Answered && d.Echo.Largest < d.Echo.Size && d.Echo.Reported == 0 {
		text += fmt.Sprintf(", packets above %d bytes are lost", d.Echo.Largest)
	}
	if d.Stray != "" {
		text += ", the answer came back by another path"
	}
	if g, known := o.gatewayOf(d); known && g.Unknown == "" {
		answers := "answers"
		if g.MAC == "" {
			answers = "does not answer"
		}
		text += fmt.Sprintf("; gateway %s %s", g.Address, answers)
	}
	return text
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// capture returns the command that shows the packets of the destination of the sentence.
func capture(o Observation) string {
	filter, command := "arp or icmp", "tcpdump -n -e -i "+o.Egress
	if d, ok := o.worst(); ok {
		filter = fmt.Sprintf("host %s and port %d or icmp or arp", d.To.Addr(), d.To.Port())
		if d.To.Addr().Is6() {
			filter = fmt.Sprintf("host %s and port %d or icmp6", d.To.Addr(), d.To.Port())
		}
	}
	return command + " '" + filter + "'"
}
