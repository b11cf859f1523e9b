// Package resolver looks up names like the system's resolver (hosts(5),
// resolv.conf(5)), and also returns how long an answer is valid (RFC 1035 section
// 3.2.1, TTL).
//
// The standard library's resolver returns no TTL, so a program that follows the
// changes of a name would have to poll it. This resolver caches an answer for its TTL,
// and concurrent callers share one query.
package resolver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/miekg/dns"
)

// How long results are kept.
const (
	// MinTTL is the shortest time, also for a TTL of 0.
	MinTTL = time.Second
	// MaxTTL is the longest time.
	MaxTTL = 5 * time.Minute
	// MaxNegativeTTL is the longest time for the answer that a name or a record
	// does not exist (RFC 2308 section 5), so that a new one is found soon.
	MaxNegativeTTL = 5 * time.Second
	// FailureTTL is the time for a look-up without an answer, in which it is not
	// repeated (RFC 2308 section 7, RFC 9520).
	FailureTTL = time.Second
	// MaxStale is the time after its expiry in which an answer is still returned
	// if the name servers do not answer (RFC 8767 section 4: one to three days).
	MaxStale = 24 * time.Hour
)

const (
	// maxEntries is the maximum number of cached names, and of cached addresses.
	maxEntries = 4096
	// maxAddrs is the maximum number of addresses of a name that are used.
	maxAddrs = 256
	// maxNames is the maximum number of names of an address that are used. The HTTP
	// proxy looks up each of them.
	maxNames = 8
	// warnEvery is the shortest interval of warnings about such answers, which
	// clients may request.
	warnEvery = time.Minute
)

// The errors of a look-up, for errors.Is.
var (
	// ErrNoName means that a name does not exist, or that an address has no name.
	ErrNoName = errors.New("no such name")
	// ErrNoAddress means that a name exists and has no address.
	ErrNoAddress = errors.New("no address records")
	// ErrNoAnswer means that no name server gave a usable answer.
	ErrNoAnswer = errors.New("no answer from the name servers")
)

// An Error is the error of a look-up.
type Error struct {
	Name  string // name of the look-up
	Err   error  // ErrNoName, ErrNoAddress or ErrNoAnswer
	Cause error  // with ErrNoAnswer, the error of the last query; may be nil
}

// Error returns the name and the reason.
func (e *Error) Error() string {
	if e.Cause != nil {
		return fmt.Sprintf("looking up %q: %v: %v", e.Name, e.Err, e.Cause)
	}
	return fmt.Sprintf("looking up %q: %v", e.Name, e.Err)
}

// Unwrap returns the kind of the error and its cause.
func (e *Error) Unwrap() []error { return []error{e.Err, e.Cause} }

// As converts the error to a *net.DNSError, the error of the standard library's
// resolver. Its Err is the reason without the name.
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

// NotFound reports whether the name servers answered that the name or its addresses do
// not exist.
func (e *Error) NotFound() bool { return !errors.Is(e.Err, ErrNoAnswer) }

// Options are the options of a Resolver. The zero value means the system's files and no
// log.
type Options struct {
	Hosts      string       // in place of /etc/hosts, for tests
	ResolvConf string       // in place of /etc/resolv.conf, for tests
	Log        *slog.Logger // may be nil
	// EitherFamily makes IPv6 addresses an answer while the IPv4 ones are unknown, for a
	// caller that reaches both: one that reaches IPv4 alone would take them for all. An answer
	// that lacks a family is kept for MaxNegativeTTL at most, so that the rest comes soon.
	EitherFamily bool
}

// A Resolver looks up names. Its methods may be called from any goroutine. It need not
// be closed.
type Resolver struct {
	log    *slog.Logger
	warned atomic.Int64 // time of the last warning, in nanoseconds since 1970
	hosts  *file[hosts]
	conf   *file[*conf]
	addrs  *cache[string, Answer]
	names  *cache[netip.Addr, []string]
	edns   ednsMap
	slots  *slots               // of queries in progress
	either bool                 // EitherFamily
	used   atomic.Pointer[conf] // the configuration of the cached answers
	turn   atomic.Uint32        // index of the first server, with the option rotate
}

