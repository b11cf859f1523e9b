package resolver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// maxChain is the length limit of a chain of aliases, as in most resolvers.
const maxChain = 16

// A result is the outcome of a look-up of one record type of one name.
type result struct {
	records []dns.RR
	ttl     time.Duration // within its bounds
	err     error         // ErrNoName, ErrNoAddress or ErrNoAnswer
	cause   error         // cause of ErrNoAnswer

	onlyIPv4 bool // as in Answer, and the next one
	onlyIPv6 bool

	// answered is set with ErrNoAnswer if the servers answered with a failure: the
	// name may exist below another search domain.
	answered bool
}

// chase queries the records of one type and follows aliases (CNAME, RFC 1034 section
// 3.6.2). A recursive server follows them itself; another one is queried again for
// the alias's target. The TTL is the smallest of all records of the chain.
func (r *Resolver) chase(ctx context.Context, c *conf, name string, qtype uint16) result {
	least := MaxTTL
	for range maxChain {
		m, err := r.ask(ctx, c, name, qtype)
		if err != nil {
			refused := new(refusal)
			return result{err: ErrNoAnswer, cause: err, ttl: FailureTTL, answered: errors.As(err, &refused)}
		}
		end, records, ttl := walk(m, name, qtype)
		least = min(least, ttl)
		switch {
		case end == "":
			return tooMany(name)
		case len(records) > 0:
			return result{records: records, ttl: max(least, MinTTL)}
		case m.Rcode == dns.RcodeNameError:
			return result{err: ErrNoName, ttl: max(min(least, negativeTTL(m)), MinTTL)}
		case end == name && slices.ContainsFunc(m.Answer, func(rr dns.RR) bool { return rr.Header().Rrtype == qtype }):
			return result{err: ErrNoAnswer, cause: fmt.Errorf("answer has records of other names than %q", name), ttl: FailureTTL, answered: true}
		case end == name || hasSOA(m):
			return result{err: ErrNoAddress, ttl: max(min(least, negativeTTL(m)), MinTTL)}
		}
		name = end
	}
	return tooMany(name)
}

func tooMany(name string) result {
	return result{err: ErrNoAnswer, cause: fmt.Errorf("CNAME chain at %q longer than %d", name, maxChain), ttl: FailureTTL, answered: true}
}

// walk follows the aliases of a name within an answer. It returns the last name, or
// none if the chain is too long, its records of the type, and the smallest TTL of the
// chain.
func walk(m *dns.Msg, name string, qtype uint16) (end string, records []dns.RR, ttl time.Duration) {
	ttl = MaxTTL
	for range maxChain {
		next := ""
		for _, rr := range m.Answer {
			h := rr.Header()
			if !strings.EqualFold(h.Name, name) || h.Class != dns.ClassINET || h.Rdlength == 0 {
				continue
			}
			alias, isAlias := rr.(*dns.CNAME)
			switch {
			case h.Rrtype == qtype:
				records = append(records, rr)
			case isAlias:
				next = alias.Target
			default:
				continue
			}
			ttl = min(ttl, seconds(h.Ttl))
		}
		if len(records) > 0 || next == "" {
			return name, records, ttl
		}
		name = next
	}
	return "", nil, ttl
}

// seconds returns a TTL as a duration. A TTL with the highest bit set counts as zero
// (RFC 2181 section 8).
func seconds(ttl uint32) time.Duration {
	if ttl > 1<<31-1 {
		return 0
	}
	return time.Duration(ttl) * time.Second
}

// negativeTTL returns how long a negative answer is kept: the value of the zone's SOA
// record (RFC 2308 section 5), at most MaxNegativeTTL.
func negativeTTL(m *dns.Msg) time.Duration {
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			return min(seconds(soa.Hdr.Ttl), seconds(soa.Minttl), MaxNegativeTTL)
		}
	}
	return MinTTL
}

func hasSOA(m *dns.Msg) bool {
	for _, rr := range m.Ns {
		if _, ok := rr.(*dns.SOA); ok {
			return true
		}
	}
	return false
}

// A refusal is the error of an answer without information about the name.
type refusal struct{ server, why string }

func (e *refusal) Error() string { return fmt.Sprintf("name server %s: %s", e.server, e.why) }

// ask sends one query to the name servers, one after the other, until one answers. The
// error is that of the last server. A query that is slow while others wait goes on to
// the next server, once.
func (r *Resolver) ask(ctx context.Context, c *conf, name string, qtype uint16) (*dns.Msg, error) {
	first := 0
	if c.rotate {
		first = int(r.turn.Add(1) % uint32(len(c.servers)))
	}
	var last error
	hurried := false
	for range c.attempts {
		for i := range c.servers {
			m, err := r.askOne(ctx, c, c.servers[(first+i)%len(c.servers)], name, qtype, hurried)
			if err == nil {
				return m, nil
			}
			last = err
			hurried = hurried || errors.Is(err, errSlow)
			if ctx.Err() != nil || errors.Is(err, errBusy) {
				return nil, err
			}
		}
		if hurried {
			break
		}
	}
	return nil, last
}

// askOne queries one server when there is a slot.
func (r *Resolver) askOne(ctx context.Context, c *conf, server, name string, qtype uint16, last bool) (*dns.Msg, error) {
	ctx, done, err := r.slots.acquire(ctx, last)
	if err != nil {
		return nil, err
	}
	defer done()
	m, err := r.exchange(ctx, c, server, name, qtype)
	if err != nil && errors.Is(context.Cause(ctx), errSlow) {
		err = fmt.Errorf("querying name server %s: %w", server, errSlow)
	}
	return m, err
}
