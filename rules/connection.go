package rules

import (
	"net/netip"
	"slices"
)

// A Connection is an entry of the kernel's connection table (conntrack): a TCP
// connection, or a packet flow of another protocol.
type Connection struct {
	Protocol Protocol
	From     netip.Addr     // client, the source of the first packet
	To       netip.AddrPort // original destination
	// The addresses of replies: their source is the server of the redirect, their
	// destination is the source that the server sees. Without redirect and SNAT
	// these are To and From.
	RepliesFrom netip.AddrPort
	RepliesTo   netip.Addr
}

// Stale returns a function that reports whether a connection has another
// redirect or source than a new one would get. The kernel chooses both with the
// first packet and keeps them: a UDP client that never pauses would stay at its
// old server, and a connection from before the rules would never be redirected.
//
// Stale connections are those to one of the pod's addresses on the cluster side,
// and redirected ones of other hosts through the pod, which the original redirects
// too.
func (p Plan) Stale(pod []netip.Addr) func(Connection) bool {
	lookup := NewLookup(p.Redirects)
	fallbacks, sources := make(map[Family][]netip.Addr), make(map[Family][]netip.Addr)
	for _, f := range []Family{IPv4, IPv6} {
		fallbacks[f], sources[f] = p.to(f, DNAT), p.to(f, SNAT)
	}
	return func(c Connection) bool {
		family := FamilyOf(c.To.Addr())
		var fallback netip.Addr
		if to := fallbacks[family]; len(to) > 0 {
			fallback = to[0]
		}
		// With several sources, a client keeps the one that it has.
		source := slices.Contains(sources[family], c.RepliesTo)
		// The pod's own sockets have the right source from the start. If they are
		// redirected, it is by another program.
		through := c.RepliesFrom != c.To && c.RepliesTo != c.From
		own := slices.Contains(sources[family], c.From) || slices.Contains(pod, c.From)
		if !slices.Contains(pod, c.To.Addr()) && (!through || own) {
			return false
		}
		local := Port(c.To.Port())
		if i, redirected := lookup.Find(family, c.Protocol, local); redirected {
			return !p.Redirects[i].keeps(c.RepliesFrom, local) || !source
		}
		if i, named := lookup.Find(0, c.Protocol, local); named { // without an address: refused
			stays := p.Redirects[i].keeps(c.RepliesFrom, local) && c.RepliesFrom.Addr() != fallback && source
			return c.RepliesFrom != c.To && !stays
		}
		if !fallback.IsValid() || p.returns(family, c.Protocol, local) {
			return c.RepliesFrom != c.To
		}
		return c.RepliesFrom != netip.AddrPortFrom(fallback, uint16(local)) || !source
	}
}

// returns reports whether the fallback does not redirect a port, as those of the pod's own
// services.
func (p Plan) returns(f Family, protocol Protocol, port Port) bool {
	return slices.ContainsFunc(p.Chains, func(c Chain) bool {
		return c.Family == f && c.Table == NAT && c.Hook == Prerouting && slices.ContainsFunc(c.Rules, func(r Rule) bool {
			return r.Target == Return && r.Protocol == protocol && r.Port != 0 && r.Port <= port && port <= max(r.Port, r.Last)
		})
	})
}
