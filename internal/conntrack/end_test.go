package conntrack

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// Outcome and duration follow from the states, the timeouts and the times of a
// connection.
func TestOutcomeOfBook(t *testing.T) {
	const synSent, established, finWait = 1, 3, 4
	const answered, assured = statusSeenReply, statusSeenReply | statusAssured
	const s = time.Second
	const stateless = ", its end without a state" // as Linux 5.10 sends it
	type change struct {
		after time.Duration // since the begin
		state uint8
	}
	closed := []change{{0, established}, {2 * s, finWait}, {3 * s, tcpLastAck}, {4 * s, tcpTimeWait}}
	for name, test := range map[string]struct {
		protocol rules.Protocol
		changes  []change // the first is the begin event
		status   uint32
		left     time.Duration
		end      time.Duration // time of the end event
		want     Outcome
		duration time.Duration
	}{
		"closed":                          {rules.TCP, closed, assured, 0, 150 * s, Closed, 4 * s},
		"closed, then reset":              {rules.TCP, append(closed, change{9 * s, tcpClose}), assured, 0, 150 * s, Closed, 4 * s},
		"closed and removed":              {rules.TCP, closed, assured, 100 * s, 24 * s, Closed, 4 * s},
		"closed without the last ACK":     {rules.TCP, closed[:3], assured, 0, 40 * s, Closed, 10 * s},
		"half closed":                     {rules.TCP, closed[:2], assured, 0, 130 * s, Expired, 10 * s},
		"reset":                           {rules.TCP, []change{{0, synSent}, {s, established}, {5 * s, tcpClose}}, assured, 0, 40 * s, Reset, 5 * s},
		"refused":                         {rules.TCP, []change{{0, synSent}, {s, tcpClose}}, 0, 120 * s, s, Refused, s},
		"unanswered":                      {rules.TCP, []change{{0, synSent}}, 0, 0, 127 * s, Unanswered, 7 * s},
		"idle":                            {rules.TCP, []change{{0, established}}, assured, 0, 5*24*time.Hour + 60*s, Expired, 60 * s},
		"data without acknowledgement":    {rules.TCP, []change{{0, established}}, assured, 0, 360 * s, Expired, 60 * s},
		"removed":                         {rules.TCP, []change{{0, established}}, assured, 5*24*time.Hour - 10*s, 60 * s, Removed, 50 * s},
		"udp":                             {rules.UDP, []change{{0, 0}}, answered, 0, 31 * s, Expired, s},
		"udp, a stream":                   {rules.UDP, []change{{0, 0}}, assured, 0, 130 * s, Expired, 10 * s},
		"udp, unanswered":                 {rules.UDP, []change{{0, 0}}, 0, 0, 33 * s, Unanswered, 3 * s},
		"udp, removed":                    {rules.UDP, []change{{0, 0}}, assured, 119 * s, 9 * s, Removed, 8 * s},
		"sctp":                            {sctp, []change{{0, 2}, {s, 4}, {9 * s, sctpClosed}}, assured, 0, 20 * s, Closed, 9 * s},
		"sctp, aborted at once":           {sctp, []change{{0, 2}, {s, sctpClosed}}, answered, 0, 20 * s, Refused, s},
		"icmp":                            {unix.IPPROTO_ICMP, []change{{0, 0}}, answered, 0, 32 * s, Expired, 2 * s},
		"another protocol":                {unix.IPPROTO_GRE, []change{{0, 0}}, answered, 0, 602 * s, Expired, 2 * s},
		"tcp, unknown state":              {rules.TCP, []change{{0, 0}}, assured, 0, 60 * s, "", 60 * s},
		"removed" + stateless:             {rules.TCP, []change{{0, established}}, assured, 0, 3600 * s, Removed, 3300 * s},
		"removed at once" + stateless:     {rules.TCP, []change{{0, established}}, assured, 0, 60 * s, Removed, 0},
		"idle" + stateless:                {rules.TCP, []change{{0, established}}, assured, 0, 5*24*time.Hour + 60*s, Expired, 60 * s},
		"refused" + stateless:             {rules.TCP, []change{{0, synSent}}, 0, 0, s, Refused, 0},
		"unanswered" + stateless:          {rules.TCP, []change{{0, synSent}}, 0, 0, 127 * s, Unanswered, 7 * s},
		"shorter than its timeout by far": {rules.UDP, []change{{0, 0}}, assured, 0, 5 * s, Expired, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := newTable(t)
			begin := b.now
			b.waits = timeouts{read: begin.Add(1000 * time.Hour), values: map[string]time.Duration{
				"tcp_timeout_syn_sent": 120 * s, "tcp_timeout_established": 5 * 24 * time.Hour, "tcp_timeout_fin_wait": 120 * s, "tcp_timeout_last_ack": 30 * s,
				"tcp_timeout_time_wait": 120 * s, "tcp_timeout_close": 10 * s, "tcp_timeout_unacknowledged": 300 * s, "tcp_timeout_max_retrans": 300 * s,
				"udp_timeout": 30 * s, "udp_timeout_stream": 120 * s, "icmp_timeout": 30 * s, "generic_timeout": 600 * s, "sctp_timeout_closed": 10 * s,
			}}
			r := entry(1, 4)
			r.protocol, r.status = test.protocol, test.status
			if test.want == Unanswered {
				r.PacketsIn, r.BytesIn = 0, 0
			}
			for i, c := range test.changes {
				r.state = c.state
				b.now = begin.Add(c.after)
				if i == 0 {
					b.begin(r)
				} else {
					b.changed(&r, b.now)
				}
			}
			r.left = test.left
			if strings.HasSuffix(name, stateless) {
				r.state = 0
			}
			b.now = begin.Add(test.end)
			b.end(r)
			if got := b.ends[0]; got.Outcome != test.want || !got.Timed || got.Duration != test.duration {
				t.Errorf("%q after %s (%v), want %q after %s", got.Outcome, got.Duration, got.Timed, test.want, test.duration)
			}
		})
	}
}

