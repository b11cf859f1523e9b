package plan

import (
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
)

// IPForward is the sysctl that enables forwarding of IPv4 packets between interfaces
// (ip-sysctl.rst). It belongs to the network namespace.
const IPForward = "net.ipv4.ip_forward"

// IPv6Forward is the same for IPv6. The kernel then takes no router advertisements unless
// an interface has accept_ra=2 (ip-sysctl.rst).
const IPv6Forward = "net.ipv6.conf.all.forwarding"

// ForwardingOf is the same for the input of one interface.
func ForwardingOf(name string) string { return conf4(name, "forwarding") }

// PromoteSecondaries is the sysctl that keeps an interface's secondary addresses when
// their primary one is deleted (ip-sysctl.rst).
func PromoteSecondaries(name string) string { return conf4(name, "promote_secondaries") }

// AcceptRA is the sysctl by which an interface believes router advertisements
// (ip-sysctl.rst). The kernel lacks it without IPv6.
func AcceptRA(name string) string { return conf6(name, "accept_ra") }

// conf4 and conf6 are sysctls of one interface, or, as "all", of the namespace.
func conf4(name, key string) string { return "net/ipv4/conf/" + name + "/" + key }
func conf6(name, key string) string { return "net/ipv6/conf/" + name + "/" + key }

// A setting is a sysctl that the router sets. It works without it, less robustly or
// less safely.
type setting struct {
	sysctl string
	value  int
	right  func(Sysctls) bool // whether the kernel's values have the effect of the desired one
	reads  []string           // the other sysctls that right needs
	effect string             // what happens without it
}

// Sysctls are values of sysctls, by their names. A sysctl that the kernel does not
// have is missing.
type Sysctls map[string]int

// String returns the values in the order of the names, one a line.
func (s Sysctls) String() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(s)) {
		b.WriteString(name + " = " + strconv.Itoa(s[name]) + "\n")
	}
	return b.String()
}

// off is the setting of a sysctl that must be 0.
func off(sysctl, effect string) setting {
	return setting{sysctl, 0, func(have Sysctls) bool { return have[sysctl] == 0 }, nil, effect}
}

// tracked is the setting of the time that connection tracking keeps a silent TCP
// connection in a state, in seconds. A longer time is right as well.
func tracked(state string, seconds int) setting {
	sysctl := "net/netfilter/nf_conntrack_tcp_timeout_" + state
	return setting{sysctl, seconds, func(have Sysctls) bool { return have[sysctl] >= seconds }, nil, "silent TCP connections end early"}
}

// arp is a setting of ARP. The higher one of the values for all interfaces and for
// this one counts (ip-sysctl.rst).
func arp(name, key string, value int) setting {
	own, all := conf4(name, key), conf4("all", key)
	return setting{own, value, func(have Sysctls) bool { return max(have[own], have[all]) >= value }, []string{all}, misleads}
}

// Of arp_ignore: answer for the addresses of the interface that is asked, or for none
// (ip-sysctl.rst).
const (
	ownAddresses = 1
	noAddress    = 8
)

// answering is the setting of the addresses for which the egress interface answers ARP.
func (n Network) answering() setting {
	s := arp(n.Interface, "arp_ignore", ownAddresses)
	if right := s.right; n.Silent {
		s = arp(n.Interface, "arp_ignore", noAddress)
		s.effect = "two routers answer ARP for the reserved addresses"
	} else {
		s.right = func(have Sysctls) bool { return right(have) && have[s.sysctl] != noAddress } // of a former run
	}
	return s
}

// loose is the setting of a reverse-path filter that must not be strict. By a strict
// one the kernel drops packets that arrive by another interface than the route to their
// source (ip-sysctl.rst, rp_filter: 0 off, 1 strict, 2 loose; the higher one of the
// values for all interfaces and for this one counts).
func loose(name, effect string, marks bool) setting {
	filter := func(name string) string { return conf4(name, "rp_filter") }
	valid := func(name string) string { return conf4(name, "src_valid_mark") }
	s := setting{sysctl: filter(name), value: 2, reads: []string{filter("all")}, effect: effect}
	if marks {
		s.reads = append(s.reads, valid(name), valid("all"))
	}
	s.right = func(have Sysctls) bool {
		return max(have[filter(name)], have[filter("all")]) != 1 || marks && have[valid(name)] == 0 && have[valid("all")] == 0
	}
	return s
}