// New returns a Resolver. It reads the files when they are first needed.
func New(o Options) *Resolver {
	slots := newSlots()
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Resolver{
		log:   o.Log,
		hosts: &file[hosts]{name: cmp.Or(o.Hosts, "/etc/hosts"), parse: parseHosts},
		conf:  &file[*conf]{name: cmp.Or(o.ResolvConf, "/etc/resolv.conf"), parse: parseConf},
		addrs: newCache[string](maxEntries, Answer.size, slots),
		names: newCache[netip.Addr](maxEntries, sizeOfNames, slots),
		slots: slots, either: o.EitherFamily,
		edns: ednsMap{with: map[string]time.Time{}, without: map[string]time.Time{}},
	}
}

// An Answer is the result of a look-up.
type Answer struct {
	Addrs   []netip.Addr // IPv4 first, otherwise in the order of the answer
	Name    string       // name that has the addresses, perhaps of the search list; lower case, no final dot
	Expires time.Time    // in the past for an old answer
	// The AAAA records are unknown: no name server answered for them in time. There may be
	// some. OnlyIPv6 is the same of the A records, with EitherFamily alone.
	OnlyIPv4, OnlyIPv6 bool
}

// size returns the size of an answer in bytes.
func (a Answer) size() int { return len(a.Name) + len(a.Addrs)*int(unsafe.Sizeof(netip.Addr{})) }

func sizeOfNames(names []string) (n int) {
	for _, name := range names {
		n += len(name) + int(unsafe.Sizeof(name))
	}
	return n
}

// LookupAddr returns the addresses of a host, IPv4 first, and the name that has them,
// one of FullNames. It never returns an old answer. Look-ups of one client do not delay
// those of others; client is the zero Addr for the program itself.
func (r *Resolver) LookupAddr(ctx context.Context, client netip.Addr, host string) ([]netip.Addr, string, error) {
	a, err := r.Lookup(ctx, client, host)
	if err != nil {
		return nil, "", err
	}
	return a.Addrs, a.Name, nil
}

// FullNames returns the names of which a look-up of a host may return the addresses: the
// name itself and those below the domains of the search list, in lower case and without
// their final dots. It sends no query.
func (r *Resolver) FullNames(host string) []string {
	name, ok := normal(host)
	bare := strings.TrimSuffix(name, ".")
	if !ok || len(r.hosts.get().addrs[bare]) > 0 {
		return []string{bare}
	}
	candidates := r.conf.get().candidates(name)
	full := make([]string, len(candidates))
	for i, c := range candidates {
		full[i] = strings.TrimSuffix(c.name, ".")
	}
	return full
}

// Lookup returns the addresses of a host and when they expire. The answer for an
// address is that address.
//
// If the name servers do not answer (ErrNoAnswer), or the context ends before, Lookup
// returns the previous answer, if there is one, beside the error (RFC 8767): the
// caller decides whether to use it. A look-up ends with the last context of those that
// wait for it. client is that of LookupAddr.
func (r *Resolver) Lookup(ctx context.Context, client netip.Addr, host string) (Answer, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return Answer{Addrs: []netip.Addr{a.Unmap()}, Name: a.Unmap().String(), Expires: time.Now().Add(MaxTTL)}, nil
	}
	name, ok := normal(host)
	if !ok {
		return Answer{}, &Error{Name: host, Err: ErrNoName}
	}
	bare := strings.TrimSuffix(name, ".")
	if found := r.hosts.get().addrs[bare]; len(found) > 0 {
		return Answer{Addrs: slices.Clone(found), Name: bare, Expires: time.Now().Add(checkEvery)}, nil
	}
	conf := r.current()
	answer, expires, err := r.addrs.get(ctx, client, name, func(ctx context.Context) (Answer, time.Duration, error) {
		return r.search(ctx, conf, name)
	})
	answer.Addrs, answer.Expires = slices.Clone(answer.Addrs), expires
	return answer, err
}

// LookupNames returns the names of an address, without their final dots: those in the
// hosts file, or else those in the DNS (PTR, RFC 1035 section 3.5). client is that of
// LookupAddr.
func (r *Resolver) LookupNames(ctx context.Context, client, a netip.Addr) ([]string, error) {
	a = a.Unmap().WithZone("")
	if found := r.hosts.get().names[a]; len(found) > 0 {
		return slices.Clone(found), nil
	}
	conf := r.current()
	names, _, err := r.names.get(ctx, client, a, func(ctx context.Context) ([]string, time.Duration, error) {
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
		return limited(r, a, names, maxNames), found.ttl, nil
	})
	if err != nil {
		return nil, err
	}
	return slices.Clone(names), nil
}

