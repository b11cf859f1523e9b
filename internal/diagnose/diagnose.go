package diagnose

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/wording"
)

// A Verdict is the result of a check.
type Verdict string

// The verdicts.
const (
	OK      Verdict = "ok"
	Warning Verdict = "warning" // odd, but no reason for traffic not to arrive
	Failed  Verdict = "failed"
	Unknown Verdict = "unknown" // not observed, or nothing can be known
)

// A Fault is a cause, for scripts.
type Fault string

// The faults, in the order in which a packet meets them.
const (
	InterfaceMissing   Fault = "interface-missing"
	InterfaceDown      Fault = "interface-down"
	NoCarrier          Fault = "no-carrier"
	AddressMissing     Fault = "address-missing"
	WrongMAC           Fault = "address-conflict" // another host has the reserved address
	GatewaySilent      Fault = "gateway-silent"
	ForeignMACDropped  Fault = "foreign-address-dropped" // a hypervisor or switch drops frames of the egress interface
	RoutesWrong        Fault = "routes-wrong"
	RulesMissing       Fault = "rules-missing"
	ForwardingOff      Fault = "forwarding-off"
	ForwardingFiltered Fault = "forwarding-filtered" // perhaps, by chains of another program
	TableFull          Fault = "conntrack-full"
	PortsExhausted     Fault = "ports-exhausted"
	NobodyConnects     Fault = "nobody-connects"
	NameFailed         Fault = "dns"
	AsymmetricReturn   Fault = "asymmetric-return"
	DroppedBeyond      Fault = "dropped-beyond-gateway"
	ServerRefuses      Fault = "refused-by-server"
	ResetBetween       Fault = "reset-in-between"
	ServerUnreachable  Fault = "unreachable"
	MTUBlackHole       Fault = "mtu-black-hole"
)

// The faults of a router that is one of several with its addresses.
const (
	SameMAC       Fault = "same-hardware-address"
	RoutersApart  Fault = "routers-apart"  // they do not reach each other on the physical network
	WitnessSilent Fault = "witness-silent" // to pings, without which no router opens its gate
	KeysDiffer    Fault = "keys-differ"
	PeersSilent   Fault = "peers-silent"
)

// A Finding is the result of one check.
type Finding struct {
	Check   string  `json:"check"`
	Subject string  `json:"subject,omitempty"` // the destination, the address or the name
	Verdict Verdict `json:"verdict"`
	Fault   Fault   `json:"fault,omitempty"`
	Found   string  `json:"found"`
	Remedy  string  `json:"remedy,omitempty"`
}

// A Diagnosis is the result of all checks.
type Diagnosis struct {
	At       time.Time `json:"at"`
	OK       bool      `json:"ok"`              // no check failed
	Fault    Fault     `json:"fault,omitempty"` // of the first check that failed
	Findings []Finding `json:"findings"`
	Sentence string    `json:"sentence"` // for the operator of the server
	Capture  string    `json:"capture"`  // command that shows the packets
}

// Diagnose returns the findings of an observation, in the order in which a packet meets the
// checks.
func Diagnose(o Observation) Diagnosis {
	d := Diagnosis{At: o.At.UTC()}
	if o.Shut {
		d.Findings = shut(o)
		d.judge()
		return d
	}
	for _, check := range []func(Observation) []Finding{
		configuration, routers, interfaces, addresses, gateways, routes, rulesOf, forwarding, settings, filters, table, ports, clients, names, destinations,
	} {
		d.Findings = append(d.Findings, check(o)...)
	}
	d.judge()
	d.Sentence, d.Capture = sentence(o), capture(o)
	return d
}

// judge derives the result from the findings.
func (d *Diagnosis) judge() {
	i := slices.IndexFunc(d.Findings, func(f Finding) bool { return f.Verdict == Failed })
	if d.OK = i < 0; !d.OK {
		d.Fault = d.Findings[i].Fault
	}
}

