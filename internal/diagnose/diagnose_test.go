package diagnose

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

var (
	source  = netip.MustParseAddr("192.168.12.99")
	server  = netip.MustParseAddrPort("203.0.113.26:443")
	at      = time.Date(2026, 11, 30, 10, 0, 0, 0, time.UTC)
	elapsed = 3300 * time.Millisecond
)

// healthy returns what is observed of a healthy router with one client.
func healthy() Observation {
	return Observation{
		At: at, Egress: "macvlan0", Cluster: "eth0", Forwards: true, Configured: 2,
		Interface: Interface{Kind: "macvlan in mode private", MAC: "02:00:00:00:00:63", MTU: 1500, Up: true, Carrier: true, Received: 9, Sent: 9},
		Addresses: []Address{{Prefix: netip.PrefixFrom(source, 24), Present: true}},
		Gateways: []Gateway{{
			Address: netip.MustParseAddr("192.168.12.1"), Source: source, Protocol: "ARP", Requests: 1, MAC: "02:00:00:00:00:01",
			Took: time.Millisecond, Listed: "02:00:00:00:00:01", Confirmed: 3 * time.Second, Echo: Echo{Answered: true, Size: 1500, Largest: 1500},
		}},
		Drift:   Drift{Backend: "nftables"},
		Drops:   Drops{Reasons: []Drop{{"not-redirected", 0}}},
		Table:   Table{Entries: 7, Limit: 1000},
		Clients: Clients{Known: 1, Unreplied: map[netip.AddrPort]int{}},
		Ports:   []Ports{{"tcp", server, 1, 64512}},
		Names:   []Name{{Name: "db.example.com", Addresses: []netip.Addr{server.Addr()}}},
		Probed: []Destination{
			{
				Protocol: "tcp", Local: "8443", To: server, Route: "203.0.113.26 via 192.168.12.1 dev macvlan0", RouteKnown: true,
				Probe: Probe{Outcome: Connected, Sent: 1, Took: 3 * time.Millisecond, At: at, Source: netip.AddrPortFrom(source, 40000)},
				Echo:  Echo{Answered: true, Size: 1500, Largest: 1500, TTL: 60},
			},
			{To: netip.MustParseAddrPort("203.0.113.27:0"), Echo: Echo{Answered: true, Size: 1500, Largest: 1500}},
		},
	}
}

func TestHealthyRouterHasNoFault(t *testing.T) {
	d := Diagnose(healthy())
	for _, f := range d.Findings {
		if f.Verdict != OK || f.Fault != "" || f.Remedy != "" {
			t.Errorf("finding %+v", f)
		}
	}
	if want := "from 192.168.12.99 to 203.0.113.26:443, SYN sent 1 time at 2026-11-30 10:00:00 UTC, answered in 3ms; gateway 192.168.12.1 answers"; !d.OK || d.Sentence != want {
		t.Errorf("ok %v, sentence\n%s\nwant\n%s", d.OK, d.Sentence, want)
	}
	if want := "tcpdump -n -e -i macvlan0 'host 203.0.113.26 and port 443 or icmp or arp'"; d.Capture != want {
		t.Errorf("capture %q, want %q", d.Capture, want)
	}
}

