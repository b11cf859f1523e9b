package router_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/rules"
)

// dualList redirects both families to the servers of connectDual.
const dualList = "80 tcp 203.0.113.25\n80 tcp 2001:db8::25\n53 udp 2001:db8::25\n8080 tcp 2001:db8::26 80\n"

// fallback6 is the fallback of IPv6.
const fallback6 = "2001:db8::27\n"

// connectDual makes the pod a router with sources, and loads the rules for a list.
func connectDual(p *labtest.Pod, list string, sources ...netip.Addr) {
	p.Helper()
	for _, s := range []struct{ proto, addr string }{
		{"tcp", "[2001:db8::25]:80"}, {"udp", "[2001:db8::25]:53"}, {"tcp", "[2001:db8::26]:80"}, {"tcp", "[2001:db8::27]:9000"}, {"udp", "[2001:db8::27]:9000"},
		{"tcp", "[2001:db8:12::80]:80"},
	} {
		p.Serve(p.Lab.Outside, s.proto, s.addr)
	}
	p.Connect(sources...)
	p.Load(list, sources...)
}

// wantDual checks that a server answers a client and sees a source.
func wantDual(p *labtest.Pod, from *netns.Namespace, proto, addr, server string, source netip.Addr) {
	p.Helper()
	a, err := p.Ask(from, proto, netip.MustParseAddrPort(addr))
	if err != nil {
		p.Errorf("%s %s: %v", proto, addr, err)
	} else if a.Server.String() != server || a.Peer.Addr() != source {
		p.Errorf("%s %s: %s answered and saw %s; want %s, which sees %s", proto, addr, a.Server, a.Peer, server, source)
	}
}

// wantIPv6 checks redirects of IPv6 from a client.
func wantIPv6(p *labtest.Pod, from *netns.Namespace) {
	p.Helper()
	wantDual(p, from, "tcp", "[fd00:10:128::98]:80", "[2001:db8::25]:80", lab.Source6)
	wantDual(p, from, "udp", "[fd00:10:128::98]:53", "[2001:db8::25]:53", lab.Source6)
	wantDual(p, from, "tcp", "[fd00:10:128::98]:8080", "[2001:db8::26]:80", lab.Source6)
}

// wantSources6 checks that every IPv6 packet that left by macvlan0 had one of the sources,
// or belongs to neighbour discovery of the link.
func wantSources6(p *labtest.Pod, c *lab.Capture, sources ...netip.Addr) {
	p.Helper()
	seen := 0
	for _, f := range c.Frames() {
		ip, ok := f.IPv6()
		if !ok || !f.Outgoing {
			continue
		}
		seen++
		from := ip.Src.Addr()
		icmp := ip.Protocol == unix.IPPROTO_ICMPV6 || ip.Protocol == unix.IPPROTO_HOPOPTS
		discovery := icmp && (from.IsLinkLocalUnicast() || from.IsUnspecified())
		if !slices.Contains(sources, from) && !discovery {
			p.Errorf("frame on macvlan0 with another source: %s", f)
		}
	}
	if seen == 0 {
		p.Error("no IPv6 packet left")
	}
}

func captureOn(p *labtest.Pod, ns *netns.Namespace, name string) *lab.Capture {
	p.Helper()
	c, err := p.Lab.Capture(ns, name)
	if err != nil {
		p.Fatal(err)
	}
	return c
}

// flushSourceRule6 deletes the rule that sets the source of IPv6.
func flushSourceRule6(p *labtest.Pod) {
	p.Helper()
	if p.Backend == labtest.Nftables {
		p.NFT("flush chain ip6 egress-router nat-postrouting")
	} else {
		p.Tool(p.Program("ip6tables"), "-t", "nat", "-F", "EGRESS-POSTROUTING")
	}
}

