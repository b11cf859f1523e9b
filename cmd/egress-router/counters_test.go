package main

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/rules"
)

// track counts the connections of the pod until the test ends.
func (p *pod) track(audit func(conntrack.Event)) *conntrack.Tracker {
	p.Helper()
	var tracker *conntrack.Tracker
	err := p.lab.Router.Do(func() (err error) {
		tracker, err = conntrack.Open(conntrack.Options{
			Source: source, Mark: config.DefaultReplyMark, Set: p.destinations(),
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
func (p *pod) destinations() rules.Set {
	p.Helper()
	set, err := rules.Parse(p.env["EGRESS_DESTINATION"])
	if err != nil {
		p.Fatal(err)
	}
	return set
}

func (p *pod) counts(t *conntrack.Tracker) conntrack.Report {
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

// wantConnections checks how many there were to each destination, in the order
// of the list.
func (p *pod) wantConnections(r conntrack.Report, want ...uint64) {
	p.Helper()
	for i, l := range r.Lines {
		if l.Connections != want[i] {
			p.Errorf("%v: %d connections, want %d", l.Destination, l.Connections, want[i])
		}
	}
}

// Every connection and every byte is counted, for each destination, also when
// the rules are loaded again.
func TestCounters(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.ok()
		tracker := p.track(nil)
		// A datagram has 28 bytes of headers (RFC 791 and 768), the question 2
		// and the answer as many as the two addresses.
		const flows, questions = 4, 3
		var sent, received uint64
		for range flows {
			f := p.flow(53)
			for range questions {
				a, err := f.ask()
				if err != nil {
					p.Fatal(err)
				}
				sent += 28 + 2
				received += 28 + uint64(len(a.Server.String())+1+len(a.Peer.String())+1)
			}
		}
		r := p.counts(tracker)
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

		// A connection with a known load each way, between headers of 40 to 60
		// bytes a packet (RFC 791 and 9293).
		const load = 100_000
		conn, err := p.lab.Dial(p.Context(), p.lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		if err != nil {
			p.Fatal(err)
		}
		defer conn.Close()
		answer := make([]byte, 256)
		n, err := conn.Read(answer)
		if err != nil {
			p.Fatal(err)
		}
		p.echo(conn, load)
		r = p.counts(tracker)
		p.wantConnections(r, 1, 0, 0, flows)
		l := r.Lines[0]
		for _, way := range []struct {
			name                   string
			packets, bytes, loaded uint64
		}{{"out", l.PacketsOut, l.BytesOut, load}, {"in", l.PacketsIn, l.BytesIn, load + uint64(n)}} {
			if way.bytes < way.loaded+40*way.packets || way.bytes > way.loaded+60*way.packets {
				p.Errorf("%s: %d bytes in %d packets, for %d", way.name, way.bytes, way.packets, way.loaded)
			}
		}

		// The same list again, and another one.
		p.ok()
		p.env["EGRESS_DESTINATION"] = "8443 tcp 203.0.113.26 443\n80 tcp 203.0.113.25\n203.0.113.27\n"
		p.ok()
		if err := tracker.Replace(p.destinations()); err != nil {
			p.Fatal(err)
		}
		p.echo(conn, load)
		p.wantAnswer("tcp", 8443, "203.0.113.26:443")
		p.wantAnswer("tcp", 9000, "203.0.113.27:9000")
		// A late segment is to begin nothing (nf_conntrack-sysctl.rst).
		if err := p.lab.SetSysctl(p.lab.Router, "net/netfilter/nf_conntrack_tcp_loose", "0"); err != nil {
			p.Fatal(err)
		}
		if err := p.lab.ForgetConnections(p.lab.Router); err != nil {
			p.Fatal(err)
		}
		r = p.counts(tracker)
		p.wantConnections(r, 1, 1, flows+1)
		if l := r.Lines[1]; l.BytesOut < 2*load || l.BytesIn < 2*load || l.Open != 0 {
			p.Errorf("got %+v", l)
		}
	})
}

// echo has the server send back what it is sent.
func (p *pod) echo(conn net.Conn, n int) {
	p.Helper()
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(make([]byte, n))
		written <- err
	}()
	for b, left := make([]byte, 64<<10), n; left > 0; {
		got, err := conn.Read(b)
		if err != nil {
			p.Fatal(err)
		}
		left -= got
	}
	if err := <-written; err != nil {
		p.Fatal(err)
	}
}

// Many short connections at once, read meanwhile.
func TestCountersUnderLoad(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.ok()
		// Connections leave the table when they are over, and a late segment does
		// not begin one.
		for _, sysctl := range []string{"tcp_timeout_time_wait", "tcp_loose"} {
			if err := p.lab.SetSysctl(p.lab.Router, "net/netfilter/nf_conntrack_"+sysctl, "0"); err != nil {
				p.Fatal(err)
			}
		}
		tracker := p.track(nil)
		const clients, each = 8, 250
		var working sync.WaitGroup
		for i := range clients {
			working.Go(func() {
				for range each {
					port := []uint16{80, 8080, 8443, 9000}[i%4]
					if _, err := p.ask(p.lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, port)); err != nil {
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
			r := p.counts(tracker)
			for i := range before.Lines {
				if was, is := before.Lines[i], r.Lines[i]; is.Connections < was.Connections || is.BytesOut < was.BytesOut || is.BytesIn < was.BytesIn {
					p.Fatalf("counters went back, from %+v to %+v", was, is)
				}
			}
			before = r
		}
		const wanted = clients / 4 * each
		p.wantConnections(before, wanted, wanted, wanted, wanted)
		if err := p.lab.ForgetConnections(p.lab.Router); err != nil {
			p.Fatal(err)
		}
		p.wantConnections(p.counts(tracker), wanted, wanted, wanted, wanted)
	})
}

// The audit log hears of each connection twice, with both sides of it, whatever
// the client; not of the pod's own.
func TestAuditedConnections(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.ok()
		events := make(chan conntrack.Event, 100)
		p.track(func(e conntrack.Event) { events <- e })
		p.wantConnection(p.lab.Router, "203.0.113.25:80")
		conn, err := p.lab.Dial(p.Context(), p.lab.Far, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
		if err != nil {
			p.Fatal(err)
		}
		defer conn.Close()
		p.echo(conn, 10) // also reads the answer, or part of it
		began := <-events
		want := conntrack.Event{
			Began: true, Protocol: rules.TCP,
			Client: conn.LocalAddr().(*net.TCPAddr).AddrPort(), Port: 8080,
			Server:   netip.MustParseAddrPort("203.0.113.26:80"),
			Reserved: netip.AddrPortFrom(source, began.Reserved.Port()),
		}
		if began != want || began.Client.Addr() != lab.FarAddr || began.Reserved.Port() == 0 {
			p.Errorf("began:\n got %+v\nwant %+v", began, want)
		}
		if err := p.lab.ForgetConnections(p.lab.Router); err != nil {
			p.Fatal(err)
		}
		ended := <-events
		want.Began, want.Accounted, want.Traffic, want.Duration = false, true, ended.Traffic, ended.Duration
		if ended != want || ended.Duration <= 0 || ended.BytesOut < 10+2*40 || ended.BytesIn < 10+2*40 {
			p.Errorf("ended:\n got %+v\nwant %+v", ended, want)
		}
	})
}