// faults are observations with one fault each, by what differs from a healthy router.
var faults = map[string]struct {
	is    func(*Observation)
	fault Fault
	says  string // part of the output
}{
	"interface missing":     {func(o *Observation) { o.Interface = Interface{Missing: `interface "macvlan0" not found`} }, InterfaceMissing, "macvlan parent"},
	"interface down":        {func(o *Observation) { o.Interface.Up = false }, InterfaceDown, "down"},
	"no carrier":            {func(o *Observation) { o.Interface.Carrier = false }, NoCarrier, "without carrier"},
	"address missing":       {func(o *Observation) { o.Addresses[0].Present = false }, AddressMissing, "missing from macvlan0"},
	"another holder":        {func(o *Observation) { o.Addresses[0].Holder = "02:00:00:00:00:77" }, WrongMAC, "another host, 02:00:00:00:00:77"},
	"duplicate of IPv6":     {func(o *Observation) { o.Addresses[0].Duplicate = true }, WrongMAC, "duplicate address detection failed"},
	"gateway silent":        {func(o *Observation) { silentGateway(o) }, GatewaySilent, "does not answer 3 ARP requests from 192.168.12.99 to 192.168.12.1, last confirmed 3s ago"},
	"nothing received":      {func(o *Observation) { silentGateway(o); o.Interface.Received = 0 }, GatewaySilent, "no frame has been received"},
	"hypervisor drops":      {func(o *Observation) { silentGateway(o); o.Gateways[0].Heard = "02:00:00:00:00:01" }, ForeignMACDropped, "forged transmits"},
	"route astray":          {func(o *Observation) { o.Probed[0].Astray, o.Probed[0].Route = true, "203.0.113.26 dev eth0" }, RoutesWrong, "leads elsewhere: 203.0.113.26 dev eth0"},
	"no route":              {func(o *Observation) { o.Probed[0].Route = "" }, RoutesWrong, "no route to 203.0.113.26 by macvlan0"},
	"routes drifted":        {func(o *Observation) { o.Drift.Changes = []Change{{RoutesPart, "add route default"}} }, RoutesWrong, "a run of the router would add route default"},
	"rules drifted":         {func(o *Observation) { o.Drift.Changes = []Change{{RulesPart, "load the rules"}} }, RulesMissing, "load the rules"},
	"forwarding off":        {func(o *Observation) { o.Drift.Changes = []Change{{ForwardingPart, "set net.ipv4.ip_forward = 1"}} }, ForwardingOff, "ip_forward = 1"},
	"conntrack full":        {func(o *Observation) { o.Table.Entries = 1000 }, TableFull, "nf_conntrack_max"},
	"ports exhausted":       {func(o *Observation) { o.Ports[0].InUse = 64512 }, PortsExhausted, "64512 of 64512 in use to tcp 203.0.113.26:443"},
	"name without answer":   {func(o *Observation) { o.Names[0] = Name{Name: "db.example.com", Failure: "server failure"} }, NameFailed, "lookup failed: server failure"},
	"refused":               {func(o *Observation) { o.Probed[0].Probe.Outcome = Refused }, ServerRefuses, "refused in 3ms: a reset answered the SYN"},
	"refused from between":  {func(o *Observation) { o.Probed[0].Probe.Outcome, o.Probed[0].Probe.TTL = Refused, 62 }, ResetBetween, "the reset made 2 hops, the server's echo 4"},
	"refused, other system": {func(o *Observation) { o.Probed[0].Probe.Outcome, o.Probed[0].Probe.TTL = Refused, 124 }, ServerRefuses, "a reset answered the SYN"},
	"reset":                 {func(o *Observation) { o.Probed[0].Probe.Outcome = Reset }, ResetBetween, "accepted in 3ms, then reset before any data"},
	"unreachable": {func(o *Observation) {
		o.Probed[0].Probe.Outcome, o.Probed[0].Probe.Text, o.Probed[0].Probe.By = Unreachable, "no route to host", netip.MustParseAddr("198.51.100.7")
	}, ServerUnreachable, "no route to host, from 198.51.100.7"},
	"firewall drops":          {func(o *Observation) { silentServer(o) }, DroppedBeyond, "SYN sent 3 times in 3.3s, no answer, while the gateway answers echo"},
	"server down or filtered": {func(o *Observation) { silentServer(o) }, DroppedBeyond, "drops 192.168.12.99, or the server is down: send"},
	"firewall drops a port":   {func(o *Observation) { silentServer(o); o.Probed[0].Echo.Answered = true }, DroppedBeyond, "the server answers echo: a firewall drops the port"},
	"only ARP answers":        {func(o *Observation) { silentServer(o); o.Gateways[0].Echo = Echo{} }, DroppedBeyond, "another hardware address than 02:00:00:00:00:63"},
	"answer elsewhere":        {func(o *Observation) { silentServer(o); o.Probed[0].Stray = "eth0" }, AsymmetricReturn, "the answer arrived by eth0"},
	"answer only in tracker":  {func(o *Observation) { silentServer(o); o.Probed[0].ConntrackOK = true }, AsymmetricReturn, "although the kernel tracked one"},
	"black hole":              {func(o *Observation) { o.Probed[0].Echo.Largest = 1400 }, MTUBlackHole, "packets of 1500 bytes are lost without an ICMP error, 1400 bytes arrive"},
	"datagram refused":        {func(o *Observation) { o.Probed[0].Protocol, o.Probed[0].Probe.Outcome = "udp", Refused }, ServerRefuses, "port unreachable"},
	"router reports failure": {func(o *Observation) {
		o.Gateways[0].Unknown, o.Reported = "this needs the capability NET_RAW", []Reported{{"gateway", "failed", "192.168.12.1 does not answer ARP", GatewaySilent}}
	}, GatewaySilent, "the running router reports 192.168.12.1 does not answer ARP"},
}

