package httpproxy

import (
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// A Kind is the kind of an exchange.
type Kind int

// The kinds.
const (
	Request Kind = iota
	Tunnel       // CONNECT
	kinds
)

// String returns the kind's name.
func (k Kind) String() string { return [kinds]string{"request", "tunnel"}[k] }

// classes is the number of status classes: 0 for none, 1 for 1xx and so on.
const classes = 6

// A Status is the state of a proxy, and its counters since the start.
type Status struct {
	Listen      string // the address; empty: the proxy does not listen
	ListenSince time.Time

	Rules      int       // number in effect
	RulesErr   error     // error of the rule file's current content
	RulesSince time.Time // start of RulesErr, or of the rules

	LookupErr   error     // of the name servers that do not answer; nil: they do
	LookupSince time.Time // start of LookupErr

	Connections, MaxConnections int // client connections and their limit
	Running                     int // active requests and tunnels

	Counts
}

// Counts are the counters of a proxy. Requests and tunnels are counted, with their
// bytes, when they end.
type Counts struct {
	Requests        [kinds][classes]int64 // by the class of their status, 0: none
	Sent, Received  [kinds]int64          // bytes to and from servers; Received includes the proxy's own responses
	Denied          int64                 // by the rules
	ConnectFailures int64
	Lookups         int64
	LookupFailures  int64
	Reloads         int64
	ReloadFailures  int64
}

// counters are Counts for concurrent use.
type counters struct {
	requests        [kinds][classes]atomic.Int64
	sent, received  [kinds]atomic.Int64
	denied          atomic.Int64
	connectFailures atomic.Int64
	lookups         atomic.Int64
	lookupFailures  atomic.Int64
	reloads         atomic.Int64
	reloadFailures  atomic.Int64
}

func (c *counters) read() Counts {
	counts := Counts{
		Denied: c.denied.Load(), ConnectFailures: c.connectFailures.Load(),
		Lookups: c.lookups.Load(), LookupFailures: c.lookupFailures.Load(),
		Reloads: c.reloads.Load(), ReloadFailures: c.reloadFailures.Load(),
	}
	for k := range kinds {
		for class := range classes {
			counts.Requests[k][class] = c.requests[k][class].Load()
		}
		counts.Sent[k], counts.Received[k] = c.sent[k].Load(), c.received[k].Load()
	}
	return counts
}

// count counts an exchange that has ended. sent and received are the client's bytes.
func (c *counters) count(x *exchange, received, sent int64) {
	kind, class := Request, 0
	if x.request.method == http.MethodConnect {
		kind = Tunnel
	}
	if n := x.status / 100; n > 0 && n < classes {
		class = n
	}
	c.requests[kind][class].Add(1)
	c.sent[kind].Add(received)
	c.received[kind].Add(sent)
}

// A fileState is the outcome of the last read of the rule file.
type fileState struct {
	mu    sync.Mutex
	err   error
	since time.Time
}

func (f *fileState) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if (err == nil) != (f.err == nil) || f.since.IsZero() {
		f.since = time.Now()
	}
	f.err = err
}

// Status returns the state of the proxy.
func (p *Proxy) Status() Status {
	s := Status{
		Rules: len(p.rules.Load().Rules), MaxConnections: p.config.MaxConnections, Running: p.running.count(), Counts: p.counters.read(),
	}
	s.LookupSince, s.LookupErr = p.silence.state()
	p.file.mu.Lock()
	s.RulesErr, s.RulesSince = p.file.err, p.file.since
	p.file.mu.Unlock()
	if l := p.listener.Load(); l != nil {
		s.Listen, s.ListenSince, s.Connections = l.Addr().String(), l.since, l.count()
	}
	return s
}
