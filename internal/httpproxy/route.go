package httpproxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// A Resolver looks up addresses and names. Its answers may be cached. A *net.DNSError
// distinguishes a name that does not exist from a server that does not answer. The
// look-ups of one client must not delay those of others.
type Resolver interface {
	// LookupAddr returns every IPv4 and IPv6 address of a host, IPv4 first, and the
	// name that has them, which is one of FullNames.
	LookupAddr(ctx context.Context, client netip.Addr, host string) (addrs []netip.Addr, full string, err error)
	// FullNames returns the names as which a host may be looked up, at least one: by
	// the search list, unless the host ends with a dot. They have no final dots.
	FullNames(host string) []string
	// LookupNames returns the names of an address by reverse look-up.
	LookupNames(ctx context.Context, client, a netip.Addr) ([]string, error)
}

// reverseTimeout is how long a decision waits for the names of an address. After that
// the address counts as one without a name for a minute: the servers of many private
// ranges never answer.
const reverseTimeout = 2 * time.Second

// A route is a target with its allowed addresses.
type route struct {
	target  target
	full    string       // the name that has the target's addresses
	addrs   []netip.Addr // in the resolver's order, of one family
	verdict Verdict      // on the first of addrs, or why there is none
	aside   netip.Addr   // an allowed IPv6 address that is not dialled; the zero Addr: none
}

// route resolves the target of an exchange and sets its allowed addresses. Only these are dialled
// later, so that the rules have been evaluated on them: a name is resolved once per
// request. Beside a refusal the route is complete as far as it is known.
func (p *Proxy) route(x *exchange) *refusal {
	set := p.rules.Load()
	refused := p.routeBy(x, set.Rules)
	if n := x.route.verdict.Rule.Number; n > 0 || refused != nil && refused.status == http.StatusForbidden {
		set.hits[n].Add(1)
	}
	return refused
}

func (p *Proxy) routeBy(x *exchange, list Rules) *refusal {
	r, t := &x.route, x.route.target
	if t.host.Name == "" {
		return p.choose(x, list, []netip.Addr{t.host.Addr})
	}
	name := t.host.Name
	if t.host.Absolute {
		name += "."
	}
	if v, decided := list.DecideName(t.host.Name, p.resolver.FullNames(name)); decided {
		r.verdict = v
		return denied(r, netip.Addr{})
	}
	ctx := x.life.context()
	lookup, cancel := context.WithTimeout(ctx, p.config.ConnectTimeout)
	defer cancel()
	addrs, full, err := p.resolver.LookupAddr(lookup, x.client.from, name)
	if err == nil && len(addrs) == 0 {
		err = &net.DNSError{Err: "no address records", Name: t.host.Name, IsNotFound: true}
	}
	p.counters.lookups.Add(1)
	if ctx.Err() == nil { // the client has waited
		p.silence.saw(err)
	}
	if err != nil {
		p.counters.lookupFailures.Add(1)
		// The other rules decide without an address: a client must not find out
		// whether a denied name exists. The search list has completed nothing, and
		// a name that it might have completed is not denied for that.
		if r.verdict = list.Decide(Destination{Host: t.host}); !r.verdict.Allow {
			return denied(r, netip.Addr{})
		}
		return unresolved(t, err)
	}
	r.full = full
	return p.choose(x, list, addrs)
}