// The times that the kernel tracks a silent TCP connection, in seconds
// (nf_conntrack-sysctl.rst). A packet of a forgotten connection is dropped.
const (
	// establishedTimeout is the kernel's default. RFC 5382, REQ-5, asks for at least
	// 2 hours 4 minutes.
	establishedTimeout = 5 * 24 * 3600
	// halfClosedTimeout begins when one end has sent FIN and the other has
	// acknowledged it, and may send for as long as it likes. A session in that state
	// lasts as long as an established one, at least the time of REQ-5 (RFC 6146,
	// section 3.5.2.2, states V4 FIN RCV and V6 FIN RCV). The kernel's default is 60.
	halfClosedTimeout = 2*3600 + 4*60
	// closingTimeout begins with a FIN that is not acknowledged yet: the transitory
	// time of REQ-5, which is longer than the longest time between two
	// retransmissions of the FIN, 120 s (TCP_RTO_MAX). The kernel's defaults are 120
	// for the first FIN and 30 for the second.
	closingTimeout = 4 * 60
)

const (
	believes    = "only the rules protect the pod from router advertisements and ICMP redirects"
	misleads    = "neighbours can learn an address on the wrong side of the pod"
	dropsMarked = "replies from the physical network are dropped"
	takesUnseen = "an IPv6 address that another host has may be taken"
	dropsFar    = "packets of clients in other subnets are dropped"
)

// settings returns the sysctls that the router sets; those of a macvlan before it is up.
//
// The physical network must not change the pod's addresses and routes: router
// advertisements (RFC 4861) would give the pod IPv6, with the sender as its router, and
// an ICMP redirect (RFC 792, RFC 4861) another next hop. The kernel believes a redirect
// for IPv4 if either the interface or conf.all accepts it, or, while the interface
// forwards, if both do (linux/inetdevice.h, IN_DEV_RX_REDIRECTS).
//
// Each side must answer ARP for its own addresses only, and ask from its own: on a
// network that both interfaces are in, the gateway otherwise learns the cluster
// interface's hardware address for the reserved address, and its replies are dropped.
// With proxy_arp, of all interfaces or of one, a pod that forwards answers for every
// address that it has a route to by the other interface.
func (n Network) settings() []setting {
	egress := n.Interface
	all := []setting{
		off(AcceptRA(egress), believes),
		off(conf6(egress, "autoconf"), believes),
		off(conf6(egress, "accept_redirects"), believes),
		off(conf4("all", "accept_redirects"), believes),
		off(conf4(egress, "accept_redirects"), believes),
		off(conf4("all", "proxy_arp"), misleads),
		off(conf4(egress, "proxy_arp"), misleads),
		n.answering(),
		// With 2 the kernel would ask from the first address of the subnet, which another
		// program may have set.
		arp(egress, "arp_announce", 1),
		// The rules restore the mark of a connection for its replies. With
		// src_valid_mark the filter uses the mark too, and finds the cluster side.
		loose(egress, dropsMarked, true),
	}
	if cluster := n.Cluster.Interface; cluster != "" {
		all = append(all,
			off(conf6(cluster, "accept_redirects"), believes),
			off(conf4(cluster, "accept_redirects"), believes),
			off(conf4(cluster, "proxy_arp"), misleads),
			arp(cluster, "arp_ignore", 1),
			arp(cluster, "arp_announce", 2),
			// Packets of clients behind the cluster's default route arrive by another
			// interface than the main table has for their source.
			loose(cluster, dropsFar, false),
		)
	}
	if len(n.Sources.Of(true)) > 0 {
		all = append(all, n.settingsIPv6()...)
	}
	return append(all,
		tracked("established", establishedTimeout),
		tracked("close_wait", halfClosedTimeout),
		tracked("fin_wait", closingTimeout),
		tracked("last_ack", closingTimeout),
	)
}

