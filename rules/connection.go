package rules

import (
	"net/netip"
	"slices"
)

// A Connection is one that the kernel tracks (conntrack): a TCP connection, or
// packets of another protocol that belong together.
type Connection struct {
	Protocol Protocol
	From     netip.Addr     // that its first packet came from
	To       netip.AddrPort // that it was sent to
	// Replies come from here, which is where the connection was redirected
	// to, and go there, which is the source that the server sees. Without
	// redirect and source rule these are To and the client.
	RepliesFrom netip.AddrPort
	RepliesTo   netip.Addr
}

// Stale returns what tells whether a connection is treated otherwise than a new
// one would be. The kernel chooses redirect and source with the first packet and
// keeps to them: a UDP client that never pauses would stay at a server that is
// not wanted any more, and one that was there before the rules would never be
// redirected.
//
// The connections in question are those to one of the pod's addresses on the
// cluster side, and those of somebody else through the pod that are redirected: the original
// redirects them too.
func (p Plan) Stale(pod []netip.Addr) func(Connection) bool {
	type local struct {
		protocol Protocol
		port     Port
	}
	redirects := make(map[local]Redirect, len(p.Redirects))
	for _, r := range p.Redirects {
		redirects[local{r.Protocol, r.Port}] = r
	}
	fallback, source := p.fallback(), p.source()
	return func(c Connection) bool {
		// A socket of the pod is redirected by somebody else, if at all, and
		// has the right source from the start.
		through := c.RepliesFrom != c.To && c.RepliesTo != c.From
		own := c.From == source || slices.Contains(pod, c.From)
		if !slices.Contains(pod, c.To.Addr()) && (!through || own) {
			return false
		}
		r, redirected := redirects[local{c.Protocol, Port(c.To.Port())}]
		if !redirected {
			r.To, redirected = fallback, fallback.IsValid()
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
