package router_test

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns/nstest"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// track counts the connections of the pod until the test ends.
func track(p *labtest.Pod, audit func(conntrack.Event)) *conntrack.Tracker {
	p.Helper()
	var tracker *conntrack.Tracker
	err := p.Lab.Router.Do(func() (err error) {
		tracker, err = conntrack.Open(conntrack.Options{
			Sources: []netip.Addr{lab.Source}, Mark: spec.DefaultReplyMark, Set: destinations(p),
			Count: true, Audit: audit, Log: slog.New(slog.DiscardHandler),
		})
		return err
	})
	if err != nil {
		p.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- tracker.Run(ctx) }()
	p.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			p.Error(err)
		}
		tracker.Close()
	})
	return tracker
}

// destinations returns the pod's list.
func destinations(p *labtest.Pod) rules.Set {
	p.Helper()
	set, err := rules.Parse(p.Env["EGRESS_DESTINATION"], nil)
	if err != nil {
		p.Fatal(err)
	}
	return set
}

func counts(p *labtest.Pod, t *conntrack.Tracker) conntrack.Report {
	p.Helper()
	r, err := t.Counts()
	if err != nil {
		p.Fatal(err)
	}
	if !r.Accounted || r.Overruns != 0 {
		p.Errorf("accounted %v, %d overruns", r.Accounted, r.Overruns)
	}
	return r
}

// wantConnections checks the number of connections to each destination, in the
// order of the list.
func wantConnections(p *labtest.Pod, r conntrack.Report, want ...uint64) {
	p.Helper()
	for i, l := range r.Lines {
		if l.Connections != want[i] {
			p.Errorf("%v: %d connections, want %d", l.Redirect, l.Connections, want[i])
		}
	}
}

// The tracker counts each connection and byte, by destination, also when the rules
// are loaded again.
func TestCountersMatchTraffic(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		tracker := track(p, nil)
		// A datagram has 28 bytes of headers (RFC 791 and 768). The question has 2
		// more, the answer as many as the two addresses.
		const flows, questions = 4, 3
		var sent, received uint64
		for range flows {
			f := p.Flow(53)
			for range questions {
				a := f.Ask()
				sent += 28 + 2
				received += 28 + uint64(len(a.Server.String())+1+len(a.Peer.String())+1)
			}
		}
		r := counts(p, tracker)
		const datagrams = flows * questions
		want := conntrack.Counts{
			Connections: flows, Open: flows,
			Traffic: conntrack.Traffic{PacketsOut: datagrams, BytesOut: sent, PacketsIn: datagrams, BytesIn: received},
		}
		if got := r.Lines[3]; got.Counts != want || got.To.String() != "203.0.113.27" || got.Protocol != 0 {
			p.Errorf("fallback: got %+v, want %+v", got, want)
		}
		if len(r.Ports) != 1 || r.Ports[0].InUse != flows || r.Ports[0].Server.String() != "203.0.113.27:53" {
			p.Errorf("ports in use: %+v", r.Ports)
		}

		// A capture counts the packets of a connection, too, as they come in.
		const load = 100_000
		watch := p.Watch(p.Lab.Router, "eth0", "macvlan0")
		conn, reader := p.Open(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		echo(p, conn, reader, load)
		var got, captured conntrack.Traffic
		for begin := time.Now(); time.Since(begin) < labtest.Patience; { // acknowledgements may be under way
			r = counts(p, tracker)
			got = r.Lines[0].Traffic
			captured = conntrack.Traffic{}
			captured.PacketsOut, captured.BytesOut = arrived(watch, "eth0", func(ip lab.Packet) bool { return ip.Dst.Port() == 80 })
			captured.PacketsIn, captured.BytesIn = arrived(watch, "macvlan0", func(ip lab.Packet) bool { return ip.Src.Port() == 80 })
			if got == captured {
				break
			}
		}
		if got != captured || got.BytesOut < load || got.BytesIn < load {
			p.Errorf("counted %+v, captured %+v", got, captured)
		}
		wantConnections(p, r, 1, 0, 0, flows)

		// The same list is loaded again, then another one.
		p.OK()
		p.Env["EGRESS_DESTINATION"] = "8443 tcp 203.0.113.26 443\n80 tcp 203.0.113.25\n203.0.113.27\n"
		p.OK()
		if err := tracker.Replace(destinations(p)); err != nil {
			p.Fatal(err)
		}
		echo(p, conn, reader, load)
		p.WantAnswer("tcp", 8443, "203.0.113.26:443")
		p.WantAnswer("tcp", 9000, "203.0.113.27:9000")
		// A late segment must not start a connection (nf_conntrack-sysctl.rst).
		if err := p.Lab.SetSysctl(p.Lab.Router, "net/netfilter/nf_conntrack_tcp_loose", "0"); err != nil {
			p.Fatal(err)
		}
		if err := p.Lab.ForgetConnections(p.Lab.Router); err != nil {
			p.Fatal(err)
		}
		r = counts(p, tracker)
		wantConnections(p, r, 1, 1, flows+1)
		if l := r.Lines[1]; l.BytesOut < 2*load || l.BytesIn < 2*load || l.Open != 0 {
			p.Errorf("got %+v", l)
		}
	})
}