// Connections of IPv6 are redirected with the reserved address, from clients of any
// subnet, beside those of IPv4; other ports are refused at once, or redirected to the
// fallback.
func TestIPv6Crosses(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		connectDual(p, dualList, lab.Source, lab.Source6)
		out := captureOn(p, p.Lab.Router, "macvlan0")
		for _, client := range []*netns.Namespace{p.Lab.Client, p.Lab.Far} {
			wantIPv6(p, client)
			wantDual(p, client, "tcp", "10.128.0.98:80", "203.0.113.25:80", lab.Source)
			for _, proto := range []string{"tcp", "udp"} {
				if a, err := p.Ask(client, proto, netip.MustParseAddrPort("[fd00:10:128::98]:9000")); !errors.Is(err, syscall.ECONNREFUSED) {
					p.Errorf("%s to a port without a redirect: answer %v, error %v; want a refusal", proto, a, err)
				}
			}
		}
		if !p.Load(dualList, lab.Source, lab.Source6) {
			p.Error("a second load changes something")
		}
		p.Load(dualList+fallback6, lab.Source, lab.Source6)
		for _, client := range []*netns.Namespace{p.Lab.Client, p.Lab.Far} {
			wantIPv6(p, client)
			wantDual(p, client, "tcp", "[fd00:10:128::98]:9000", "[2001:db8::27]:9000", lab.Source6)
			wantDual(p, client, "udp", "[fd00:10:128::98]:9000", "[2001:db8::27]:9000", lab.Source6)
		}
		// The pod's own sockets, too.
		wantDual(p, p.Lab.Router, "tcp", "[2001:db8::25]:80", "[2001:db8::25]:80", lab.Source6)
		wantSources6(p, out, lab.Source6)
	})
}

// After another program has deleted the rule that sets the source, nothing leaves with
// another one: neither new connections nor flows that go on.
func TestIPv6Guard(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		connectDual(p, dualList, lab.Source, lab.Source6)
		conn := p.Dial(p.Lab.Client, "tcp", netip.MustParseAddrPort("[fd00:10:128::98]:80"))
		r := bufio.NewReader(conn)
		out := captureOn(p, p.Lab.Router, "macvlan0")
		flushSourceRule6(p)
		p.WantEcho("an open connection without the rule", conn, r)
		in := captureOn(p, p.Lab.Router, "eth0")
		ctx, cancel := context.WithCancel(p.Context())
		asked := make(chan struct{})
		go func() {
			defer close(asked)
			_, _ = p.Lab.Ask(ctx, p.Lab.Client, "tcp", netip.MustParseAddrPort("[fd00:10:128::98]:8080"))
		}()
		if _, err := in.Wait(p.Context(), func(f lab.Frame) bool { ip, ok := f.IPv6(); return ok && !f.Outgoing && ip.Dst.Port() == 8080 }); err != nil {
			p.Error(err)
		}
		p.WantEcho("an open connection behind a new one", conn, r)
		cancel()
		<-asked
		for _, f := range out.Frames() {
			if ip, ok := f.IPv6(); ok && f.Outgoing && ip.Dst.Addr() == lab.Remote6[1] {
				p.Errorf("a new connection leaves without the rule: %s", f)
			}
		}
		p.Load(dualList, lab.Source, lab.Source6)
		wantIPv6(p, p.Lab.Client)
		wantSources6(p, out, lab.Source6)
	})
}

// iptables prints the rules in the form in which they were loaded, so that a comparison
// needs no canary.
func TestIPv6IsPrintedAsLoaded(t *testing.T) {
	t.Parallel()
	labtest.EachFlavour(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		sources := []netip.Addr{lab.Source, lab.Source6, netip.MustParseAddr("192.168.12.120"), netip.MustParseAddr("2001:db8:12::120"), netip.MustParseAddr("2001:db8:12::121")}
		p.Load(dualList+fallback6, sources...)
		set, err := rules.ParseExtended(dualList+fallback6, nil)
		if err != nil {
			p.Fatal(err)
		}
		printed := make(map[string]string)
		for _, c := range rules.NewPlan(set, rules.Sides{Cluster: "eth0", Egress: "macvlan0", Sources: sources, Mark: labtest.Mark}).IPTables() {
			program := map[rules.Family]string{rules.IPv4: "iptables-save", rules.IPv6: "ip6tables-save"}[c.Family]
			key := program + " " + string(c.Table)
			if printed[key] == "" {
				printed[key] = strings.ReplaceAll(p.Tool(p.Program(program), "-t", string(c.Table)), " -p icmpv6 ", " -p ipv6-icmp ")
			}
			var got strings.Builder
			for line := range strings.Lines(printed[key]) {
				if strings.HasPrefix(line, "-A "+c.Name+" ") {
					got.WriteString(line)
				}
			}
			if diff := cmp.Diff(strings.Split(string(c.Saved), "\n"), strings.Split(got.String(), "\n")); diff != "" {
				p.Errorf("%s, chain %s: -loaded +printed:\n%s", key, c.Name, diff)
			}
		}
	})
}

