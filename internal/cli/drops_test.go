package cli

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/nflog"
	"github.com/egress-router/egress-router/rules"
)

// For each reason there is a line soon after the first packet, and then one in each
// pause in which packets were dropped, with their number and the last example.
func TestDropLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lines strings.Builder
		begin := time.Now()
		var mu sync.Mutex
		counters := map[rules.Reason]uint64{rules.Invalid: 100} // from before
		l := dropLog{
			log: slog.New(slog.NewTextHandler(&lines, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey {
					return slog.String("after", time.Since(begin).String())
				}
				return a
			}})),
			dropped: func(context.Context) map[rules.Reason]uint64 {
				mu.Lock()
				defer mu.Unlock()
				return maps.Clone(counters)
			},
		}
		packets := make(chan nflog.Packet)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go l.run(ctx, packets)
		port := uint16(0)
		drop := func(reason rules.Reason, packet uint64) {
			mu.Lock()
			counters[reason] += packet
			mu.Unlock()
			port++
			packets <- nflog.Packet{Prefix: string(reason), In: "eth0", Protocol: "udp",
				Source: netip.AddrPortFrom(netip.MustParseAddr("10.128.0.71"), port), Destination: netip.MustParseAddrPort("203.0.113.25:53")}
		}
		drop(rules.NotRedirected, 1)
		drop(rules.NotRedirected, 50) // most of them unread
		time.Sleep(3 * time.Second)
		drop(rules.NotRedirected, 1)
		drop(rules.Invalid, 1)
		drop("another-program", 1)
		time.Sleep(time.Minute)
		drop(rules.NotRedirected, 0) // the counter could not be read
		time.Sleep(time.Minute)
		synctest.Wait()
		const line = "after=%s level=INFO msg=\"packets dropped\" reason=%s packets=%d protocol=udp source=10.128.0.71:%d destination=203.0.113.25:53 in=eth0\n"
		want := fmt.Sprintf(line, "1s", "not-redirected", 51, 2) + fmt.Sprintf(line, "4s", "invalid", 101, 4) +
			fmt.Sprintf(line, "11s", "not-redirected", 1, 3) + fmt.Sprintf(line, "1m4s", "not-redirected", 1, 6)
		if diff := cmp.Diff(want, lines.String()); diff != "" {
			t.Errorf("- want, + got:\n%s", diff)
		}
	})
}
