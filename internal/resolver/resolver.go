// Package resolver looks names up as the system's resolver does (hosts(5),
// resolv.conf(5)), and tells what that one keeps to itself: how long an answer
// holds (RFC 1035 section 3.2.1, TTL).
//
// The standard library's resolver has no TTLs, so a program that has to follow
// the changes of a name could only ask again and again. Here an answer is kept
// for as long as its owner allows, and is asked for once however many want it.
package resolver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// For how long what was learned is kept.
const (
	// MinTTL is the shortest time that an answer is kept, also one with TTL 0.
	MinTTL = time.Second
	// MaxTTL is the longest.
	MaxTTL = 5 * time.Minute
	// MaxNegativeTTL bounds what RFC 2308 section 5 allows for the answer that
	// there is no such name or no such record: one that was just made should
	// be found soon.
	MaxNegativeTTL = 5 * time.Second
	// FailureTTL is how long name servers that did not answer for a name are
	// left alone with it (RFC 2308 section 7, RFC 9520).
	FailureTTL = time.Second
	// MaxStale is how long after its end an answer may still be given while the
	// name servers do not answer (RFC 8767 section 4: one to three days).
	MaxStale = 24 * time.Hour
)

const (
	// maxEntries is how many names are remembered, and how many addresses.
	maxEntries = 8192
	// maxQueries is how many queries are under way at once, each with a socket
	// of its own. A container may have no more than 1024 descriptors.
	maxQueries = 256
)

// What a look-up can fail with, for errors.Is.
var (
	// ErrNoName says that there is no such name, or that an address has none.
	ErrNoName = errors.New("no such name")
	// ErrNoAddress says that the name is there, and has no address.
	ErrNoAddress = errors.New("no address records")
	// ErrNoAnswer says that no name server gave an answer to rely on.
	ErrNoAnswer = errors.New("no answer from the name servers")
)

// An Error says why a look-up has no result.
type Error struct {
	Name  string // that was looked up
	Err   error  // ErrNoName, ErrNoAddress or ErrNoAnswer
	Cause error  // of ErrNoAnswer: what happened to the last query; may be nil
}

// Error names what was looked up, and what came of it.
func (e *Error) Error() string {
	if e.Cause != nil {
		return fmt.Sprintf("looking up %q: %v: %v", e.Name, e.Err, e.Cause)
	}
	return fmt.Sprintf("looking up %q: %v", e.Name, e.Err)
}

// Unwrap returns what the error is, and its cause.
func (e *Error) Unwrap() []error { return []error{e.Err, e.Cause} }

// As makes the error a *net.DNSError for those who know the standard library's
// resolver: its Err says what came of the look-up, without the name.
func (e *Error) As(target any) bool {
	to, ok := target.(**net.DNSError)
	if !ok {
		return false
	}
	reason := e.Err.Error()
	if e.Cause != nil {
		reason += ": " + e.Cause.Error()
	}
	timeout, isNet := errors.AsType[net.Error](e.Cause)
	*to = &net.DNSError{
		UnwrapErr: e, Err: reason, Name: e.Name, IsNotFound: e.NotFound(),
		IsTimeout: isNet && timeout.Timeout(),
	}
	return true
}

// NotFound reports whether the answer is that there is nothing, other than that
// nobody answered.
func (e *Error) NotFound() bool { return !errors.Is(e.Err, ErrNoAnswer) }

// Options are the files to read, for tests. The zero value is the system's.
type Options struct {
	Hosts      string // in place of /etc/hosts
	ResolvConf string // in place of /etc/resolv.conf
}

// A Resolver looks names up. Its methods may be called from any goroutine. It
// needs no closing.
type Resolver struct {
	hosts   *file[hosts]
	conf    *file[*conf]
	addrs   *cache[string, []netip.Addr]
	names   *cache[netip.Addr, []string]
	queries chan struct{}        // one element for each query under way
	used    atomic.Pointer[conf] // what the cached answers were asked with
	turn    atomic.Uint32        // server to begin with, under the option rotate
}

// New returns a Resolver. The files are read when they are needed.
func New(o Options) *Resolver {
	return &Resolver{
		hosts:   &file[hosts]{name: cmp.Or(o.Hosts, "/etc/hosts"), parse: parseHosts},
		conf:    &file[*conf]{name: cmp.Or(o.ResolvConf, "/etc/resolv.conf"), parse: parseConf},
		addrs:   newCache[string, []netip.Addr](maxEntries),
		names:   newCache[netip.Addr, []string](maxEntries),
		queries: make(chan struct{}, maxQueries),
	}
}

// An Answer is what a name stands for.
type Answer struct {
	Addrs   []netip.Addr // IPv4 first, otherwise in the order of the answer
	Expires time.Time    // when to ask again; past for an old answer
}

// LookupAddr returns the addresses of a host, IPv4 first. It never returns old
// ones.
func (r *Resolver) LookupAddr(ctx context.Context, host string) ([]netip.Addr, error) {
	a, err := r.Lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	return a.Addrs, nil
}

// Lookup returns the addresses of a host and how long they hold. An address is
// its own answer.
//
// Where the name servers do not answer (ErrNoAnswer), or the context ends before
// they do, an answer of before comes with the error if there is one (RFC 8767):
// the caller decides whether an old address is better than none. The look-up
// itself goes on when the context ends, for those who ask next.
func (r *Resolver) Lookup(ctx context.Context, host string) (Answer, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return Answer{[]netip.Addr{a.Unmap()}, time.Now().Add(MaxTTL)}, nil
	}
	name, ok := normal(host)
	if !ok {
		return Answer{}, &Error{Name: host, Err: ErrNoName}
	}
	if found := r.hosts.get().addrs[strings.TrimSuffix(name, ".")]; len(found) > 0 {
		return Answer{slices.Clone(found), time.Now().Add(checkEvery)}, nil
	}
	conf := r.current()
	addrs, expires, err := r.addrs.get(ctx, name, func(ctx context.Context) ([]netip.Addr, time.Duration, error) {
		return r.search(ctx, conf, name)
	})
	return Answer{slices.Clone(addrs), expires}, err
}