// settingsIPv6 returns the sysctls of a router with an IPv6 source.
//
// An address must not be used before the kernel has looked for another host that has it,
// and not while it does (RFC 4862, section 5.4; RFC 4429 allows the latter).
//
// With forwarding, an interface takes router advertisements only if its accept_ra is 2,
// and loses the routes of earlier ones if it is not (addrconf_fixup_forwarding in
// net/ipv6/addrconf.c): on the cluster side they may be the network's own way to configure
// the pod.
//
// While its gateway does not answer, the pod's own sockets get errors. The kernel asks for
// it again after router_probe_interval (rt6_probe in net/ipv6/route.c).
func (n Network) settingsIPv6() []setting {
	egress := n.Interface
	detects := conf6(egress, "accept_dad")
	all := []setting{
		off(conf6(egress, "disable_ipv6"), "the interface has no IPv6"),
		{detects, 1, func(have Sysctls) bool { return max(have[detects], have[conf6("all", "accept_dad")]) >= 1 }, []string{conf6("all", "accept_dad")}, takesUnseen},
		atLeast(conf6(egress, "dad_transmits"), 1, takesUnseen),
		off(conf6(egress, "optimistic_dad"), takesUnseen),
		off(conf6("all", "optimistic_dad"), takesUnseen),
		atMost(conf6(egress, "router_probe_interval"), 1, "the pod's own IPv6 connections fail for a minute after its gateway was silent"),
	}
	if cluster := n.Cluster.Interface; cluster != "" {
		advertised := AcceptRA(cluster)
		all = append(all,
			setting{advertised, 2, func(have Sysctls) bool { return have[advertised] != 1 }, nil, "the cluster side loses what router advertisements configured"})
	}
	return all
}

// atLeast is the setting of a sysctl that must not be lower than a value.
func atLeast(sysctl string, value int, effect string) setting {
	return setting{sysctl, value, func(have Sysctls) bool { return have[sysctl] >= value }, nil, effect}
}

// atMost is the setting of a sysctl that must not be higher than a value.
func atMost(sysctl string, value int, effect string) setting {
	return setting{sysctl, value, func(have Sysctls) bool { return have[sysctl] <= value }, nil, effect}
}

// Sysctls returns the names of the sysctls that State.Sysctls has. The kernel may lack one:
// without its interface, without IPv6, and before the first rules load connection tracking.
func (n Network) Sysctls() []string {
	var names []string
	for _, s := range n.settings() {
		for _, name := range append(s.reads, s.sysctl) {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

// set returns the steps for the settings.
func set(want Network, have State) []Change {
	var steps []Change
	for _, s := range want.settings() {
		if value, exists := have.Sysctls[s.sysctl]; exists && !s.right(have.Sysctls) {
			steps = append(steps, Change{
				Op: WriteSysctl, Interface: want.Interface, Index: have.Index,
				Sysctl: s.sysctl, Value: strconv.Itoa(s.value), OldValue: strconv.Itoa(value), Optional: true, Effect: s.effect,
			})
		}
	}
	return steps
}

// Defaults returns the kernel's own values of Sysctls, which most machines have in a fresh
// namespace (ip-sysctl.rst, nf_conntrack-sysctl.rst).
func (n Network) Defaults() Sysctls {
	values := make(Sysctls)
	for _, name := range n.Sysctls() {
		values[name] = map[string]int{
			"accept_ra": 1, "autoconf": 1, "accept_redirects": 1, "accept_dad": 1, "dad_transmits": 1, "router_probe_interval": 60,
			"nf_conntrack_tcp_timeout_established": 5 * 24 * 3600,
			"nf_conntrack_tcp_timeout_close_wait":  60,
			"nf_conntrack_tcp_timeout_fin_wait":    120,
			"nf_conntrack_tcp_timeout_last_ack":    30,
		}[path.Base(name)]
	}
	return values
}
