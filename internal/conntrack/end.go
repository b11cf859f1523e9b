package conntrack

import (
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/sysctl"
	"github.com/egress-router/egress-router/rules"
)

// An Outcome is how a connection ended.
type Outcome string

// The outcomes. Only TCP and SCTP have an end of their own: all others are expired, or
// unanswered.
const (
	Closed     Outcome = "closed"     // both sides closed it
	Reset      Outcome = "reset"      // one side reset it after an answer
	Refused    Outcome = "refused"    // the first answer was a reset
	Unanswered Outcome = "unanswered" // no packet came from the server; an ICMP error is none
	Expired    Outcome = "expired"    // no packet came for the time that the kernel keeps it
	Removed    Outcome = "removed"    // its entry was deleted before: by a program, or since the table was full
)

// The states of connections (enum tcp_conntrack in linux/netfilter/nf_conntrack_tcp.h,
// enum sctp_conntrack in nf_conntrack_sctp.h) and the sysctls of their timeouts
// (nf_conntrack-sysctl.rst), by state. The state 9 of TCP is that of a simultaneous
// open, SYN_SENT2, and has the timeout of SYN_SENT.
const (
	tcpLastAck  = 6
	tcpTimeWait = 7
	tcpClose    = 8

	sctpClosed = 1
)

// sctp comes by the fallback only.
const sctp rules.Protocol = unix.IPPROTO_SCTP

var (
	tcpTimeouts = []string{"", "tcp_timeout_syn_sent", "tcp_timeout_syn_recv", "tcp_timeout_established", "tcp_timeout_fin_wait",
		"tcp_timeout_close_wait", "tcp_timeout_last_ack", "tcp_timeout_time_wait", "tcp_timeout_close", "tcp_timeout_syn_sent"}
	sctpTimeouts = []string{"", "sctp_timeout_closed", "sctp_timeout_cookie_wait", "sctp_timeout_cookie_echoed", "sctp_timeout_established",
		"sctp_timeout_shutdown_sent", "sctp_timeout_shutdown_recd", "sctp_timeout_shutdown_ack_sent", "sctp_timeout_heartbeat_sent"}
	// shortened are the timeouts of a TCP connection that has unacknowledged data, or
	// sent it again too often (nf_conntrack_proto_tcp.c).
	shortened = []string{"tcp_timeout_unacknowledged", "tcp_timeout_max_retrans"}
)

// timeoutNames returns the sysctls of the timeouts that a connection may have had after
// its last packet, without their common prefix, the most probable first.
func timeoutNames(p rules.Protocol, state uint8, status uint32) []string {
	switch p {
	case rules.TCP:
		if 0 < state && int(state) < len(tcpTimeouts) {
			return append([]string{tcpTimeouts[state]}, shortened...)
		}
		return nil
	case sctp:
		if 0 < state && int(state) < len(sctpTimeouts) {
			return sctpTimeouts[state : state+1]
		}
		return nil
	case rules.UDP:
		// A packet later than two seconds after the first one makes it assured
		// (nf_conntrack_udp_packet in nf_conntrack_proto_udp.c).
		if status&statusAssured != 0 {
			return []string{"udp_timeout_stream"}
		}
		return []string{"udp_timeout"}
	case unix.IPPROTO_ICMP:
		return []string{"icmp_timeout"}
	}
	return []string{"generic_timeout"}
}

// timeouts has the values of sysctls that were read lately.
type timeouts struct {
	values map[string]time.Duration
	read   time.Time
}

// get returns the value of a timeout, 0 if it cannot be read.
func (t *timeouts) get(name string, now time.Time) time.Duration {
	const valid = 10 * time.Second
	if now.Sub(t.read) > valid || t.values == nil {
		t.values, t.read = make(map[string]time.Duration), now
	}
	value, ok := t.values[name]
	if !ok {
		text, _ := sysctl.Read("net.netfilter.nf_conntrack_" + name)
		seconds, _ := strconv.Atoi(text)
		value = time.Duration(seconds) * time.Second
		t.values[name] = value
	}
	return value
}

// over reports whether a connection was closed or reset: later packets do not belong to
// it.
func over(p rules.Protocol, state uint8) bool {
	return p == rules.TCP && (state == tcpTimeWait || state == tcpClose) || p == sctp && state == sctpClosed
}

// outcome returns how a connection ended, from its last record, which is from the time at.
func (f *flow) outcome(p rules.Protocol, r *record, at time.Duration, timeout func(string) time.Duration) Outcome {
	answered := r.status&statusSeenReply != 0
	switch {
	case p == rules.TCP && !answered && f.state == tcpClose && (r.PacketsIn > 0 || !f.accounted):
		return Refused
	case p == rules.TCP && !answered && r.state == 0 && r.PacketsIn > 0:
		return Refused // a reset is no answer, and ends the connection at once (nf_conntrack_tcp_packet)
	case p == rules.TCP && !answered && r.state == 0 && !f.accounted:
		return "" // refused or unanswered
	case !answered:
		return Unanswered
	case p == rules.TCP && f.state == tcpClose:
		return Reset
	case p == rules.TCP && (f.state == tcpTimeWait || f.state == tcpLastAck):
		return Closed
	case p == sctp && f.state == sctpClosed && r.status&statusAssured == 0:
		return Refused
	case p == sctp && f.state == sctpClosed:
		return Closed
	case r.left > 0:
		return Removed
	case (p == rules.TCP || p == sctp) && f.state == 0:
		return "" // the kernel does not send it with the end, as Linux 5.10, and events were lost
	case (p == rules.TCP || p == sctp) && r.state == 0 && f.known:
		// Such a kernel does not send the time that was left, either. The last packet came after the
		// last change. A timeout that the kernel shortened is not seen.
		if names := timeoutNames(p, f.state, r.status); len(names) > 0 && at-timeout(names[0]) < f.changed {
			return Removed
		}
	}
	return Expired
}

// last returns the time of a connection's last packet, from its last record, which is
// from the time at. The kernel ends an entry when its timeout is over, without a packet.
func (f *flow) last(p rules.Protocol, r *record, at time.Duration, timeout func(string) time.Duration) time.Duration {
	if f.over {
		return f.changed
	}
	names := timeoutNames(p, f.state, r.status)
	if len(names) == 0 {
		return at
	}
	if r.left > 0 { // removed before
		return min(max(at-timeout(names[0])+r.left, f.changed), at)
	}
	i := slices.IndexFunc(names, func(name string) bool { return at-timeout(name) >= f.changed })
	if i < 0 {
		return f.changed
	}
	return at - timeout(names[i])
}