// An iptables that prints masks, networks and messages in another form is recognised, also
// by the next process, and damage is found behind it.
func TestIPv6OtherSpelling(t *testing.T) {
	t.Parallel()
	labtest.EachFlavourInTurn(t, 0, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		sources := []netip.Addr{lab.Source, lab.Source6, netip.MustParseAddr("192.168.12.120"), netip.MustParseAddr("2001:db8:12::120")}
		p.Path = p.Programs(`case $0 in
*-save) "$real" "$@" | sed 's#-s ::1/::1 #-s ::1/::0001 #; s#-s 0.0.0.1/0.0.0.1 #-s 0.0.0.1/1 #; s# -d ff02::/16 # -d ff02::/ffff:: #; s#--icmpv6-type 135#--icmpv6-type neighbour-solicitation#' ;;
*) exec "$real" "$@" ;;
esac
`)
		if p.Load(dualList+fallback6, sources...) {
			p.Error("the first load changes nothing")
		}
		if !p.Load(dualList+fallback6, sources...) {
			p.Error("a second load changes something")
		}
		for _, damage := range [][]string{
			{"-t", "mangle", "-D", "EGRESS-PREROUTING", "-i", "macvlan0", "-j", "DROP"},
			{"-t", "nat", "-F", "EGRESS-POSTROUTING"},
			{"-t", "nat", "-R", "EGRESS-POSTROUTING", "3", "-s", "::1/::3", "-o", "macvlan0", "-j", "SNAT", "--to-source", "2001:db8:12::120"},
			{"-t", "filter", "-R", "EGRESS-INPUT", "1", "-p", "ipv6-icmp", "-m", "icmp6", "--icmpv6-type", "137", "-j", "ACCEPT"},
		} {
			p.Tool(p.Program("ip6tables"), damage...)
			if p.Load(dualList+fallback6, sources...) {
				p.Errorf("damage is not found: %q", damage)
			}
			if !p.Load(dualList+fallback6, sources...) {
				p.Errorf("a load behind the repair of %q changes something", damage)
			}
		}
	})
}

// echo6 sends an ICMPv6 echo request (RFC 4443) and reports whether there is a reply.
func echo6(p *labtest.Pod, ns *netns.Namespace, to netip.Addr, patience time.Duration) bool {
	p.Helper()
	var c *net.IPConn
	if err := ns.Do(func() (err error) {
		c, err = net.DialIP("ip6:ipv6-icmp", nil, &net.IPAddr{IP: to.AsSlice(), Zone: to.Zone()})
		return err
	}); err != nil {
		p.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte{128, 0, 0, 0, 0x12, 0x34, 0, 1}); err != nil { // the kernel adds the checksum
		return false
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	for b := make([]byte, 1500); ; {
		n, _, err := c.ReadFrom(b)
		if err != nil {
			return false
		}
		if n >= 8 && b[0] == 129 && b[4] == 0x12 && b[5] == 0x34 {
			return true
		}
	}
}

// linkLocal returns the link-local address of a link.
func linkLocal(p *labtest.Pod, ns *netns.Namespace, name string) netip.Addr {
	p.Helper()
	h := p.Handle(ns)
	var found netip.Addr
	p.Until(name+" has a link-local address", func() bool {
		list, err := h.AddrList(p.Link(h, name), netlink.FAMILY_V6)
		if err != nil {
			p.Fatal(err)
		}
		for _, a := range list {
			if ip, _ := netip.AddrFromSlice(a.IP); ip.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
				found = ip
			}
		}
		return found.IsValid()
	})
	return found
}