func one(f Finding) []Finding { return []Finding{f} }

func configuration(o Observation) []Finding {
	var found []Finding
	if o.Partial != "" {
		found = append(found, Finding{
			Check: "configuration", Verdict: Unknown, Found: o.Partial,
			Remedy: "set the router's variables, or name its process with --pid",
		})
	}
	if o.HealthError != "" {
		found = append(found, Finding{Check: "health", Verdict: Unknown, Found: o.HealthError})
	}
	for _, r := range o.Reported {
		if v := map[string]Verdict{"ok": OK, "warning": Warning, "failed": Warning}[r.State]; v != OK && !o.found(r) {
			found = append(found, Finding{Check: "health", Subject: r.Name, Verdict: Warning, Found: "the running router reports " + r.State + ": " + r.Detail})
		}
	}
	return found
}

func interfaces(o Observation) []Finding {
	i, f := o.Interface, Finding{Check: "interface"}
	switch text := i.text(o.Egress); {
	case i.Unknown != "":
		f.Verdict, f.Found = Unknown, i.Unknown
	case i.Missing != "":
		f.Verdict, f.Fault, f.Found = Failed, InterfaceMissing, i.Missing
		f.Remedy = "check the network attachment of the pod, or set " + o.name(wording.MacvlanParent) + " or " + o.name(wording.Interface)
	case !i.Up:
		f.Verdict, f.Fault, f.Found = Failed, InterfaceDown, text+", down"
		f.Remedy = "run the router, which sets it up"
	case !i.Carrier:
		f.Verdict, f.Fault, f.Found = Failed, NoCarrier, text+", without carrier"
		f.Remedy = "the parent NIC is down or unplugged: look at it on the node"
	default:
		f.Verdict, f.Found = OK, text+", carrier"
	}
	return one(f)
}

func (i Interface) text(name string) string {
	text := name
	if i.Kind != "" {
		text += ", " + i.Kind
	}
	if i.Parent != "" {
		text += " of " + i.Parent
	}
	if i.MAC != "" {
		text += ", " + i.MAC
	}
	text = fmt.Sprintf("%s, MTU %d, %d frames sent, %d received", text, i.MTU, i.Sent, i.Received)
	if len(i.Troubles) > 0 {
		text += " (" + list(i.Troubles) + ")"
	}
	return text
}

func addresses(o Observation) []Finding {
	var found []Finding
	for _, a := range o.Addresses {
		f := Finding{Check: "address", Subject: a.Prefix.String(), Verdict: OK, Found: "set, no other host answers for it"}
		switch {
		case a.Holder != "":
			f.Verdict, f.Fault, f.Found = Failed, WrongMAC, "another host, "+a.Holder+", answers for it: the gateway may send answers there"
			f.Remedy = "stop the host with that hardware address: an older pod that still runs, or another pod with the same " + o.name(wording.Source)
		case a.Duplicate:
			f.Verdict, f.Fault, f.Found = Failed, WrongMAC, "another host has it: duplicate address detection failed"
			f.Remedy = "stop the other host, or set another " + o.name(wording.Source)
		case !a.Present:
			f.Verdict, f.Fault, f.Found = Failed, AddressMissing, "missing from "+o.Egress
			f.Remedy = "run the router; in mode legacy or monitor it repairs this"
		case a.Unknown != "":
			f.Verdict, f.Found = Unknown, "set; conflict not probed: "+a.Unknown
			if r, ok := o.reported("address"); ok && r.State == "ok" {
				f.Verdict, f.Found = OK, "set; the running router reports "+r.Detail
			}
		}
		found = append(found, f)
	}
	return found
}

// reported returns a check of the running router.
func (o Observation) reported(name string) (Reported, bool) {
	i := slices.IndexFunc(o.Reported, func(r Reported) bool { return r.Name == name })
	if i < 0 {
		return Reported{}, false
	}
	return o.Reported[i], true
}