// expire makes the kernel end the entries whose timeout is over, which it does at the
// latest a minute later: it does it for those that a dump would have.
func expire(t *testing.T) {
	t.Helper()
	s, err := openSocket()
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if err := s.ask(messageGet, unix.NLM_F_DUMP, nil, func(message) {}); err != nil {
		t.Fatal(err)
	}
}

// outcomePorts counts the ports of clients: one in TIME_WAIT is not bound again.
var outcomePorts atomic.Uint32

// The audit log has the outcome of real connections, and the time until their last
// packet, however long the kernel keeps them.
func TestOutcomes(t *testing.T) {
	redirect(t)
	run(t, "add chain ip t drops { type filter hook input priority 0; }\nadd rule ip t drops ip daddr 127.0.0.25 tcp dport 9 drop\n"+
		"insert rule ip t to ip daddr 127.0.0.98 tcp dport 9 dnat to 127.0.0.25\ninsert rule ip t to ip daddr 127.0.0.98 udp dport 9 dnat to 127.0.0.25\n", "nft", "-f", "-")
	const timeout = 10 * time.Second
	for _, name := range []string{"tcp_timeout_syn_sent", "tcp_timeout_close", "tcp_timeout_time_wait", "tcp_timeout_established", "udp_timeout"} {
		setSysctl(t, "net.netfilter.nf_conntrack_"+name, "10")
	}
	setSysctl(t, "net.netfilter.nf_conntrack_tcp_loose", "0") // a late segment begins no connection
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	silent, err := net.ListenPacket("udp4", "127.0.0.25:9")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	events := make(chan Event, 100)
	o := options
	o.Count, o.Audit = false, func(e Event) { events <- e }
	start(t, o)

	echo := func(t *testing.T, conn net.Conn) { exchange(t, conn, 100) }
	type want struct {
		name    string
		network string
		port    int                        // of the pod
		use     func(*testing.T, net.Conn) // nil: it cannot be connected
		outcome Outcome
		sent    uint64 // least number of packets
		took    time.Duration
	}
	tests := []*want{
		{"removed", "tcp4", 80, func(t *testing.T, conn net.Conn) {
			echo(t, conn)
			forget(t)
		}, Removed, 3, 0},
		{"closed", "tcp4", 80, func(t *testing.T, conn net.Conn) {
			echo(t, conn)
			if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
				t.Error(err)
			}
			_, _ = io.Copy(io.Discard, conn)
		}, Closed, 4, 0},
		{"reset", "tcp4", 80, func(t *testing.T, conn net.Conn) {
			echo(t, conn)
			if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
				t.Error(err)
			}
			_ = conn.Close()
		}, Reset, 4, 0},
		{"idle", "tcp4", 80, echo, Expired, 3, 0},
		{"refused", "tcp4", 99, nil, Refused, 1, 0},
		{"unanswered", "tcp4", 9, nil, Unanswered, 1, 0},
		{"udp", "udp4", 53, echo, Expired, 1, 0},
		{"udp, unanswered", "udp4", 9, func(_ *testing.T, conn net.Conn) { _, _ = conn.Write([]byte("x")) }, Unanswered, 1, 0},
	}
	byClient := make(map[netip.AddrPort]*want)
	for _, test := range tests {
		client := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(25000+outcomePorts.Add(1)))
		byClient[client] = test
		var local net.Addr = net.TCPAddrFromAddrPort(client)
		if test.network == "udp4" {
			local = net.UDPAddrFromAddrPort(client)
		}
		d := net.Dialer{LocalAddr: local}
		if test.use == nil {
			d.Timeout = 100 * time.Millisecond // of one that is not answered
		}
		begin := time.Now()
		conn, err := d.DialContext(t.Context(), test.network, fmt.Sprintf("127.0.0.98:%d", test.port))
		if err == nil {
			t.Cleanup(func() { _ = conn.Close() })
		}
		if (err == nil) != (test.use != nil) {
			t.Fatalf("%s: %v", test.name, err)
		}
		if err == nil {
			test.use(t, conn)
		}
		test.took = time.Since(begin)
	}
	late := time.After(10 * time.Minute)
	for ended := 0; ended < len(tests); {
		select {
		case e := <-events:
			if e.Began {
				continue
			}
			ended++
			test := byClient[e.Client]
			if test == nil {
				t.Fatalf("%+v", e)
			}
			// Without the kernel's times of events, those of their arrival count.
			if limit := test.took + timeout/2; e.Outcome != test.outcome || !e.Timed || e.Duration < 0 || e.Duration > limit || e.PacketsOut < test.sent {
				t.Errorf("%s: %+v, want %q within %s", test.name, e, test.outcome, limit)
			}
		case <-late:
			t.Fatalf("%d connections ended", ended)
		case <-time.After(100 * time.Millisecond):
			expire(t)
		}
	}
}