// Hosts of the physical network reach nobody by IPv6: neither services of the pod nor the
// cluster. TCP to the reserved address is reset, and it answers echo requests.
func TestIPv6PhysicalNetwork(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		connectDual(p, dualList+fallback6, lab.Source, lab.Source6)
		p.Serve(p.Lab.Client, "tcp", "[fd00:10:128::71]:7")
		p.Serve(p.Lab.Client, "udp", "[fd00:10:128::71]:7")
		for _, own := range []string{"[2001:db8:12::99]", "[fd00:10:128::98]"} {
			for _, proto := range []string{"tcp", "udp"} {
				p.Serve(p.Lab.Router, proto, own+":7")
			}
		}
		p.AddRoute(p.Lab.Outside, lab.LANLink, "fd00:10:128::/64", "2001:db8:12::99")
		near := linkLocal(p, p.Lab.Router, "macvlan0").WithZone(lab.LANLink)
		inside := captureOn(p, p.Lab.Client, lab.ClientLink)
		for _, port := range []uint16{7, 80, 22} {
			if a, err := p.Ask(p.Lab.Outside, "tcp", netip.AddrPortFrom(lab.Source6, port)); !errors.Is(err, syscall.ECONNREFUSED) {
				p.Errorf("TCP to port %d of the reserved address: answer %v, error %v; want a reset", port, a, err)
			}
		}
		arrived := captureOn(p, p.Lab.Router, "macvlan0")
		// On a busy machine the time of a question may be over before it is sent.
		until := func(to netip.AddrPort, ask func()) {
			if !labtest.Poll(func() bool {
				ask()
				return slices.ContainsFunc(arrived.Frames(), func(f lab.Frame) bool { ip, ok := f.IPv6(); return ok && !f.Outgoing && ip.Dst == to })
			}) {
				p.Errorf("nothing arrived for %s", to)
			}
		}
		var asking sync.WaitGroup
		for _, to := range []netip.AddrPort{
			netip.AddrPortFrom(lab.Source6, 7), netip.AddrPortFrom(lab.RouterAddr6, 7), netip.AddrPortFrom(lab.ClientAddr6, 7), netip.AddrPortFrom(near, 7), netip.AddrPortFrom(near, 80),
		} {
			for _, proto := range []string{"tcp", "udp"} {
				if proto == "tcp" && to.Addr() == lab.Source6 {
					continue
				}
				asking.Go(func() {
					until(netip.AddrPortFrom(to.Addr().WithZone(""), to.Port()), func() {
						ctx, cancel := context.WithTimeout(p.Context(), 3*labtest.Silence)
						defer cancel()
						if a, err := p.Lab.Ask(ctx, p.Lab.Outside, proto, to); err == nil || errors.Is(err, syscall.ECONNREFUSED) {
							p.Errorf("%s to %s: answer %v, error %v; want none", proto, to, a, err)
						}
					})
				})
			}
		}
		asking.Wait()
		for _, to := range []netip.Addr{lab.RouterAddr6, lab.ClientAddr6, near} {
			until(netip.AddrPortFrom(to.WithZone(""), 0), func() {
				if echo6(p, p.Lab.Outside, to, labtest.Silence) {
					p.Errorf("an echo request to %s is answered", to)
				}
			})
		}
		if !echo6(p, p.Lab.Outside, lab.Source6, labtest.Patience) {
			p.Error("the reserved address does not answer echo requests")
		}
		wantIPv6(p, p.Lab.Client)
		for _, f := range inside.Frames() {
			if ip, ok := f.IPv6(); ok && !f.Outgoing && (lab.LAN6.Contains(ip.Src.Addr()) || ip.Src.Addr() == lab.GatewayLinkLocal) {
				p.Errorf("a packet of the physical network in the cluster: %s", f)
			}
		}

		// Nor does the pod believe its routers.
		believesAdvertisements(p, "macvlan0")
		if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv6/conf/macvlan0/accept_ra", "2"); err != nil { // also while it forwards
			p.Fatal(err)
		}
		before := ipv6(p)
		advertise(p)
		if !echo6(p, p.Lab.Outside, lab.Source6, labtest.Patience) { // behind the advertisement
			p.Error("no echo reply behind the advertisement")
		}
		if now := ipv6(p); !slices.Equal(now, before) {
			p.Errorf("addresses and routes with an advertisement: %q, before: %q", now, before)
		}
	})
}