func gateways(o Observation) []Finding {
	var found []Finding
	for _, g := range o.Gateways {
		found = append(found, o.gateway(g))
	}
	return found
}

func (o Observation) gateway(g Gateway) Finding {
	f := Finding{Check: "gateway", Subject: g.Address.String()}
	asked := fmt.Sprintf("%d %s requests from %s to %s", g.Requests, g.Protocol, g.Source, g.Address)
	switch {
	case g.Unknown != "":
		f.Verdict, f.Found = Unknown, g.Protocol+" not probed: "+g.Unknown
		if r, ok := o.reported("gateway"); ok && o.present() {
			f.Found = "the running router reports " + r.Detail
			if f.Verdict = OK; r.State == "failed" {
				f.Verdict, f.Fault = Failed, GatewaySilent
			}
		} else if g.Listed != "" {
			f.Found += "; the neighbour table has " + g.Listed + g.age()
		}
	case g.MAC != "":
		f.Verdict, f.Found = OK, fmt.Sprintf("answers %s from %s in %s%s", g.Protocol, g.MAC, round(g.Took), g.age())
		if g.Echo.Answered {
			f.Found += ", answers echo"
		}
	case g.Heard != "":
		f.Verdict, f.Fault = Failed, ForeignMACDropped
		f.Found = fmt.Sprintf("does not answer %s, while %s asks for other hosts from %s: frames from %s arrive nowhere", asked, g.Address, g.Heard, orUnknown(o.Interface.MAC))
		f.Remedy = "the hypervisor or switch drops frames from a hardware address that it does not know: allow forged transmits, MAC changes and promiscuous mode, or port security for " + orUnknown(o.Interface.MAC)
	default:
		f.Verdict, f.Fault = Failed, GatewaySilent
		f.Found = "does not answer " + asked
		if o.Interface.Received == 0 {
			f.Found += ", and no frame has been received since the interface exists"
		}
		f.Found += g.age()
		f.Remedy = o.gatewayRemedy()
	}
	return f
}

func (o Observation) gatewayRemedy() string {
	return "check that " + o.name(wording.Gateway) + " is right, that the node's NIC is in that network or VLAN, and that the switch or hypervisor accepts " + orUnknown(o.Interface.MAC)
}

func orUnknown(mac string) string {
	if mac == "" {
		return "the hardware address of the egress interface"
	}
	return mac
}

// age returns the age of the last confirmation.
func (g Gateway) age() string {
	if g.Confirmed < 0 || g.Listed == "" {
		return ""
	}
	return fmt.Sprintf(", last confirmed %s ago", g.Confirmed.Truncate(time.Second))
}

func round(d time.Duration) time.Duration {
	if d < time.Millisecond {
		return d.Round(10 * time.Microsecond)
	}
	return d.Round(100 * time.Microsecond)
}

// changes returns what a run would change of a part.
func (o Observation) changes(part Part) []string {
	var texts []string
	for _, c := range o.Drift.Changes {
		if c.Part == part {
			texts = append(texts, c.Text)
		}
	}
	return texts
}

// mostShown is the number of changes in a finding.
const mostShown = 5

// list returns the first texts of a list on one line.
func list(texts []string) string {
	text := strings.Join(texts[:min(len(texts), mostShown)], "; ")
	if more := len(texts) - mostShown; more > 0 {
		text += fmt.Sprintf("; %d more", more)
	}
	return text
}

// drift returns the finding of a part of the configuration.
func (o Observation) drift(check string, part Part, fault Fault, fine string) Finding {
	f := Finding{Check: check, Verdict: OK, Found: fine}
	if o.Drift.Unknown != "" {
		f.Verdict, f.Found = Unknown, "not compared: "+o.Drift.Unknown
	}
	if changes := o.changes(part); len(changes) > 0 {
		f.Verdict, f.Fault, f.Found = Failed, fault, "a run of the router would "+list(changes)
		f.Remedy = "run the router again; in mode legacy or monitor it repairs drift, and its log names what changes it"
	}
	return f
}