// arrived counts the packets that came in by a link, and their bytes.
func arrived(w labtest.Watch, link string, match func(lab.Packet) bool) (packets, bytes uint64) {
	for _, f := range w.Captures[link].Frames() {
		if ip, ok := f.IPv4(); ok && !f.Outgoing && match(ip) {
			packets++
			bytes += uint64(len(f.Data) - 14) // without the header of Ethernet
		}
	}
	return packets, bytes
}

// echo sends n bytes, which the server sends back.
func echo(p *labtest.Pod, conn net.Conn, r *bufio.Reader, n int) {
	p.Helper()
	_ = conn.SetDeadline(time.Now().Add(labtest.Patience))
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(make([]byte, n))
		written <- err
	}()
	if _, err := io.CopyN(io.Discard, r, int64(n)); err != nil {
		p.Fatal(err)
	}
	if err := <-written; err != nil {
		p.Fatal(err)
	}
}

// Counters that are read while many short connections come and go only grow, and
// are complete in the end.
func TestCountersUnderLoadNeverDecrease(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 0, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		// Connections leave the table when they end, and a late segment does not
		// start one.
		for _, sysctl := range []string{"tcp_timeout_time_wait", "tcp_loose"} {
			if err := p.Lab.SetSysctl(p.Lab.Router, "net/netfilter/nf_conntrack_"+sysctl, "0"); err != nil {
				p.Fatal(err)
			}
		}
		tracker := track(p, nil)
		const clients = 8
		each := uint64(60)
		if nstest.Long() {
			each = 250
		}
		var working sync.WaitGroup
		for i := range clients {
			working.Go(func() {
				for range each {
					port := []uint16{80, 8080, 8443, 9000}[i%4]
					if _, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, port)); err != nil {
						p.Error(err)
						return
					}
				}
			})
		}
		done := make(chan struct{})
		go func() {
			working.Wait()
			close(done)
		}()
		var before conntrack.Report
		for running := true; running; {
			select {
			case <-done:
				running = false
			default:
			}
			r := counts(p, tracker)
			for i := range before.Lines {
				if was, is := before.Lines[i], r.Lines[i]; is.Connections < was.Connections || is.BytesOut < was.BytesOut || is.BytesIn < was.BytesIn {
					p.Fatalf("counters decreased from %+v to %+v", was, is)
				}
			}
			before = r
		}
		wanted := clients / 4 * each
		wantConnections(p, before, wanted, wanted, wanted, wanted)
		if err := p.Lab.ForgetConnections(p.Lab.Router); err != nil {
			p.Fatal(err)
		}
		wantConnections(p, counts(p, tracker), wanted, wanted, wanted, wanted)
	})
}

// The audit has an event for the start and one for the end of each redirected
// connection, and none for connections of the pod.
func TestAuditHasStartAndEndOfConnections(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		events := make(chan conntrack.Event, 100)
		track(p, func(e conntrack.Event) { events <- e })
		wantConnection(p, p.Lab.Router, "203.0.113.25:80")
		conn := p.Dial(p.Lab.Far, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
		echo(p, conn, bufio.NewReader(conn), 10) // also reads the answer, or part of it
		began := <-events
		want := conntrack.Event{
			Began: true, Protocol: rules.TCP,
			Client: conn.LocalAddr().(*net.TCPAddr).AddrPort(), Port: 8080,
			Local:    netip.AddrPortFrom(lab.RouterAddr, 8080),
			Server:   netip.MustParseAddrPort("203.0.113.26:80"),
			Reserved: netip.AddrPortFrom(lab.Source, began.Reserved.Port()),
		}
		if began != want || began.Client.Addr() != lab.FarAddr || began.Reserved.Port() == 0 {
			p.Errorf("began:\n got %+v\nwant %+v", began, want)
		}
		if err := p.Lab.ForgetConnections(p.Lab.Router); err != nil {
			p.Fatal(err)
		}
		ended := <-events
		want.Began, want.Accounted, want.Traffic, want.Duration = false, true, ended.Traffic, ended.Duration
		want.Outcome, want.Timed = conntrack.Removed, true
		if ended != want || ended.Duration <= 0 || ended.BytesOut < 10+2*40 || ended.BytesIn < 10+2*40 {
			p.Errorf("ended:\n got %+v\nwant %+v", ended, want)
		}
	})
}
