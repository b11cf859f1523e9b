package labtest

import (
	"bytes"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns/nstest"
	"github.com/egress-router/egress-router/internal/spec"
)

// RulesetFlushed is the damage that deletes all tables of nftables at once.
const RulesetFlushed = "ruleset flushed"

// A Damage is a change that another program makes to what the router configured.
type Damage struct {
	Name string
	Do   func(h *netlink.Handle, macvlan, eth netlink.Link) error
}

// damagedRules returns damages to the rules of the pod's backend.
func (p *Pod) damagedRules() []Damage {
	var damages []Damage
	add := func(name string, do func()) {
		damages = append(damages, Damage{name, func(*netlink.Handle, netlink.Link, netlink.Link) error { do(); return nil }})
	}
	add("source guard flushed", func() { p.NFT("flush table ip egress-router-guard") })
	add("source guard table deleted", func() { p.NFT("delete table ip egress-router-guard") })
	if p.Backend == Nftables {
		for name, lines := range map[string][]string{
			"redirect deleted":          {"delete element ip egress-router redirects { tcp . 8080 : 203.0.113.26 . 80 }"},
			"redirect changed":          {"delete element ip egress-router redirects { tcp . 80 : 203.0.113.25 . 80 }", "add element ip egress-router redirects { tcp . 80 : 203.0.113.27 . 80 }"},
			"redirect added":            {"add element ip egress-router redirects { tcp . 9000 : 203.0.113.25 . 80 }"},
			"redirects flushed":         {"flush map ip egress-router redirects"},
			"prerouting chain flushed":  {"flush chain ip egress-router nat-prerouting"},
			"rule added":                {"insert rule ip egress-router nat-prerouting tcp dport 80 accept"},
			"postrouting chain flushed": {"flush chain ip egress-router nat-postrouting"},
			"chain deleted":             {"flush chain ip egress-router nat-postrouting", "delete chain ip egress-router nat-postrouting"},
			"chain added":               {"add chain ip egress-router mine { type nat hook prerouting priority -190 ; }", "add rule ip egress-router mine tcp dport 80 accept"},
			"chain priority changed":    {"flush chain ip egress-router nat-postrouting", "delete chain ip egress-router nat-postrouting", "add chain ip egress-router nat-postrouting { type nat hook postrouting priority 300 ; }"},
			"chain policy changed":      {"add chain ip egress-router filter-input { type filter hook input priority filter - 1 ; policy drop ; }"},
			"set added":                 {"add set ip egress-router mine { type ipv4_addr ; }"},
			"table flushed":             {"flush table ip egress-router"},
			"table deleted":             {"delete table ip egress-router"},
			"table dormant":             {"add table ip egress-router { flags dormant ; }"},
			"forward chain flushed":     {"flush chain ip egress-router filter-forward"},
			"IPv6 table deleted":        {"delete table ip6 egress-router"},
			"IPv6 rules flushed":        {"flush table ip6 egress-router"},
			RulesetFlushed:              {"flush ruleset"},
			"mark chain flushed":        {"flush chain ip egress-router mangle-prerouting"},
			"limit rule added":          {"add rule ip egress-router filter-input iifname macvlan0 limit rate 1/second accept"},
		} {
			// In one transaction: a router that watches would repair the first.
			add(name, func() { p.NFT(strings.Join(lines, "; ")) })
		}
		return damages
	}
	nat := func(name string, args ...string) {
		add(name, func() { p.Iptables(append([]string{"-t", "nat"}, args...)...) })
	}
	nat("redirect deleted", "-D", "EGRESS-PREROUTING", "2")
	nat("redirects flushed", "-F", "EGRESS-PREROUTING")
	nat("rule added", "-I", "EGRESS-PREROUTING", "-p", "tcp", "--dport", "80", "-j", "ACCEPT")
	nat("postrouting chain flushed", "-F", "EGRESS-POSTROUTING")
	nat("jump deleted", "-D", "POSTROUTING", "-j", "EGRESS-POSTROUTING")
	nat("jump duplicated", "-A", "PREROUTING", "-j", "EGRESS-PREROUTING")
	nat("nat table flushed", "-F")
	restore := func(name, lines string) {
		add(name, func() { p.Restore("*nat\n" + lines + "COMMIT\n") })
	}
	restore("chain of another version used", `:EGRESS-OUTPUT - [0:0]
-A EGRESS-OUTPUT -p tcp -j ACCEPT
-A OUTPUT -j EGRESS-OUTPUT
`)
	restore("unused chain tree added", `:EGRESS-TCP - [0:0]
:EGRESS-TCP-0-4095 - [0:0]
-A EGRESS-TCP -p tcp --dport 0:4095 -g EGRESS-TCP-0-4095
-I EGRESS-PREROUTING -p tcp -j EGRESS-TCP
`)
	add("forward chain flushed", func() { p.Iptables("-F", "EGRESS-FORWARD") })
	add("mark chain flushed", func() { p.Iptables("-t", "mangle", "-F", "EGRESS-PREROUTING") })
	add("IPv6 rules flushed", func() { p.Tool(p.Program("ip6tables"), "-F") })
	add("IPv6 jump deleted", func() { p.Tool(p.Program("ip6tables"), "-D", "INPUT", "-j", "EGRESS-INPUT") })
	return damages
}