func routes(o Observation) []Finding {
	for _, d := range o.Probed {
		if !d.RouteKnown || d.Route != "" && !d.Astray {
			continue
		}
		f := Finding{Check: "routes", Verdict: Failed, Fault: RoutesWrong, Found: fmt.Sprintf("no route to %s by %s", d.To.Addr(), o.Egress), Remedy: "run the router again"}
		if d.Astray {
			f.Found = fmt.Sprintf("the route to %s leads elsewhere: %s", d.To.Addr(), d.Route)
			f.Remedy = "delete that route, or leave that network out of " + o.name(wording.ClusterDestinations)
		}
		return one(f)
	}
	return one(o.drift("routes", RoutesPart, RoutesWrong, "as configured"))
}

func rulesOf(o Observation) []Finding {
	f := o.drift("rules", RulesPart, RulesMissing, "no drift, backend "+o.Drift.Backend)
	if f.Verdict == OK && o.Drift.Rules != "" {
		f.Verdict, f.Found = Unknown, "not compared: "+o.Drift.Rules
		if r, ok := o.reported("kernel"); ok {
			f.Found = "the running router reports " + r.Detail
			if f.Verdict = OK; r.State == "failed" {
				f.Verdict, f.Fault = Failed, RulesMissing
			}
		}
	}
	return one(f)
}

func forwarding(o Observation) []Finding {
	if !o.Forwards {
		return nil
	}
	return one(o.drift("forwarding", ForwardingPart, ForwardingOff, "on"))
}

func settings(o Observation) []Finding {
	changes := o.changes(SettingsPart)
	if len(changes) == 0 {
		return nil
	}
	return one(Finding{Check: "settings", Verdict: Warning, Found: "a run of the router would " + list(changes)})
}

func filters(o Observation) []Finding {
	f := Finding{Check: "filters", Verdict: OK, Found: "no packet dropped"}
	if o.Drops.Unknown != "" {
		f.Verdict, f.Found = Unknown, "counters not read: "+o.Drops.Unknown
		if r, ok := o.reported("drops"); ok {
			f.Verdict, f.Found = OK, "the running router reports "+r.Detail
		}
		return one(f)
	}
	var parts []string
	for _, d := range o.Drops.Reasons {
		if d.Packets > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", d.Packets, d.Reason))
		}
	}
	if len(parts) > 0 {
		f.Found = "packets dropped since the rules were loaded: " + strings.Join(parts, ", ")
	}
	if len(o.Drops.Foreign) > 0 && o.Forwards {
		f.Verdict, f.Fault = Warning, ForwardingFiltered
		f.Found += "; redirected packets pass " + list(o.Drops.Foreign) + " of another program, which drops what its rules do not accept"
		f.Remedy = "have that program accept what the router forwards, if its rules do not (nft list ruleset)"
	}
	return one(f)
}

func table(o Observation) []Finding {
	t, f := o.Table, Finding{Check: "conntrack", Verdict: OK}
	switch f.Found = fmt.Sprintf("%d of %d entries", t.Entries, t.Limit); {
	case t.Unknown != "":
		f.Verdict, f.Found = Unknown, t.Unknown
	case t.Limit <= 0:
		f.Found = fmt.Sprintf("%d entries, limit not known", t.Entries)
	case t.Full():
		f.Verdict, f.Fault = Failed, TableFull
		f.Found += ": the kernel drops new connections"
		f.Remedy = "raise net.netfilter.nf_conntrack_max on the node, or find the clients with most connections by egress-router connections"
	case t.NearlyFull():
		f.Verdict = Warning
		f.Remedy = "raise net.netfilter.nf_conntrack_max on the node"
	}
	return one(f)
}