func silentGateway(o *Observation) {
	o.Gateways[0].MAC, o.Gateways[0].Requests, o.Gateways[0].Echo = "", 3, Echo{}
	silentServer(o)
}

func silentServer(o *Observation) {
	p := &o.Probed[0]
	p.Probe.Outcome, p.Probe.Sent, p.Probe.Took, p.Echo.Answered, p.Echo.Largest = Silent, 3, elapsed, false, 0
}

func TestFaultIsNamed(t *testing.T) {
	for name, test := range faults {
		t.Run(name, func(t *testing.T) {
			o := healthy()
			test.is(&o)
			d := Diagnose(o)
			var b strings.Builder
			if err := d.WriteText(&b); err != nil {
				t.Fatal(err)
			}
			if d.OK || d.Fault != test.fault || !strings.Contains(b.String(), test.says) || !strings.Contains(b.String(), "\nfault: "+string(test.fault)+"\n") {
				t.Errorf("ok %v, fault %q, want %q and %q:\n%s", d.OK, d.Fault, test.fault, test.says, b.String())
			}
			b.Reset()
			if err := d.WriteJSON(&b); err != nil {
				t.Fatal(err)
			}
			var again Diagnosis
			if err := json.Unmarshal([]byte(b.String()), &again); err != nil || again.Fault != test.fault || len(again.Findings) != len(d.Findings) {
				t.Errorf("%v, JSON:\n%s", err, b.String())
			}
		})
	}
}

func TestSentenceIsAboutFault(t *testing.T) {
	o := healthy()
	silentServer(&o)
	if want := "from 192.168.12.99 to 203.0.113.26:443, SYN sent 3 times at 2026-11-30 10:00:00 UTC, no answer; gateway 192.168.12.1 answers"; sentence(o) != want {
		t.Errorf("got  %s\nwant %s", sentence(o), want)
	}
	o.Probed = nil
	if want := "from 192.168.12.99, nothing was sent to a server at 2026-11-30 10:00:00 UTC"; sentence(o) != want {
		t.Errorf("got  %s\nwant %s", sentence(o), want)
	}
}

// A remedy of several destinations is printed once.
func TestRemedyIsNotRepeated(t *testing.T) {
	o := healthy()
	silentServer(&o)
	o.Probed = append([]Destination{o.Probed[0], o.Probed[0]}, o.Probed...)
	var b strings.Builder
	if err := Diagnose(o).WriteText(&b); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(b.String(), "  remedy: "); n != 1 {
		t.Errorf("%d times:\n%s", n, b.String())
	}
}

// Without privilege, a check is unknown or what the running router reports, and no fault.
func TestUnknownIsNoFault(t *testing.T) {
	o := healthy()
	const lacks = "this needs the capability NET_RAW"
	o.Addresses[0].Unknown, o.Gateways[0].Unknown, o.Drift.Rules, o.Drops.Unknown, o.Clients.Unknown = lacks, lacks, lacks, lacks, lacks
	unknown := func() (n int) {
		d := Diagnose(o)
		if !d.OK || d.Fault != "" {
			t.Errorf("%+v", d)
		}
		for _, f := range d.Findings {
			if f.Verdict == Unknown && strings.Contains(f.Found, lacks) {
				n++
			}
		}
		return n
	}
	if n := unknown(); n != 6 { // of the connections two
		t.Errorf("%d unknown, want 6", n)
	}
	o.Reported = []Reported{{"gateway", "ok", "answers", ""}, {"address", "ok", "no conflict", ""}, {"kernel", "ok", "no drift", ""}, {"drops", "ok", "packets: 1 limit", ""}}
	if n := unknown(); n != 2 {
		t.Errorf("with a running router %d unknown, want 2", n)
	}
}

