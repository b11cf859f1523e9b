package conntrack

import (
	"testing"
	"time"

	"github.com/egress-router/egress-router/rules"
)

func TestSilence(t *testing.T) {
	timeouts := Timeouts{Established: time.Hour, Unanswered: 5 * time.Minute}
	for name, test := range map[string]struct {
		c    Connection
		want time.Duration
	}{
		"a packet now":                   {Connection{Protocol: rules.TCP, State: "ESTABLISHED", Left: time.Hour}, 0},
		"a minute ago":                   {Connection{Protocol: rules.TCP, State: "ESTABLISHED", Left: 59 * time.Minute}, time.Minute},
		"long ago":                       {Connection{Protocol: rules.TCP, State: "ESTABLISHED", Left: 301 * time.Second}, time.Hour - 301*time.Second},
		"a packet not acknowledged":      {Connection{Protocol: rules.TCP, State: "ESTABLISHED", Left: 300 * time.Second}, 0},
		"a longer timeout of before":     {Connection{Protocol: rules.TCP, State: "ESTABLISHED", Left: 2 * time.Hour}, 0},
		"one side has closed":            {Connection{Protocol: rules.TCP, State: "CLOSE_WAIT", Left: 59 * time.Minute}, 0},
		"another protocol":               {Connection{Protocol: rules.SCTP, Left: 59 * time.Minute}, 0},
		"the kernel has sent no timeout": {Connection{Protocol: rules.TCP, State: "ESTABLISHED"}, 0},
	} {
		if got := timeouts.Silence(test.c); got != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
}

// The timeouts and the time left are those of the kernel: with a longer timeout, an entry without a
// packet since then counts as idle for the difference, until the next packet.
func TestSilenceOfKernel(t *testing.T) {
	redirect(t)
	serve(t, "127.0.0.25:8080", "127.0.0.25:5353")
	const established = "net.netfilter.nf_conntrack_tcp_timeout_established"
	setSysctl(t, established, "10000")
	conn := dial(t, "tcp4", "127.0.0.98:80")
	exchange(t, conn, 10)
	silence := func(want func(time.Duration) bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Minute); ; time.Sleep(time.Millisecond) {
			timeouts, err := ReadTimeouts()
			if err != nil || timeouts.Unanswered < time.Minute {
				t.Fatalf("%+v, %v", timeouts, err)
			}
			list, err := List(options.Sources)
			if err != nil || len(list) != 1 {
				t.Fatalf("%+v, %v", list, err)
			}
			got := timeouts.Silence(list[0])
			if list[0].Left > timeouts.Unanswered && want(got) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("silent for %s: %+v, %+v", got, timeouts, list[0])
			}
		}
	}
	soon := func(d time.Duration) bool { return d < 20*time.Minute }
	silence(soon) // and the last packet is acknowledged
	setSysctl(t, established, "13600")
	silence(func(d time.Duration) bool { return d >= time.Hour })
	exchange(t, conn, 10)
	silence(soon)
}