// Exhausted reports whether connections to a server find no port: the kernel gives up before
// it has tried each one (nf_nat_l4proto_unique_tuple in net/netfilter/nf_nat_core.c).
func Exhausted(inUse, limit int) bool { return inUse >= limit-limit/1000 }

// NearlyFull reports whether the table of connections has little room.
func (t Table) NearlyFull() bool { return t.Limit > 0 && t.Entries > t.Limit-t.Limit/10 }

// Full reports whether the kernel drops new connections.
func (t Table) Full() bool { return t.Limit > 0 && t.Entries >= t.Limit }

func ports(o Observation) []Finding {
	f := Finding{Check: "ports", Verdict: OK, Found: "none in use"}
	if o.Clients.Unknown != "" {
		f.Verdict, f.Found = Unknown, "not counted: "+o.Clients.Unknown
		return one(f)
	}
	if len(o.Ports) == 0 {
		return one(f)
	}
	p := o.Ports[0]
	switch f.Found = fmt.Sprintf("%d of %d in use to %s %s", p.InUse, p.Limit, p.Protocol, p.Server); {
	case Exhausted(p.InUse, p.Limit):
		f.Verdict, f.Fault = Failed, PortsExhausted
		f.Found += ": new connections to it are dropped"
		f.Remedy = "give the router more reserved addresses (" + o.several() + "), or have the clients keep their connections open"
	case p.InUse > p.Limit-p.Limit/5:
		f.Verdict = Warning
		f.Remedy = "give the router more reserved addresses (" + o.several() + ")"
	}
	return one(f)
}

func clients(o Observation) []Finding {
	if !o.Forwards {
		return nil
	}
	c, f := o.Clients, Finding{Check: "clients", Verdict: OK}
	switch {
	case c.Unknown != "":
		f.Verdict, f.Found = Unknown, "not read: "+c.Unknown
	case c.Known > 0:
		f.Found = number(c.Known, "redirected connection") + " of clients tracked"
		if n := c.unreplied(); n > 0 {
			f.Found += fmt.Sprintf(", %d without an answer", n)
		}
	default:
		f.Verdict, f.Fault = Warning, NobodyConnects
		f.Found = "no client connects now: the kernel tracks no redirected connection that came in by " + o.Cluster
		f.Remedy = "connect from a client, since this cannot be tried from inside the pod; if nothing appears in egress-router connections, check the Service, its port and the network policies"
		if i := slices.IndexFunc(o.Drops.Reasons, func(d Drop) bool { return d.Reason == "not-redirected" && d.Packets > 0 }); i >= 0 {
			f.Found += fmt.Sprintf("; %d packets to ports without a destination were rejected", o.Drops.Reasons[i].Packets)
			f.Remedy = "clients connect to a port that no line has: compare the ports of the Service with those of " + o.name(wording.Destinations)
		}
	}
	return one(f)
}

func (c Clients) unreplied() (n int) {
	for _, more := range c.Unreplied {
		n += more
	}
	return n
}

func names(o Observation) []Finding {
	var found []Finding
	for _, n := range o.Names {
		f := Finding{Check: "name", Subject: n.Name, Verdict: OK, Found: AddressText(n.Addresses)}
		if n.Failure != "" {
			f.Verdict, f.Fault = Failed, NameFailed
			f.Found = "lookup failed: " + n.Failure
			if len(n.Addresses) > 0 {
				f.Verdict, f.Found = Warning, f.Found+"; the rules have "+AddressText(n.Addresses)
			}
			f.Remedy = "check /etc/resolv.conf of the pod, and that its name servers are reached by the cluster side"
		}
		found = append(found, f)
	}
	return found
}

// AddressText returns addresses for a person to read.
func AddressText(all []netip.Addr) string {
	if len(all) == 0 {
		return "no address"
	}
	var texts []string
	for _, a := range all {
		texts = append(texts, a.String())
	}
	return strings.Join(texts, ", ")
}
