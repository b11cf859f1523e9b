package cli

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/page"
	"github.com/egress-router/egress-router/rules"
)

// Requests that wait while the kernel is read, which takes longer than viewEvery here, share
// the next look, and views are forgotten after a minute without a reader.
func TestReadersShareLooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		looks := 0
		v := &viewer{view: func() *view {
			looks++
			now := &view{at: time.Now()}
			time.Sleep(3 * viewEvery)
			return now
		}}
		begin := time.Now()
		for _, request := range []struct {
			after time.Duration
			looks int
		}{{0, 1}, {0, 1}, {viewEvery - 1, 1}, {viewEvery, 2}, {2 * viewEvery, 2}, {4*viewEvery - 1, 2}, {4 * viewEvery, 3}} {
			if v.look(begin.Add(request.after)); looks != request.looks {
				t.Errorf("%d looks for requests up to %s, want %d", looks, request.after, request.looks)
			}
		}
		time.Sleep(viewKept)
		synctest.Wait()
		if v.last != nil || v.older != nil {
			t.Error("the views are kept without a reader")
		}
	})
}

// A destination whose counters have begun again has no rate.
func TestRatesAfterReload(t *testing.T) {
	line := func(connections, bytes uint64) conntrack.Line {
		l := conntrack.Line{Redirect: rules.Redirect{Protocol: rules.TCP, Port: 80}}
		l.Connections, l.BytesOut, l.BytesIn = connections, bytes, bytes
		return l
	}
	start := time.Now()
	for _, test := range []struct {
		before, now       conntrack.Line
		connections, rate string
	}{
		{line(1, 1000), line(3, 2000), "1.0", "1.0 kB/s"},
		{line(2, 2000), line(2, 2000), "0.0", "0 B/s"},
		{line(2, 2000), line(1, 100), "", ""},
		{line(0, 2000), line(0, 0), "", ""}, // of a connection that is older than the counters
	} {
		before := &view{at: start, Report: conntrack.Report{Lines: []conntrack.Line{test.before}, Accounted: true}}
		now := &view{at: start.Add(2 * time.Second), Report: conntrack.Report{Lines: []conntrack.Line{test.now}, Accounted: true}}
		cells := (&watch{}).destinationTable(page.Query{}, now, before, []string{""}, 0).Rows[0].Cells
		if cells[5] != test.connections || cells[8] != test.rate {
			t.Errorf("rates %q, %q after %+v to %+v; want %q, %q", cells[5], cells[8], test.before.Counts, test.now.Counts, test.connections, test.rate)
		}
	}
}
