package diagnose

import (
	"fmt"
	"slices"

	"github.com/egress-router/egress-router/internal/wording"
)

// Remedy returns what to do about a fault of a router that is one of several, as a clause;
// empty: another fault.
func Remedy(f Fault, names wording.Names) string {
	text := map[Fault]wording.Text{
		SameMAC:       wording.Textf("give each router a hardware address of its own: leave it out of the network attachment of the pods, or set another one"),
		WitnessSilent: wording.Textf("have the gateway answer pings within an interval and a half, or set %s to an address behind it that does", wording.StandbyWitness),
		KeysDiffer:    wording.Textf("give all routers the same %s, and start again those that have another one", wording.StandbyKey),
		PeersSilent:   wording.Textf("check that the other router runs, that %s names it, and that network policies let heartbeats pass between the routers on the cluster side, in both directions", wording.StandbyPeers),
	}[f]
	return text.In(names)
}

// found reports whether a reported check becomes a finding of its own.
func (o Observation) found(r Reported) bool {
	return Remedy(r.Fault, nil) != "" || o.Shut && r.Fault == GatewaySilent
}

// routers returns the faults among the routers with the same addresses, which the running
// router notices: it alone receives the heartbeats and sends the pings.
func routers(o Observation) []Finding {
	var found []Finding
	for _, r := range o.Reported {
		if !o.found(r) {
			continue
		}
		f := Finding{Check: r.Name, Verdict: Warning, Fault: r.Fault, Found: r.Detail, Remedy: Remedy(r.Fault, o.Words)}
		if r.State == "failed" {
			f.Verdict = Failed
		}
		if r.Fault == GatewaySilent {
			f.Remedy = o.gatewayRemedy()
		}
		found = append(found, f)
	}
	return found
}

// holder returns another router that holds the addresses.
func (o Observation) holder() (Router, bool) {
	i := slices.IndexFunc(o.Routers, func(r Router) bool { return r.Holds && !r.Own })
	if i < 0 {
		return Router{}, false
	}
	return o.Routers[i], true
}

// shut returns the findings about a router whose gate is shut: no probe of a server can leave,
// those for the holder of an address can (RFC 5227, section 2.1.1).
func shut(o Observation) []Finding {
	f := Finding{Check: "standby", Verdict: Unknown, Found: "no router is known to hold the addresses: the gate is shut, and no probe can leave"}
	f.Remedy = "read why in the log of each router: the lines with role changed"
	if h, known := o.holder(); known {
		f.Found = fmt.Sprintf("%s holds the addresses, and this router stands by: its gate is shut, and no probe can leave", h.Address)
		f.Remedy = "run it in the pod of that router"
	}
	return slices.Concat(configuration(o), interfaces(o), routers(o), apart(o), one(f))
}

// apart returns whether the router that holds the addresses is found on the physical network.
func apart(o Observation) []Finding {
	holder, known := o.holder()
	var found []Finding
	for _, a := range o.Addresses {
		f := Finding{Check: "address", Subject: a.Prefix.String(), Verdict: OK}
		switch {
		case a.Unknown != "":
			f.Verdict, f.Found = Unknown, "holder not probed: "+a.Unknown
		case a.Holder == "" && !known:
			f.Found = "no host answers for it"
		case a.Holder == "":
			f.Verdict, f.Fault = Failed, RoutersApart
			f.Found = fmt.Sprintf("expected an answer of %s, which holds it by its heartbeats, from its hardware address %s; found none by %s", holder.Address, holder.MAC, o.Egress)
			f.Remedy = "check that the NICs of both routers are in the same network or VLAN: each has to see who has the address"
			if o.Interface.Private {
				f.Remedy = "if both routers are on one NIC, make their macvlans in mode bridge, or keep them on different nodes: in mode private they do not reach each other; otherwise " + f.Remedy
			}
		case slices.ContainsFunc(o.Routers, func(r Router) bool { return r.MAC == a.Holder && !r.Own }):
			f.Found = a.Holder + " answers for it, a router with the same addresses"
		default:
			f.Verdict, f.Fault = Failed, WrongMAC
			f.Found = "expected an answer of a router with the same addresses, found " + a.Holder + ", which is none of them"
			f.Remedy = "stop the host with that hardware address: an older pod that still runs, or another pod with the same " + o.name(wording.Source)
		}
		found = append(found, f)
	}
	return found
}
