package rules

import "net/netip"

// A Connection is one that the kernel tracks (conntrack): a TCP connection, or
// packets of another protocol that belong together.
type Connection struct {
	Protocol Protocol
	To       netip.AddrPort // that its first packet was sent to
	// Replies come from here, which is where the connection was redirected
	// to, and go there, which is the source that the server sees. Without
	// redirect and source rule these are To and the client.
	RepliesFrom netip.AddrPort
	RepliesTo   netip.Addr
}

// Stale returns what tells whether a connection to one of the pod's addresses
// on the cluster side is treated otherwise than a new one would be. The kernel
// chooses redirect and source with the first packet and keeps to them: a UDP
// client that never pauses would stay at a server that is not wanted any more,
// and one that was there before the rules would never be redirected.
func (p Plan) Stale(pod []netip.Addr) func(Connection) bool {
	type local struct {
		protocol Protocol
		port     Port
	}
	redirects := make(map[local]Rule)
	var source netip.Addr
	for _, c := range p.Chains {
		for _, r := range c.Rules {
			switch r.Target {
			case DNAT:
				redirects[local{r.Protocol, r.Port}] = r
			case SNAT:
				source = r.To
			}
		}
	}
	own := make(map[netip.Addr]bool)
	for _, a := range pod {
		own[a] = true
	}
	return func(c Connection) bool {
		if !own[c.To.Addr()] {
			return false
		}
		r, redirected := redirects[local{c.Protocol, Port(c.To.Port())}]
		if !redirected {
			r, redirected = redirects[local{}] // the fallback
		}
		if !redirected {
			return c.RepliesFrom != c.To
		}
		port := c.To.Port()
		if r.ToPort != 0 {
			port = uint16(r.ToPort)
		}
		return c.RepliesFrom != netip.AddrPortFrom(r.To, port) || c.RepliesTo != source
	}
}
