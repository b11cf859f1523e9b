package labtest

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/lab"
)

// A Damage is something that somebody does to a router.
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
			"one redirect deleted":      {"delete element ip egress-router redirects { tcp . 8080 : 203.0.113.26 . 80 }"},
			"one redirect elsewhere":    {"delete element ip egress-router redirects { tcp . 80 : 203.0.113.25 . 80 }", "add element ip egress-router redirects { tcp . 80 : 203.0.113.27 . 80 }"},
			"one redirect too many":     {"add element ip egress-router redirects { tcp . 9000 : 203.0.113.25 . 80 }"},
			"redirects flushed":         {"flush map ip egress-router redirects"},
			"redirect rule flushed":     {"flush chain ip egress-router nat-prerouting"},
			"a rule too many":           {"insert rule ip egress-router nat-prerouting tcp dport 80 accept"},
			"source rule deleted":       {"flush chain ip egress-router nat-postrouting"},
			"a chain gone":              {"flush chain ip egress-router nat-postrouting", "delete chain ip egress-router nat-postrouting"},
			"a chain too many":          {"add chain ip egress-router mine { type nat hook prerouting priority -190 ; }", "add rule ip egress-router mine tcp dport 80 accept"},
			"a chain elsewhere":         {"flush chain ip egress-router nat-postrouting", "delete chain ip egress-router nat-postrouting", "add chain ip egress-router nat-postrouting { type nat hook postrouting priority 300 ; }"},
			"a policy that drops":       {"add chain ip egress-router filter-input { type filter hook input priority filter - 1 ; policy drop ; }"},
			"a set too many":            {"add set ip egress-router mine { type ipv4_addr ; }"},
			"all rules flushed":         {"flush table ip egress-router"},
			"the table gone":            {"delete table ip egress-router"},
			"the table switched off":    {"add table ip egress-router { flags dormant ; }"},
			"what lets cross flushed":   {"flush chain ip egress-router filter-forward"},
			"the IPv6 table gone":       {"delete table ip6 egress-router"},
			"the IPv6 rules flushed":    {"flush table ip6 egress-router"},
			"everything flushed":        {"flush ruleset"},
			"the marks flushed":         {"flush chain ip egress-router mangle-prerouting"},
			"a rule of another kind in": {"add rule ip egress-router filter-input iifname macvlan0 limit rate 1/second accept"},
		} {
			// At once: a router that watches would be in between.
			add(name, func() { p.NFT(strings.Join(lines, "; ")) })
		}
		return damages
	}
	nat := func(name string, args ...string) {
		add(name, func() { p.Iptables(append([]string{"-t", "nat"}, args...)...) })
	}
	nat("one redirect deleted", "-D", "EGRESS-PREROUTING", "2")
	nat("redirects flushed", "-F", "EGRESS-PREROUTING")
	nat("a rule too many", "-I", "EGRESS-PREROUTING", "-p", "tcp", "--dport", "80", "-j", "ACCEPT")
	nat("source rule deleted", "-F", "EGRESS-POSTROUTING")
	nat("a jump gone", "-D", "POSTROUTING", "-j", "EGRESS-POSTROUTING")
	nat("a jump twice", "-A", "PREROUTING", "-j", "EGRESS-PREROUTING")
	nat("all of the table flushed", "-F")
	restore := func(name, lines string) {
		add(name, func() { p.Restore("*nat\n" + lines + "COMMIT\n") })
	}
	restore("a chain of another version, in use", `:EGRESS-OUTPUT - [0:0]
-A EGRESS-OUTPUT -p tcp -j ACCEPT
-A OUTPUT -j EGRESS-OUTPUT
`)
	restore("a tree that is not in use", `:EGRESS-TCP - [0:0]
:EGRESS-TCP-0-4095 - [0:0]
-A EGRESS-TCP -p tcp --dport 0:4095 -g EGRESS-TCP-0-4095
-I EGRESS-PREROUTING -p tcp -j EGRESS-TCP
`)
	add("what lets cross flushed", func() { p.Iptables("-F", "EGRESS-FORWARD") })
	add("the marks flushed", func() { p.Iptables("-t", "mangle", "-F", "EGRESS-PREROUTING") })
	add("the IPv6 rules flushed", func() { p.Tool(p.Program("ip6tables"), "-F") })
	add("an IPv6 jump gone", func() { p.Tool(p.Program("ip6tables"), "-D", "INPUT", "-j", "EGRESS-INPUT") })
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
func (p *Pod) Damages() []Damage {
	damages := append(p.damagedRules(), damagedNetwork()...)
	slices.SortFunc(damages, func(a, b Damage) int { return strings.Compare(a.Name, b.Name) })
	return damages
}

