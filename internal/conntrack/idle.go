package conntrack

import (
	"fmt"
	"strconv"
	"time"

	"github.com/egress-router/egress-router/internal/sysctl"
	"github.com/egress-router/egress-router/rules"
)

// Timeouts are the times after which the kernel removes the entry of a TCP connection without
// packets (nf_conntrack-sysctl.rst).
type Timeouts struct {
	Established time.Duration // of one that is established
	// Unanswered is the longest of those of an established one of which a packet was not
	// acknowledged.
	Unanswered time.Duration
}

// ReadTimeouts reads the timeouts of the calling thread's network namespace.
func ReadTimeouts() (t Timeouts, err error) {
	const tcp = "net.netfilter.nf_conntrack_tcp_timeout_"
	for name, set := range map[string]func(time.Duration){
		"established":    func(d time.Duration) { t.Established = d },
		"max_retrans":    func(d time.Duration) { t.Unanswered = max(t.Unanswered, d) },
		"unacknowledged": func(d time.Duration) { t.Unanswered = max(t.Unanswered, d) },
	} {
		text, err := sysctl.Read(tcp + name)
		if err != nil {
			return Timeouts{}, err
		}
		seconds, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return Timeouts{}, fmt.Errorf("sysctl %s: expected a number of seconds, found %q", tcp+name, text)
		}
		set(time.Duration(seconds) * time.Second) //nolint:gosec // 32 bits
	}
	return t, nil
}

// Silence returns the time since the last packet of an established TCP connection, in whole seconds;
// zero: there is none, or the time is unknown. Each packet starts the timeout of the entry again. If
// that is about as short as that of one with a packet not acknowledged, the connection may be one.
func (t Timeouts) Silence(c Connection) time.Duration {
	if c.Protocol != rules.TCP || c.State != "ESTABLISHED" || c.Left <= t.Unanswered || c.Left > t.Established {
		return 0
	}
	return t.Established - c.Left
}