// Strict makes the cluster side's reverse-path filter one that the router has to
// loosen.
func (p *Pod) Strict() {
	p.Helper()
	if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/conf/eth0/rp_filter", "1"); err != nil {
		p.Fatal(err)
	}
}

// Damages returns all damages, in a fixed order.
func (p *Pod) Damages() []Damage { return sorted(append(p.NotifiedDamages(), p.damagedSysctls()...)) }

// NotifiedDamages returns those of which the kernel notifies, except by the legacy
// flavour of iptables. The next full comparison finds the others.
func (p *Pod) NotifiedDamages() []Damage {
	return sorted(append(p.damagedRules(), p.damagedNetwork()...))
}

// Share returns the damages that the n-th of tests that are alike does to this pod. In the
// long variant it is all of them. In the short one it is a third: each damage with one
// backend, and with the others in the tests beside.
func (p *Pod) Share(n int, damages []Damage) []Damage {
	if nstest.Long() {
		return damages
	}
	first := n + slices.Index(Backends, p.Backend)
	var share []Damage
	for i, d := range damages {
		if (i+first)%len(Backends) == 0 {
			share = append(share, d)
		}
	}
	return share
}

func sorted(damages []Damage) []Damage {
	slices.SortFunc(damages, func(a, b Damage) int { return strings.Compare(a.Name, b.Name) })
	return damages
}

// damagedSysctls returns damages to sysctls.
func (p *Pod) damagedSysctls() []Damage {
	var damages []Damage
	for _, d := range []struct{ name, value string }{
		{"net/ipv6/conf/macvlan0/accept_ra", "1"},
		{"net/ipv6/conf/macvlan0/autoconf", "1"},
		{"net/ipv6/conf/macvlan0/accept_redirects", "1"},
		{"net/ipv4/conf/macvlan0/accept_redirects", "1"},
		{"net/ipv4/conf/all/accept_redirects", "1"},
		{"net/ipv4/conf/macvlan0/arp_ignore", "0"},
		{"net/ipv4/conf/macvlan0/arp_announce", "0"},
		{"net/ipv4/conf/eth0/accept_redirects", "1"},
		{"net/ipv6/conf/eth0/accept_redirects", "1"},
		{"net/ipv4/conf/eth0/arp_ignore", "0"},
		{"net/ipv4/conf/eth0/arp_announce", "0"},
		{"net/ipv4/conf/eth0/proxy_arp", "1"},
		{"net/netfilter/nf_conntrack_tcp_timeout_close_wait", "60"},
		{"net/netfilter/nf_conntrack_tcp_timeout_established", "3600"},
	} {
		damages = append(damages, Damage{"sysctl " + d.name, func(*netlink.Handle, netlink.Link, netlink.Link) error {
			return p.Lab.SetSysctl(p.Lab.Router, d.name, d.value)
		}})
	}
	return damages
}

// Restore runs iptables-restore, which changes a table in one transaction.
func (p *Pod) Restore(input string) {
	p.Helper()
	cmd := exec.Command(p.Program("iptables-restore"), "--noflush", "-w")
	cmd.Env = append(os.Environ(), lockVariable+p.lock)
	cmd.Stdin = strings.NewReader(input)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := p.Lab.Run(p.Lab.Router, cmd); err != nil {
		p.Fatalf("%s: %v\n%s", cmd, err, &out)
	}
}

