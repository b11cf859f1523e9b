package lab

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/netns"
)

// RoutePlainly makes the router's namespace a plain router between client and Remote,
// without rules, as the reference of benchmarks: a client connects to the address of a
// server, and the server sees the address of the client.
func (l *Lab) RoutePlainly() error {
	h, err := l.Netlink(l.Router)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := addAddr(h, l.MacvlanName, netip.PrefixFrom(Source, LAN.Bits())); err != nil {
		return err
	}
	if err := setUp(h, l.MacvlanName); err != nil {
		return err
	}
	if err := awaitUp(h, l.MacvlanName); err != nil {
		return err
	}
	for _, remote := range Remote {
		if err := l.addRoute(l.Client, ClientLink, remote, RouterAddr); err != nil {
			return err
		}
		if err := l.addRoute(l.Router, l.MacvlanName, remote, GatewayAddr); err != nil {
			return err
		}
	}
	if err := l.addRoute(l.Outside, LANLink, ClientAddr, Source); err != nil {
		return err
	}
	return l.SetSysctl(l.Router, "net/ipv4/ip_forward", "1")
}

// addRoute adds a route to one address.
func (l *Lab) addRoute(ns *netns.Namespace, name string, to, via netip.Addr) error {
	h, err := l.Netlink(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding link %q: %w", name, err)
	}
	route := &netlink.Route{
		LinkIndex: link.Attrs().Index,
		Dst:       &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())},
		Gw:        via.AsSlice(),
	}
	if err := h.RouteAdd(route); err != nil {
		return fmt.Errorf("adding a route to %q via %q on link %q: %w", to, via, name, err)
	}
	return nil
}