// Restore runs iptables-restore, which changes a table at once.
func (p *Pod) Restore(input string) {
	p.Helper()
	cmd := exec.Command(p.Program("iptables-restore"), "--noflush", "-w")
	cmd.Stdin = strings.NewReader(input)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := p.Lab.Run(p.Lab.Router, cmd); err != nil {
		p.Fatalf("%s: %v\n%s", cmd, err, &out)
	}
}

// Damage does one.
func (p *Pod) Damage(d Damage) error {
	return p.Lab.Router.Do(func() error {
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
	})
}

// damagedNetwork returns damages to the network, the same with every backend.
func damagedNetwork() []Damage {
	address := &netlink.Addr{IPNet: &net.IPNet{IP: lab.Source.AsSlice(), Mask: net.CIDRMask(24, 32)}}
	everywhere := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	return []Damage{
		{"address gone", func(h *netlink.Handle, macvlan, _ netlink.Link) error { return h.AddrDel(macvlan, address) }},
		{"link down", func(h *netlink.Handle, macvlan, _ netlink.Link) error { return h.LinkSetDown(macvlan) }},
		{"default route back on eth0", func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteReplace(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		}},
		{"a second default route", func(h *netlink.Handle, _, eth netlink.Link) error {
			return h.RouteAdd(&netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index, Priority: 100})
		}},
		{"a default route that drops", func(h *netlink.Handle, _, _ netlink.Link) error {
			return h.RouteReplace(&netlink.Route{Dst: everywhere, Type: unix.RTN_BLACKHOLE})
		}},
		{"no default route", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: everywhere, LinkIndex: macvlan.Attrs().Index})
		}},
		{"no route to the gateway", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.RouteDel(&netlink.Route{Dst: &net.IPNet{IP: lab.GatewayAddr.AsSlice(), Mask: net.CIDRMask(32, 32)}, LinkIndex: macvlan.Attrs().Index, Scope: netlink.SCOPE_LINK})
		}},
		{"no forwarding", func(*netlink.Handle, netlink.Link, netlink.Link) error {
			return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0)
		}},
		{"another default route in front of ours", func(h *netlink.Handle, _, eth netlink.Link) error {
			return prepend(h, &netlink.Route{Dst: everywhere, Gw: lab.NodeAddr.AsSlice(), LinkIndex: eth.Attrs().Index})
		}},
		{"another route to the gateway in front of ours", func(h *netlink.Handle, _, eth netlink.Link) error {
			gateway := &net.IPNet{IP: lab.GatewayAddr.AsSlice(), Mask: net.CIDRMask(32, 32)}
			return prepend(h, &netlink.Route{Dst: gateway, LinkIndex: eth.Attrs().Index, Scope: netlink.SCOPE_LINK})
		}},
		{"no route to the subnet", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			_, subnet, err := net.ParseCIDR("192.168.12.0/24")
			if err != nil {
				return err
			}
			return h.RouteDel(&netlink.Route{Dst: subnet, LinkIndex: macvlan.Attrs().Index, Scope: netlink.SCOPE_LINK})
		}},
		{"no forwarding by one interface", func(*netlink.Handle, netlink.Link, netlink.Link) error {
			return os.WriteFile("/proc/sys/net/ipv4/conf/eth0/forwarding", []byte("0"), 0)
		}},
		{"no rule that leads to the table of replies", func(h *netlink.Handle, _, _ netlink.Link) error {
			mark := uint32(config.DefaultReplyMark)
			rule := netlink.NewRule()
			rule.Family, rule.Priority, rule.Table, rule.Mark, rule.Mask = netlink.FAMILY_V4, 20000, config.DefaultReplyTable, mark, &mark
			return h.RuleDel(rule)
		}},
		{"a route too many in the table of replies", func(h *netlink.Handle, macvlan, _ netlink.Link) error {
			return h.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: lab.FarAddr.AsSlice(), Mask: net.CIDRMask(32, 32)}, Table: config.DefaultReplyTable, LinkIndex: macvlan.Attrs().Index, Scope: netlink.SCOPE_LINK})
		}},
		{"a strict reverse-path filter", func(*netlink.Handle, netlink.Link, netlink.Link) error {
			return os.WriteFile("/proc/sys/net/ipv4/conf/eth0/rp_filter", []byte("1"), 0)
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