// Nothing that comes from the network or a file ends a line, or begins one.
func TestTextIsOneLineForEachFinding(t *testing.T) {
	o := healthy()
	o.Names[0] = Name{Name: "db.example.com", Failure: "a\nfault: none\x1b[2J"}
	var b strings.Builder
	if err := Diagnose(o).WriteText(&b); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(b.String(), "\nfault: none") || strings.Contains(b.String(), "\x1b") {
		t.Errorf("%q", b.String())
	}
}

// No client is odd and no fault; packets to other ports are evidence.
func TestNobodyConnects(t *testing.T) {
	o := healthy()
	o.Clients.Known = 0
	o.Drops.Reasons[0].Packets = 3
	d := Diagnose(o)
	for _, f := range d.Findings {
		if f.Fault == NobodyConnects && f.Verdict == Warning && d.OK && strings.Contains(f.Found, "3 packets to ports without a destination") {
			return
		}
	}
	t.Errorf("%+v", d)
}

// A chain of another program that may drop is odd, and no fault.
func TestForeignChain(t *testing.T) {
	o := healthy()
	o.Drops.Foreign = []string{"chain FORWARD of table ip filter"}
	for _, f := range Diagnose(o).Findings {
		if f.Fault == ForwardingFiltered && f.Verdict == Warning && strings.Contains(f.Found, "pass chain FORWARD of table ip filter of another program") {
			return
		}
	}
	t.Errorf("%+v", Diagnose(o))
}

func TestSampleIsNamed(t *testing.T) {
	o := healthy()
	o.Configured = 10000
	for _, f := range Diagnose(o).Findings {
		if f.Check == "sample" && strings.HasPrefix(f.Found, "2 of 10000 destinations probed") {
			return
		}
	}
	t.Error("no finding about the sample")
}

// The outcome of a connection follows from its error, and is the fault of a server.
func TestOutcomeOf(t *testing.T) {
	for outcome, want := range map[Outcome]struct {
		err   error
		fault Fault
	}{
		Connected:   {nil, ""},
		Refused:     {&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, ServerRefuses},
		Reset:       {syscall.ECONNRESET, ResetBetween},
		Silent:      {&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, DroppedBeyond},
		Unreachable: {os.NewSyscallError("connect", syscall.EHOSTUNREACH), ServerUnreachable},
		Unsent:      {os.NewSyscallError("bind", syscall.EADDRNOTAVAIL), ""},
	} {
		if got := OutcomeOf(want.err); got != outcome || got.Fault() != want.fault {
			t.Errorf("%v: %q with fault %q, want %q with %q", want.err, got, got.Fault(), outcome, want.fault)
		}
	}
	if got := OutcomeOf(fmt.Errorf("connect: %w", syscall.ETIMEDOUT)); got != Silent {
		t.Errorf("the kernel's time-out: %q", got)
	}
}

// Without an echo nothing is known of the fallback, and without the reserved address a
// running router's last sight of the gateway is none of now.
func TestNotKnownIsNotOK(t *testing.T) {
	for name, test := range map[string]struct {
		is    func(*Observation)
		check string
	}{
		"fallback behind a silent gateway": {func(o *Observation) { silentGateway(o); o.Probed[1].Echo = Echo{} }, "destination  unknown  fallback 203.0.113.27: any port"},
		"gateway without the address": {func(o *Observation) {
			o.Addresses[0].Present, o.Gateways[0].Unknown, o.Reported = false, "the reserved address is missing", []Reported{{"gateway", "ok", "192.168.12.1, no answer yet", ""}}
		}, "gateway      unknown  192.168.12.1: ARP not probed: the reserved address is missing"},
	} {
		o := healthy()
		test.is(&o)
		var b strings.Builder
		if err := Diagnose(o).WriteText(&b); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(b.String(), test.check) {
			t.Errorf("%s: want %q:\n%s", name, test.check, b.String())
		}
	}
}

func TestCountsHaveTheirNumber(t *testing.T) {
	o := healthy()
	o.Clients.Unreplied[server] = 1
	text := fmt.Sprint(Diagnose(o).Findings)
	for _, want := range []string{"1 redirected connection of clients tracked, 1 without an answer", "; 1 connection of clients without an answer"} {
		if !strings.Contains(text, want) {
			t.Errorf("want %q:\n%s", want, text)
		}
	}
}