// Neighbours find each other through the rules, from either side: at first, by the
// multicast address of duplicate address detection, and by probes of their reachability.
func TestIPv6NeighbourDiscovery(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		connectDual(p, dualList, lab.Source, lab.Source6)
		router, outside := p.Handle(p.Lab.Router), p.Handle(p.Lab.Outside)
		macvlan, lan := p.Link(router, "macvlan0"), p.Link(outside, lab.LANLink)
		forget := func(h *netlink.Handle, l netlink.Link) {
			list, err := h.NeighList(l.Attrs().Index, netlink.FAMILY_V6)
			if err != nil {
				p.Fatal(err)
			}
			for _, n := range list {
				if !n.IP.IsMulticast() {
					_ = h.NeighDel(&n) // the kernel may have removed it
				}
			}
		}
		for range 2 {
			forget(router, macvlan)
			forget(outside, lan)
			wantIPv6(p, p.Lab.Client) // the pod asks
			forget(outside, lan)
			if !echo6(p, p.Lab.Outside, lab.Source6, labtest.Patience) { // the gateway asks
				p.Error("no echo reply")
			}
		}
		// A neighbour is probed by unicast, and answers from its link-local address or to it.
		near := linkLocal(p, p.Lab.Router, "macvlan0")
		for _, n := range []struct {
			h    *netlink.Handle
			link netlink.Link
			ip   netip.Addr
			mac  net.HardwareAddr
		}{
			{router, macvlan, lab.GatewayAddr6, lan.Attrs().HardwareAddr}, {router, macvlan, lab.GatewayLinkLocal, lan.Attrs().HardwareAddr},
			{outside, lan, lab.Source6, macvlan.Attrs().HardwareAddr}, {outside, lan, near, macvlan.Attrs().HardwareAddr},
		} {
			entry := &netlink.Neigh{LinkIndex: n.link.Attrs().Index, IP: n.ip.AsSlice(), HardwareAddr: n.mac, State: netlink.NUD_PROBE}
			if err := n.h.NeighSet(entry); err != nil {
				p.Fatal(err)
			}
			p.Until(n.ip.String()+" answers a probe", func() bool {
				list, err := n.h.NeighList(n.link.Attrs().Index, netlink.FAMILY_V6)
				if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
					p.Fatal(err)
				}
				return slices.ContainsFunc(list, func(have netlink.Neigh) bool { return have.IP.Equal(entry.IP) && have.State == netlink.NUD_REACHABLE })
			})
		}
		// Duplicates are found, whichever host has the address first. Switches learn the group
		// of an address (RFC 3810, section 5.2).
		out := captureOn(p, p.Lab.Router, "macvlan0")
		for _, host := range []struct {
			ns   *netns.Namespace
			h    *netlink.Handle
			link netlink.Link
			addr netip.Addr
		}{{p.Lab.Outside, outside, lan, lab.Source6}, {p.Lab.Router, router, macvlan, lab.LANServer6}} {
			if err := p.Lab.SetSysctl(host.ns, "net/ipv6/conf/"+host.link.Attrs().Name+"/accept_dad", "1"); err != nil {
				p.Fatal(err)
			}
			if err := host.h.AddrAdd(host.link, &netlink.Addr{IPNet: &net.IPNet{IP: host.addr.AsSlice(), Mask: net.CIDRMask(64, 128)}}); err != nil {
				p.Fatal(err)
			}
			p.Until(host.addr.String()+" is found to be a duplicate", func() bool {
				list, err := host.h.AddrList(host.link, netlink.FAMILY_V6)
				if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
					p.Fatal(err)
				}
				return slices.ContainsFunc(list, func(a netlink.Addr) bool {
					return a.IP.Equal(host.addr.AsSlice()) && a.Flags&unix.IFA_F_DADFAILED != 0
				})
			})
		}
		group := netip.MustParseAddr("ff02::1:ff00:80").AsSlice() // of the second one
		if _, err := out.Wait(p.Context(), func(f lab.Frame) bool {
			ip, ok := f.IPv6()
			const message = 14 + 40 + 8 // behind the headers of Ethernet and IPv6, and the option for routers
			return ok && f.Outgoing && ip.Protocol == unix.IPPROTO_HOPOPTS && len(f.Data) > message && f.Data[message] == 143 && bytes.Contains(f.Data[message:], group)
		}); err != nil {
			p.Errorf("no report of the group of an address: %v", err)
		}
	})
}