// choose adds the allowed addresses to a route. If a name has an IPv4 address, allowed
// or not, its IPv6 addresses are not used: the reserved address is an IPv4 address, and
// the source address must not depend on the reachability of a server.
func (p *Proxy) choose(x *exchange, list Rules, addrs []netip.Addr) *refusal {
	r := &x.route
	var first Verdict // on an address that is denied
	// The first rule that matches any of the addresses denies all of them, or allows
	// those that are allowed alone, as with the original.
	var decisive Verdict
	var at netip.Addr
	ipv4 := slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Unmap().Is4() })
	for i, a := range addrs {
		a = a.Unmap()
		local, err := p.local(a)
		if err != nil {
			return failed(err)
		}
		if l := p.listener.Load(); local && l != nil && l.Addr().(*net.TCPAddr).Port == int(r.target.port) {
			return &refusal{http.StatusForbidden, r.target.String() + " is this proxy itself"}
		}
		d := Destination{Host: r.target.host, Full: r.full, Addr: a, Local: local}
		if r.target.host.Name == "" && list.haveNames() {
			d.Names = sync.OnceValue(func() []string { return p.verifiedNames(x.life.context(), x.client.from, list, a) })
		}
		v := list.Decide(d)
		if n := v.Rule.Number; n > 0 && (n < decisive.Rule.Number || decisive.Rule.Number == 0) && (!ipv4 || a.Is4() || !v.Rule.deniesFamily()) {
			decisive, at = v, a
		}
		switch {
		case !v.Allow && i == 0:
			first = v
		case v.Allow && ipv4 && a.Is6():
			r.aside = a
		case v.Allow && !slices.Contains(r.addrs, a):
			if len(r.addrs) == 0 {
				r.verdict = v
			}
			r.addrs = append(r.addrs, a)
		}
	}
	if decisive.Rule.Number > 0 && !decisive.Allow {
		r.addrs, r.verdict = r.addrs[:0], decisive
		return denied(r, at)
	}
	if len(r.addrs) == 0 {
		r.verdict = first
		return denied(r, addrs[0].Unmap())
	}
	return nil
}

// local reports whether an address is a local one, which no name may resolve to, or
// stands for one.
func (p *Proxy) local(a netip.Addr) (bool, error) {
	if isLocal(a) {
		return true, nil
	}
	for _, inside := range embedded(a) {
		if local, err := p.local(inside); local || err != nil {
			return local, err
		}
	}
	return p.own(a)
}

// verifiedNames returns the names of an address that a rule matches and that resolve to
// it. After an error or a timeout there is none.
func (p *Proxy) verifiedNames(ctx context.Context, client netip.Addr, list Rules, a netip.Addr) []string {
	if p.unnamed.has(a) {
		return nil
	}
	life := ctx
	ctx, cancel := context.WithTimeout(ctx, min(reverseTimeout, p.config.ConnectTimeout))
	defer cancel()
	names, err := p.resolver.LookupNames(ctx, client, a)
	if err != nil {
		p.log.Debug("reverse lookup failed", "address", a, "error", err)
		if isTimeout(err) && life.Err() == nil && !overloaded(err) {
			p.unnamed.add(a)
		}
		return nil
	}
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		if !list.nameRule(name) {
			return true
		}
		addrs, _, err := p.resolver.LookupAddr(ctx, client, strings.TrimSuffix(name, ".")+".") // no search list
		return err != nil || !slices.ContainsFunc(addrs, func(b netip.Addr) bool { return b.Unmap() == a })
	})
}

// overloaded reports whether a look-up has ended in favour of others of its client, so
// that its failure holds for no other client.
func overloaded(err error) bool {
	_, is := errors.AsType[interface {
		error
		Overloaded() bool
	}](err)
	return is
}

// A serverKey distinguishes servers: only requests with the same name, the same allowed
// addresses, the same port and the same protocol may share a connection.
type serverKey struct {
	scheme, name string
	addr         netip.Addr // the first one
	others       string
	port         uint16
}

func (r *route) serverKey(scheme string) serverKey {
	sorted := r.addrs
	if len(sorted) > 1 {
		sorted = slices.SortedFunc(slices.Values(sorted), netip.Addr.Compare)
	}
	k := serverKey{scheme: scheme, name: r.target.host.Name, addr: sorted[0], port: r.target.port}
	var others strings.Builder
	for _, a := range sorted[1:] {
		others.WriteString(a.String())
		others.WriteByte(' ')
	}
	k.others = others.String()
	return k
}
