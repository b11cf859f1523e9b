package diagnose

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

const (
	ownMAC  = "02:00:00:00:00:63"
	peerMAC = "02:00:00:00:00:64"
)

// standing returns what is observed of a router that stands by for an active one.
func standing() Observation {
	o := healthy()
	return Observation{
		At: o.At, Egress: o.Egress, Cluster: o.Cluster, Forwards: true, Shut: true, Interface: o.Interface,
		Addresses: []Address{{Prefix: netip.PrefixFrom(source, 24), Present: true, Holder: peerMAC}},
		Reported:  []Reported{{"standby", "ok", "standby: 10.128.0.102 holds the addresses", ""}, {"peers", "ok", "10.128.0.102 active", ""}},
		Routers:   []Router{{netip.MustParseAddr("10.128.0.101"), true, false, ownMAC}, {netip.MustParseAddr("10.128.0.102"), false, true, peerMAC}},
	}
}

// The silence of everything says nothing about a router that stands by; who holds is named.
func TestStandingByIsNoFault(t *testing.T) {
	d := Diagnose(standing())
	i := slices.IndexFunc(d.Findings, func(f Finding) bool { return f.Check == "standby" })
	if i < 0 || !d.OK || d.Fault != "" {
		t.Fatalf("%+v", d)
	}
	if f := d.Findings[i]; f.Verdict != Unknown || !strings.HasPrefix(f.Found, "10.128.0.102 holds the addresses") {
		t.Errorf("%+v", f)
	}
	for j, f := range d.Findings {
		if j != i && (f.Verdict != OK || f.Remedy != "") {
			t.Errorf("%+v", f)
		}
	}
}

// Faults among several routers are named, with what to do in the words of the front end.
func TestFaultsOfSeveralRouters(t *testing.T) {
	report := func(name, state string, f Fault) func(*Observation) {
		return func(o *Observation) {
			o.Reported = []Reported{{"kernel", "ok", "no drift", ""}, {name, state, "expected this, found that", f}}
		}
	}
	for name, test := range map[string]struct {
		is      func(*Observation)
		fault   Fault
		verdict Verdict
		remedy  string
	}{
		"same hardware address": {report("peers", "failed", SameMAC), SameMAC, Failed, "a hardware address of its own"},
		"other key":             {report("peers", "warning", KeysDiffer), KeysDiffer, Warning, "give all routers the same standby key"},
		"peers silent":          {report("peers", "warning", PeersSilent), PeersSilent, Warning, "that standby peers names it"},
		"witness silent":        {report("standby", "failed", WitnessSilent), WitnessSilent, Failed, "set standby witness to an address"},
		"gateway silent":        {report("gateway", "failed", GatewaySilent), GatewaySilent, Failed, "check that gateway is right"},
		"private on one NIC": {func(o *Observation) { o.Addresses[0].Holder, o.Interface.Private = "", true }, RoutersApart, Failed,
			"if both routers are on one NIC, make their macvlans in mode bridge"},
		"other VLAN":    {func(o *Observation) { o.Addresses[0].Holder = "" }, RoutersApart, Failed, "check that the NICs of both routers are in the same network"},
		"another host":  {func(o *Observation) { o.Addresses[0].Holder = "02:00:00:00:00:77" }, WrongMAC, Failed, "stop the host with that hardware address"},
		"own MAC there": {func(o *Observation) { o.Addresses[0].Holder = ownMAC }, WrongMAC, Failed, "stop the host with that hardware address"},
	} {
		t.Run(name, func(t *testing.T) {
			o := standing()
			test.is(&o)
			d := Diagnose(o)
			i := slices.IndexFunc(d.Findings, func(f Finding) bool { return f.Fault != "" })
			if i < 0 {
				t.Fatalf("no fault: %+v", d)
			}
			f := d.Findings[i]
			if f.Fault != test.fault || f.Verdict != test.verdict || !strings.HasPrefix(f.Found, "expected ") || !strings.Contains(f.Remedy, test.remedy) {
				t.Errorf("expected %s %s with the remedy %q, found %+v", test.verdict, test.fault, test.remedy, f)
			}
			if failed := test.verdict == Failed; d.OK == failed || failed && d.Fault != test.fault {
				t.Errorf("ok %v, fault %q", d.OK, d.Fault)
			}
			if n := len(slices.DeleteFunc(slices.Clone(d.Findings), func(f Finding) bool { return !strings.Contains(f.Found, "expected this") })); n > 1 {
				t.Errorf("%d findings about one reported check: %+v", n, d.Findings)
			}
			// The active router names the faults that its program reports.
			if len(o.Reported) > 0 && Remedy(test.fault, nil) != "" {
				active := healthy()
				active.Reported = o.Reported
				if d := Diagnose(active); !slices.ContainsFunc(d.Findings, func(f Finding) bool { return f.Fault == test.fault && f.Verdict == test.verdict }) {
					t.Errorf("active: %+v", d)
				}
			}
		})
	}
}

// Without a known holder and without an answer for the address there is no fault that this router can know.
func TestNobodyHolds(t *testing.T) {
	o := standing()
	o.Routers, o.Addresses[0].Holder, o.Reported = nil, "", nil
	d := Diagnose(o)
	if !d.OK || !slices.ContainsFunc(d.Findings, func(f Finding) bool { return f.Check == "address" && f.Found == "no host answers for it" }) {
		t.Errorf("%+v", d)
	}
	o.Addresses[0].Unknown = "this needs the capability NET_RAW"
	if d := Diagnose(o); !slices.ContainsFunc(d.Findings, func(f Finding) bool { return f.Check == "address" && f.Verdict == Unknown }) {
		t.Errorf("without NET_RAW: %+v", d)
	}
}