// pathMTU returns the MTU of the path that a connected socket knows (ipv6(7), IPV6_MTU).
func pathMTU(p *labtest.Pod, conn net.Conn) int {
	p.Helper()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		p.Fatal(err)
	}
	mtu := 0
	if ctl := raw.Control(func(fd uintptr) { mtu, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU) }); ctl != nil || err != nil {
		p.Fatal(ctl, err)
	}
	return mtu
}

// serverOf sends a datagram by a client, and returns a server's socket for the answers.
func serverOf(p *labtest.Pod, client net.Conn) net.Conn {
	p.Helper()
	own := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("[2001:db8::25]:5353"))
	// open opens a socket. A process that another test starts has a copy of the one before
	// until execve(2).
	open := func(peer netip.AddrPort) (conn *net.UDPConn) {
		p.Helper()
		p.Until("the server's port is free", func() bool {
			err := p.Lab.Outside.Do(func() (err error) {
				if peer.IsValid() {
					conn, err = net.DialUDP("udp6", own, net.UDPAddrFromAddrPort(peer))
				} else {
					conn, err = net.ListenUDP("udp6", own)
				}
				return err
			})
			if err != nil && !errors.Is(err, unix.EADDRINUSE) {
				p.Fatal(err)
			}
			return err == nil
		})
		return conn
	}
	l := open(netip.AddrPort{})
	_, err := client.Write([]byte("?\n"))
	_ = l.SetReadDeadline(time.Now().Add(labtest.Patience))
	var peer netip.AddrPort
	if err == nil {
		_, peer, err = l.ReadFromUDPAddrPort(make([]byte, 16))
	}
	_ = l.Close()
	if err != nil || peer.Addr() != lab.Source6 {
		p.Fatalf("the server sees %s, error %v", peer, err)
	}
	return open(peer)
}

// Clients and servers learn the MTU of their path, from the pod and from routers of the physical
// network (RFC 8201): without it large packets of IPv6 are lost, which routers do not
// divide.
func TestIPv6PacketTooBig(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
		connectDual(p, dualList+"5353 udp 2001:db8::25\n", lab.Source, lab.Source6)
		for _, client := range []*netns.Namespace{p.Lab.Client, p.Lab.Far} {
			sent := captureOn(p, p.Lab.Outside, lab.LANLink)
			conn := p.Dial(client, "udp", netip.MustParseAddrPort("[fd00:10:128::98]:53"))
			if _, err := conn.Write(bytes.Repeat([]byte("?"), 1400)); err != nil {
				p.Fatal(err)
			}
			frame, err := sent.Wait(p.Context(), func(f lab.Frame) bool {
				ip, ok := f.IPv6()
				return ok && !f.Outgoing && ip.Dst == netip.MustParseAddrPort("[2001:db8::25]:53") && len(f.Data) > 1400
			})
			if err != nil {
				p.Fatal(err)
			}
			// A router says that the packet is too big (RFC 4443, section 3.2).
			message := append([]byte{2, 0, 0, 0, 0, 0, 1360 >> 8, 1360 & 0xff}, frame.Data[14:14+1200]...)
			if err := p.Lab.Outside.Do(func() error {
				c, err := net.DialIP("ip6:ipv6-icmp", nil, &net.IPAddr{IP: lab.Source6.AsSlice()})
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write(message)
				return err
			}); err != nil {
				p.Fatal(err)
			}
			p.Until("the client knows the MTU of a router", func() bool { return pathMTU(p, conn) == 1360 })
		}
		// The pod itself has a smaller MTU at the egress side, to which the segments of TCP fit
		// from the start.
		syns := captureOn(p, p.Lab.Router, "macvlan0")
		h := p.Handle(p.Lab.Router)
		if err := h.LinkSetMTU(p.Link(h, "macvlan0"), 1300); err != nil {
			p.Fatal(err)
		}
		for _, client := range []*netns.Namespace{p.Lab.Client, p.Lab.Far} {
			conn := p.Dial(client, "udp", netip.MustParseAddrPort("[fd00:10:128::98]:53"))
			p.Until("the client knows the MTU of the pod", func() bool {
				if _, err := conn.Write(bytes.Repeat([]byte("?"), 1350)); err != nil && !errors.Is(err, unix.EMSGSIZE) {
					p.Fatal(err)
				}
				return pathMTU(p, conn) == 1300
			})
			transfer(p, client, netip.MustParseAddrPort("[fd00:10:128::98]:80"))
		}
		seen := 0
		for _, f := range syns.Frames() {
			const tcp, options = 14 + 40, 14 + 40 + 20
			if ip, ok := f.IPv6(); !ok || !f.Outgoing || ip.Protocol != unix.IPPROTO_TCP || len(f.Data) < options+4 || f.Data[tcp+13]&2 == 0 {
				continue
			}
			seen++
			if size := binary.BigEndian.Uint16(f.Data[options+2:]); f.Data[options] != 2 || size > 1300-60 {
				p.Errorf("a SYN leaves with the segment size %d, want 1240: %s", size, f)
			}
		}
		if seen < 2 {
			p.Errorf("%d SYNs left, want one of each client", seen)
		}
		// Servers learn the MTU of the cluster side.
		if err := h.LinkSetMTU(p.Link(h, "macvlan0"), 1500); err != nil {
			p.Fatal(err)
		}
		if err := h.LinkSetMTU(p.Link(h, "eth0"), 1320); err != nil {
			p.Fatal(err)
		}
		for _, client := range []*netns.Namespace{p.Lab.Client, p.Lab.Far} {
			server := serverOf(p, p.Dial(client, "udp", netip.MustParseAddrPort("[fd00:10:128::98]:5353")))
			p.Until("the server knows the MTU of the pod", func() bool {
				if _, err := server.Write(bytes.Repeat([]byte("!"), 1400)); err != nil && !errors.Is(err, unix.EMSGSIZE) {
					p.Fatal(err)
				}
				return pathMTU(p, server) == 1320
			})
			_ = server.Close()
		}
		wantSources6(p, syns, lab.Source6)
	})
}