// LookupNames returns the names of an address, without their final dots. Names
// of the hosts file come before those of the DNS (PTR, RFC 1035 section 3.5).
func (r *Resolver) LookupNames(ctx context.Context, a netip.Addr) ([]string, error) {
	a = a.Unmap().WithZone("")
	if found := r.hosts.get().names[a]; len(found) > 0 {
		return slices.Clone(found), nil
	}
	conf := r.current()
	names, _, err := r.names.get(ctx, a, func(ctx context.Context) ([]string, time.Duration, error) {
		reverse, err := dns.ReverseAddr(a.String())
		if err != nil {
			return nil, MaxNegativeTTL, &Error{Name: a.String(), Err: ErrNoName}
		}
		found := r.chase(ctx, conf, reverse, dns.TypePTR)
		if errors.Is(found.err, ErrNoAddress) {
			found.err = ErrNoName
		}
		if found.err != nil {
			return nil, found.ttl, &Error{a.String(), found.err, found.cause}
		}
		var names []string
		for _, rr := range found.records {
			if ptr, ok := rr.(*dns.PTR); ok {
				names = append(names, strings.TrimSuffix(ptr.Ptr, "."))
			}
		}
		return names, found.ttl, nil
	})
	if err != nil {
		return nil, err
	}
	return slices.Clone(names), nil
}

// current returns the configuration. Answers that were asked for with another
// one are to be asked for again.
func (r *Resolver) current() *conf {
	c := r.conf.get()
	if was := r.used.Swap(c); was != nil && was != c {
		r.addrs.expire()
		r.names.expire()
	}
	return c
}

// normal returns a name in lower case, since letter case does not count
// (RFC 4343), or false for what cannot be a name.
func normal(host string) (string, bool) {
	for i := range len(host) {
		if c := host[i]; c <= ' ' || c >= 0x7f || c == '\\' {
			return "", false // no presentation form of DNS either (RFC 1035 section 5.1)
		}
	}
	_, ok := dns.IsDomainName(host)
	return strings.ToLower(host), ok && host != "" && host != "."
}

// search tries a name as it is and below the domains of the search list, in the
// order of resolv.conf(5), and returns the first addresses found.
func (r *Resolver) search(ctx context.Context, c *conf, name string) ([]netip.Addr, time.Duration, error) {
	failed := result{err: ErrNoName, ttl: MaxNegativeTTL}
	for i, candidate := range c.candidates(name) {
		found := r.address(ctx, c, candidate.name)
		if found.err == nil {
			return addresses(found.records), found.ttl, nil
		}
		// A fully given name is not looked for below other domains unless it is
		// known not to be there (RFC 1535): that may be another host.
		if errors.Is(found.err, ErrNoAnswer) && (candidate.asIs || !found.answered) {
			return nil, found.ttl, &Error{name, found.err, found.cause}
		}
		failed = worse(failed, found, i == 0)
	}
	return nil, failed.ttl, &Error{name, failed.err, failed.cause}
}

// worse returns what to say of two failures: that there was no answer, or else
// that there was no address, or else that there is no such name.
func worse(a, b result, first bool) result {
	if first {
		return b
	}
	rank := func(e error) int { return slices.Index([]error{ErrNoName, ErrNoAddress, ErrNoAnswer}, e) }
	ttl := min(a.ttl, b.ttl)
	if rank(b.err) > rank(a.err) {
		a = b
	}
	a.ttl = ttl
	return a
}

// patience is how long AAAA records are waited for once there are A records:
// some firewalls and balancers answer the former never, or wrongly (RFC 4074).
const patience = time.Second

// address asks for both kinds of addresses at once.
func (r *Resolver) address(ctx context.Context, c *conf, name string) result {
	six := make(chan result, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { six <- r.chase(ctx, c, name, dns.TypeAAAA) }()
	v4 := r.chase(ctx, c, name, dns.TypeA)
	if errors.Is(v4.err, ErrNoAnswer) || errors.Is(v4.err, ErrNoName) {
		// What leaves by the egress side is IPv4: other addresses alone would
		// hide that these are not known. And a name that is not there has
		// records of no type (RFC 8020).
		return v4
	}
	var late <-chan time.Time
	if v4.err == nil {
		timer := time.NewTimer(patience)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-late:
		return v4
	case v6 := <-six:
		switch {
		case v4.err == nil && v6.err == nil:
			return result{records: slices.Concat(v4.records, v6.records), ttl: min(v4.ttl, v6.ttl)}
		case v4.err == nil:
			return v4
		case v6.err == nil:
			return v6
		}
		return worse(v4, v6, false)
	}
}

// addresses returns those of A and AAAA records, each once.
func addresses(records []dns.RR) []netip.Addr {
	var addrs []netip.Addr
	for _, rr := range records {
		var a netip.Addr
		switch rr := rr.(type) {
		case *dns.A:
			a, _ = netip.AddrFromSlice(rr.A)
		case *dns.AAAA:
			a, _ = netip.AddrFromSlice(rr.AAAA)
		}
		if a = a.Unmap(); a.IsValid() && !slices.Contains(addrs, a) {
			addrs = append(addrs, a)
		}
	}
	slices.SortStableFunc(addrs, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	return addrs
}