// current returns the configuration. After a change all cached answers expire.
func (r *Resolver) current() *conf {
	c := r.conf.get()
	if was := r.used.Swap(c); was != nil && was != c {
		r.addrs.expire()
		r.names.expire()
	}
	return c
}

// normal returns a name in lower case, since names are case-insensitive (RFC 4343), or
// false for an invalid name.
func normal(host string) (string, bool) {
	for i := range len(host) {
		if c := host[i]; c <= ' ' || c >= 0x7f || c == '\\' {
			return "", false // also no escapes (RFC 1035 section 5.1)
		}
	}
	_, ok := dns.IsDomainName(host)
	return strings.ToLower(host), ok && host != "" && host != "."
}

// search tries a name as it is and below the domains of the search list, in the order
// of candidates, and returns the addresses of the first that has any.
func (r *Resolver) search(ctx context.Context, c *conf, name string) (Answer, time.Duration, error) {
	failed := result{err: ErrNoName, ttl: MaxNegativeTTL}
	for i, candidate := range c.candidates(name) {
		found := r.address(ctx, c, candidate.name)
		if found.err == nil {
			if r.either && (found.onlyIPv4 || found.onlyIPv6) {
				found.ttl = min(found.ttl, MaxNegativeTTL)
			}
			return Answer{Addrs: limited(r, candidate.name, addresses(found.records), maxAddrs), Name: strings.TrimSuffix(candidate.name, "."), OnlyIPv4: found.onlyIPv4, OnlyIPv6: found.onlyIPv6}, found.ttl, nil
		}
		// A full name is searched below other domains only if it is known not to
		// exist (RFC 1535): it could be another host there.
		if errors.Is(found.err, ErrNoAnswer) && (candidate.asIs || !found.answered) {
			return Answer{}, found.ttl, &Error{name, found.err, found.cause}
		}
		failed = worse(failed, found, i == 0)
	}
	return Answer{}, failed.ttl, &Error{name, failed.err, failed.cause}
}

// limited returns the first of the records of a name or address, with a warning if there
// are too many.
func limited[T any](r *Resolver, of any, records []T, most int) []T {
	if len(records) <= most {
		return records
	}
	now, last := time.Now().UnixNano(), r.warned.Load()
	if now-last > int64(warnEvery) && r.warned.CompareAndSwap(last, now) {
		r.log.Warn("too many records", "name", of, "used", most)
	}
	return slices.Clone(records[:most])
}

// worse combines two failures into one: ErrNoAnswer before ErrNoAddress before
// ErrNoName, with the smaller TTL.
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

// patience is how long a look-up with A records waits for the AAAA records: some
// firewalls and load balancers never answer such queries, or wrongly (RFC 4074).
const patience = time.Second

// address queries the A and AAAA records of a name concurrently.
func (r *Resolver) address(ctx context.Context, c *conf, name string) result {
	six := make(chan result, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { six <- r.chase(ctx, c, name, dns.TypeAAAA) }()
	v4 := r.chase(ctx, c, name, dns.TypeA)
	unknown := errors.Is(v4.err, ErrNoAnswer)
	if unknown && !r.either || errors.Is(v4.err, ErrNoName) {
		// IPv6 addresses alone would hide that the IPv4 ones are unknown. And a name that
		// does not exist has no records of any type (RFC 8020).
		return v4
	}
	var late <-chan time.Time
	if v4.err == nil || unknown {
		timer := time.NewTimer(patience)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-late:
		v4.onlyIPv4 = v4.err == nil
		return v4
	case v6 := <-six:
		switch {
		case v4.err == nil && v6.err == nil:
			return result{records: slices.Concat(v4.records, v6.records), ttl: min(v4.ttl, v6.ttl)}
		case v4.err == nil:
			v4.onlyIPv4 = errors.Is(v6.err, ErrNoAnswer)
			return v4
		case v6.err == nil:
			v6.onlyIPv6 = unknown
			return v6
		}
		return worse(v4, v6, false)
	}
}

// addresses returns the addresses of A and AAAA records without duplicates, IPv4
// first.
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