// clientsOf adds addresses to the client, and returns them.
func clientsOf(p *labtest.Pod, n int) (clients []netip.Addr) {
	p.Helper()
	h := p.Handle(p.Lab.Client)
	eth := p.Link(h, lab.ClientLink)
	first := []netip.Addr{netip.MustParseAddr("10.128.1.1"), netip.MustParseAddr("fd00:10:128::1:1")}
	for _, a := range first {
		for range n {
			bits := map[bool]int{true: lab.Cluster.Bits(), false: lab.Cluster6.Bits()}[a.Is4()]
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}}
			if a.Is6() {
				addr.Flags = unix.IFA_F_NODAD
			}
			if err := h.AddrAdd(eth, addr); err != nil {
				p.Fatal(err)
			}
			clients = append(clients, a)
			a = a.Next()
		}
	}
	return clients
}

// sourceOf asks the pod by UDP from an address of the client, and returns the source that
// the server sees.
func sourceOf(p *labtest.Pod, client netip.Addr) netip.Addr {
	p.Helper()
	to := netip.AddrPortFrom(lab.RouterAddr, 53)
	if client.Is6() {
		to = netip.AddrPortFrom(lab.RouterAddr6, 53)
	}
	var seen netip.Addr
	p.Until(client.String()+" gets an answer", func() bool {
		var conn net.Conn
		if err := p.Lab.Client.Do(func() (err error) {
			conn, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(client, 0)), net.UDPAddrFromAddrPort(to))
			return err
		}); err != nil {
			if errors.Is(err, unix.EADDRNOTAVAIL) {
				return false // the address is new
			}
			p.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second)) // a datagram may be lost
		if _, err := conn.Write([]byte("?\n")); err != nil {
			p.Fatal(err)
		}
		a, err := lab.ReadAnswer(bufio.NewReader(conn))
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			p.Fatal(err)
		}
		seen = a.Peer.Addr()
		return err == nil
	})
	return seen
}

