// Package spec describes what a router shall be, without regard to the front end that
// configures it: environment variables, the JSON of a CNI plugin, the YAML of a resource.
// It is pure.
//
// A front end parses what its users write into a Router, and has Validate look for what is
// wrong with it. The faults name fields, for which each front end has its own names
// (package wording).
package spec

import (
	"net"
	"net/netip"

	"github.com/egress-router/egress-router/rules"
)

// A Router is what a router shall be.
type Router struct {
	Sources Sources
	Spread  bool     // clients are spread over the sources of a family; otherwise all have the first one
	Egress  string   // interface on the physical network
	Cluster string   // interface by which clients connect
	Macvlan *Macvlan // nil: another program creates the egress interface

	Forward    bool           // connections are redirected; false: a proxy in the namespace connects to servers
	Set        rules.Set      // where to; empty without Forward
	Crossing   rules.Crossing // connections that cross from the cluster side
	Helpers    []rules.Helper // helpers of conntrack to attach
	LogDrops   bool           // packets that are dropped are examples for a log
	HealthPort rules.Port     // TCP port that the namespace itself answers; zero: none

	ReplyMark           rules.Mark     // mark of connections from the cluster side
	ReplyTable          int            // routing table of their replies
	ClusterDestinations []netip.Prefix // other networks to reach by the cluster side

	Conflict Conflict // what to do if another host has a reserved address
	Standby  *Standby // nil: the router is the only one with its addresses

	Flowtable Flowtable // how the kernel forwards packets of established connections
}

// The defaults of the reply path. Marks and tables belong to the pod's network
// namespace, which CNI plugins and service meshes may use too. The mark is
// bit 12: kube-proxy has 14 and 15, the portmap plugin 13, Cilium 8 to 11, the
// AWS plugin 7, Calico 16 to 31, Istio 0 to 10. No plugin counts up to the table
// (from 100, as source-based routing does) or uses it (133 Istio, 2004 and 2005
// Cilium).
const (
	DefaultReplyMark  rules.Mark = 0x1000
	DefaultReplyTable int        = 4711
)

// A Conflict is the reaction to another host with a reserved address before the
// router takes it (RFC 5227, section 2.1). The original did not check.
type Conflict string

// The reactions to a conflict.
const (
	ConflictWarn   Conflict = "warn"   // take the address, as the original did, and log the other host
	ConflictRefuse Conflict = "refuse" // probe in full, and do not take it
	ConflictDefend Conflict = "defend" // take it, and announce it again after another host's answer
)

// A Flowtable says whether packets of established connections bypass rules and routing
// (Documentation/networking/nf_flowtable.rst of the kernel).
type Flowtable string

// The flowtables.
const (
	FlowtableOff     Flowtable = ""        // they pass the rules
	FlowtableAuto    Flowtable = "auto"    // they pass by, if the kernel has flowtables
	FlowtableRequire Flowtable = "require" // likewise, and other kernels are refused
)

// A Macvlan describes the egress interface if the router creates it, in place of a
// CNI plugin or a container engine: a macvlan of a NIC in the host's network
// namespace.
type Macvlan struct {
	Parent    string // NIC of the host; empty: the NIC of its IPv4 default route
	Mode      MacvlanMode
	HostNetns string // file of the host's network namespace

	MTU   int              // in bytes; zero: that of the NIC
	MAC   net.HardwareAddr // nil: the kernel chooses one
	Alias string           // text by which its owner finds it (ip-link(8)); empty: none
}

// A MacvlanMode selects the macvlans of the host that exchange frames with a
// macvlan (ip-link(8)).
type MacvlanMode string

// The modes of a macvlan. The original's cluster network used private.
const (
	Private  MacvlanMode = "private"  // no other macvlan of the NIC
	Bridge   MacvlanMode = "bridge"   // macvlans in the same mode, inside the host
	VEPA     MacvlanMode = "vepa"     // macvlans whose frames the switch sends back
	Passthru MacvlanMode = "passthru" // no other macvlan may exist, and the host loses the NIC
)

// MacvlanModes lists every mode.
var MacvlanModes = []MacvlanMode{Private, Bridge, VEPA, Passthru}

// Sides returns the input of a rule plan.
func (r Router) Sides() rules.Sides {
	sources := r.Sources
	if !r.Spread {
		sources = sources.Families()
	}
	sides := rules.Sides{
		Cluster: r.Cluster, Egress: r.Egress, Sources: sources.Addresses(), Mark: r.ReplyMark,
		Health: r.HealthPort, Crossing: r.Crossing, Helpers: r.Helpers,
	}
	if r.Standby != nil {
		sides.Peers = rules.Port(r.Standby.Port)
		if c := r.Standby.Carry; c != nil {
			sides.Carry = rules.Carry{Interface: CarryInterface, UDP: CarryPort, First: c.First, Last: c.Last}
		}
	}
	return sides
}

// Plan returns the rules of the router.
func (r Router) Plan() rules.Plan {
	if !r.Forward {
		return rules.NewProxyPlan(r.Sides())
	}
	plan := rules.NewPlan(r.Set, r.Sides())
	if r.LogDrops {
		plan = plan.WithDropLog()
	}
	return plan
}