// Damage does a damage. An EEXIST or ESRCH (errors.Is) is one of a damage in
// several steps, between which a router repaired.
func (p *Pod) Damage(d Damage) error {
	h, err := p.Lab.Netlink(p.Lab.Router)
	if err != nil {
		return err
	}
	defer h.Close()
	macvlan, err := h.LinkByName("macvlan0")
	if err != nil {
		return err
	}
	eth, err := h.LinkByName("eth0")
	if err != nil {
		return err
	}
	return d.Do(h, macvlan, eth)
}

// damagedNetwork returns damages to the network, the same with every backend.
func (p *Pod) damagedNetwork() []Damage {
	address := Addr("192.168.12.99/24")
	everywhere := Everywhere()
	return []Damage{
		{"address deleted", func(h *netlink.Handle, macvlan, _ netlink.Link) error { return h.AddrDel(macvlan, address) }},
		{"link set down", func(h *netlink.Handle, macvlan, _ netlink.Link) error { return h.LinkSetDown(macvlan) }},
		{"default route moved to eth0", func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteReplace(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		}},
		{"second default route added", func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteAdd(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index, Priority: 100})
		}},
		{"default route blackholed", func(h *netlink.Handle, _, _ netlink.Link) error {
			return h.RouteReplace(&netlink.Route{Dst: everywhere, Type: unix.RTN_BLACKHOLE})
		}},
		{"default route deleted", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: everywhere, LinkIndex: macvlan.Attrs().Index})
		}},
		{"gateway route deleted", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: IPNet("192.168.12.1/32"), LinkIndex: macvlan.Attrs().Index, Scope: netlink.SCOPE_LINK})
		}},
		{"ip_forward turned off", func(*netlink.Handle, netlink.Link, netlink.Link) error {
			return p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "0")
		}},
		{"default route on eth0 prepended", func(h *netlink.Handle, _, eth netlink.Link) error {
			return prepend(h, &netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		}},
		{"gateway route on eth0 prepended", func(h *netlink.Handle, _, eth netlink.Link) error {
			gateway := IPNet("192.168.12.1/32")
			return prepend(h, &netlink.Route{Dst: gateway, LinkIndex: eth.Attrs().Index, Scope: netlink.SCOPE_LINK})
		}},
		{"subnet route deleted", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: IPNet("192.168.12.0/24"), LinkIndex: macvlan.Attrs().Index, Scope: netlink.SCOPE_LINK})
		}},
		{"forwarding of eth0 turned off", func(*netlink.Handle, netlink.Link, netlink.Link) error {
			return p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/conf/eth0/forwarding", "0")
		}},
		{"reply rule deleted", func(h *netlink.Handle, _, _ netlink.Link) error {
			mark := uint32(spec.DefaultReplyMark)
			rule := netlink.NewRule()
			rule.Family, rule.Priority, rule.Table, rule.Mark, rule.Mask = netlink.FAMILY_V4, 20000, spec.DefaultReplyTable, mark, &mark
			return h.RuleDel(rule)
		}},
		{"reply table route added", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.RouteAdd(&netlink.Route{Dst: IPNet("10.129.0.71/32"), Table: spec.DefaultReplyTable, LinkIndex: macvlan.Attrs().Index, Scope: netlink.SCOPE_LINK})
		}},
		{"main table's routing rule deleted", func(h *netlink.Handle, _, _ netlink.Link) error {
			rule := netlink.NewRule()
			rule.Family, rule.Priority, rule.Table = netlink.FAMILY_V4, 32766, unix.RT_TABLE_MAIN
			return h.RuleDel(rule)
		}},
		{"local table's routing rule deleted", func(h *netlink.Handle, _, _ netlink.Link) error {
			rule := netlink.NewRule()
			rule.Family, rule.Priority, rule.Table = netlink.FAMILY_V4, 0, unix.RT_TABLE_LOCAL
			return h.RuleDel(rule)
		}},
		{"rp_filter of eth0 tightened", func(*netlink.Handle, netlink.Link, netlink.Link) error {
			return p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/conf/eth0/rp_filter", "1")
		}},
	}
}

// prepend adds a route in front of one with the same destination: netlink has
// no call for it, so the others are deleted and appended.
func prepend(h *netlink.Handle, r *netlink.Route) error {
	routes, err := h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: r.Dst}, netlink.RT_FILTER_DST)
	if err != nil {
		return err
	}
	for _, other := range routes {
		if err := h.RouteDel(&other); err != nil {
			return err
		}
	}
	if err := h.RouteAdd(r); err != nil {
		return err
	}
	for _, other := range routes {
		if err := h.RouteAppend(&other); err != nil {
			return err
		}
	}
	return nil
}