// Clients are spread over several sources of each family, and keep theirs while the
// sources stay. After a source is gone, no packet leaves with it, and the clients of the
// others keep their connections.
func TestSourcesAreShared(t *testing.T) {
	t.Parallel()
	const clients = 200
	list := dualList + "53 udp 203.0.113.25\n"
	sources := []netip.Addr{lab.Source}
	for _, s := range []string{"192.168.12.120", lab.Source6.String(), "192.168.12.101", "2001:db8:12::77", "2001:db8:12::1:5"} {
		sources = append(sources, netip.MustParseAddr(s))
	}
	results := make(chan string, 2*len(labtest.Backends)) // the source of each client, with both grammars
	t.Run("backends", func(t *testing.T) {
		labtest.EachBackend(t, lab.Options{IPv6: true}, func(p *labtest.Pod) {
			connectDual(p, list, sources...)
			var spread strings.Builder
			count, of := make(map[netip.Addr]int), make(map[netip.Addr]netip.Addr)
			all := clientsOf(p, clients)
			for _, c := range all {
				of[c] = sourceOf(p, c)
				count[of[c]]++
				fmt.Fprintln(&spread, c, of[c])
			}
			for _, s := range sources {
				if n := count[s]; n < clients/4 || n > clients*5/12 {
					p.Errorf("%d of %d clients have the source %s, want about a third", n, clients, s)
				}
			}
			for range 2 { // loads by which nothing changes, and other destinations
				p.Load(list, sources...)
				p.Load(list+fallback6, sources...)
				for _, c := range all {
					if got := sourceOf(p, c); got != of[c] {
						p.Errorf("client %s has the source %s, and had %s", c, got, of[c])
					}
				}
			}
			// Sockets of the pod have the first source, or one that they choose.
			wantDual(p, p.Lab.Router, "tcp", "203.0.113.25:80", "203.0.113.25:80", lab.Source)
			wantDual(p, p.Lab.Router, "tcp", "[2001:db8::25]:80", "[2001:db8::25]:80", lab.Source6)
			results <- spread.String()

			// The second source of each family is gone.
			gone := []netip.Addr{sources[1], sources[4]}
			kept, lost := make(map[bool]net.Conn), make(map[bool]net.Conn)
			for i := range clients {
				for _, c := range []netip.Addr{all[i], all[clients+i]} {
					into := kept
					if slices.Contains(gone, of[c]) {
						into = lost
					}
					if into[c.Is4()] == nil {
						into[c.Is4()] = dialFrom(p, c)
					}
				}
			}
			p.Load(list, slices.DeleteFunc(slices.Clone(sources), func(a netip.Addr) bool { return slices.Contains(gone, a) })...)
			// Until then the end of an earlier connection may leave with its source.
			out := captureOn(p, p.Lab.Router, "macvlan0")
			for four, conn := range kept {
				if _, err := lost[four].Write([]byte("lost\n")); err != nil {
					p.Fatal(err)
				}
				p.WantEcho("a connection with a source that stays", conn, bufio.NewReader(conn))
			}
			for _, f := range out.Frames() {
				ip, ok := f.IPv4()
				if !ok {
					ip, ok = f.IPv6()
				}
				if ok && f.Outgoing && slices.Contains(gone, ip.Src.Addr()) {
					p.Errorf("a packet with a source that is gone: %s", f)
				}
			}
			for i := range clients / 10 {
				for _, c := range []netip.Addr{all[i], all[clients+i]} {
					if got := sourceOf(p, c); slices.Contains(gone, got) || !slices.Contains(sources, got) {
						p.Errorf("client %s has the source %s", c, got)
					}
				}
			}
		})
	})
	close(results)
	first, ok := <-results
	if !ok {
		t.Fatal("no backend has a result")
	}
	for other := range results {
		if other != first {
			t.Error("the backends give clients other sources")
		}
	}
}

// dialFrom opens a TCP connection from an address of the client.
func dialFrom(p *labtest.Pod, client netip.Addr) net.Conn {
	p.Helper()
	var conn net.Conn
	to := lab.RouterAddr
	if client.Is6() {
		to = lab.RouterAddr6
	}
	if err := p.Lab.Client.Do(func() (err error) {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(client, 0)), Timeout: labtest.Patience}
		conn, err = d.DialContext(p.Context(), "tcp", netip.AddrPortFrom(to, 80).String())
		return err
	}); err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = conn.Close() })
	return conn
}
