package arp

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// run runs a Watch on a wire in a bubble and returns its callbacks; each text ends
// with the seconds since the start.
func run(t *testing.T, w *wire) (watch *Watch, reports *[]string) {
	t.Helper()
	start := time.Now()
	reports = new([]string)
	tell := func(format string, a ...any) {
		*reports = append(*reports, fmt.Sprintf(format, a...)+fmt.Sprintf(" at %v", time.Since(start)))
	}
	watch = newWatch(Options{
		MAC: ourMAC, Addresses: []netip.Addr{address}, Gateway: gateway,
		Conflict:       func(_ netip.Addr, mac net.HardwareAddr) { tell("conflict %s", mac) },
		GatewayChanged: func(reachable bool, mac net.HardwareAddr) { tell("gateway %t %v", reachable, mac) },
	}, w)
	ended := make(chan error)
	go func() { ended <- watch.Run(t.Context()) }()
	t.Cleanup(func() {
		watch.Close()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return watch, reports
}

func (w *wire) say(packets ...Packet) {
	for _, p := range packets {
		w.packets <- p
	}
	synctest.Wait()
}

// Claims every second for half a minute cause three defences and three reports.
func TestDefence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		watch, reports := run(t, w)
		start := time.Now()
		for i := range 30 {
			w.say(theirClaim)
			if i < 29 {
				time.Sleep(time.Second)
			}
		}
		var at []time.Duration
		for _, f := range w.frames() {
			at = append(at, f.at.Sub(start))
			if !bytes.Equal(f.frame, unhex(t, announcementReply)) && !bytes.Equal(f.frame, unhex(t, announcementRequest)) {
				t.Errorf("sent %x", f.frame)
			}
		}
		if want := []time.Duration{0, 0, 10e9, 10e9, 20e9, 20e9}; !slices.Equal(at, want) {
			t.Errorf("announced at %v, want %v", at, want)
		}
		want := []string{
			"conflict 02:00:5e:10:00:50 at 0s", "conflict 02:00:5e:10:00:50 at 10s", "conflict 02:00:5e:10:00:50 at 20s",
		}
		if diff := cmp.Diff(want, *reports); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		s := watch.State()
		if s.Conflicts != 30 || s.Defences != 3 || !bytes.Equal(s.ConflictMAC, otherMAC) || !s.ConflictAt.Equal(time.Now()) {
			t.Errorf("state %+v", s)
		}
	})
}

// A flood of invented hardware addresses causes neither more defences nor an
// endless log, nor does it use up memory.
func TestConflictsOfMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		watch, reports := run(t, w)
		for i := range 1000 {
			p := theirClaim
			p.SenderMAC = net.HardwareAddr{2, 0, 0, 0, byte(i >> 8), byte(i)}
			w.say(p)
		}
		if len(*reports) != maxReported || len(watch.reported) != maxReported {
			t.Errorf("%d reports, %d kept, want %d", len(*reports), len(watch.reported), maxReported)
		}
		time.Sleep(reportInterval)
		w.say(theirClaim)
		if len(*reports) != maxReported+1 || len(watch.reported) != 1 {
			t.Errorf("later %d reports, %d kept", len(*reports), len(watch.reported))
		}
		if s := watch.State(); s.Conflicts != 1001 || s.Defences != 2 {
			t.Errorf("state %+v", s)
		}
	})
}

// A host that does not hold the address claims nothing: it neither defends it nor has it in a
// request to the gateway. One that does has no conflict with a peer.
func TestHolderAmongPeers(t *testing.T) {
	for _, c := range []struct {
		name               string
		holds, peer        bool
		conflicts, defends int
	}{{"standby", false, false, 0, 0}, {"standby beside the holder", false, true, 0, 0}, {"holder and a peer", true, true, 0, 0}, {"holder and a stranger", true, false, 1, 1}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWire()
				watch := newWatch(Options{
					MAC: ourMAC, Addresses: []netip.Addr{address}, Gateway: gateway,
					Holds: func() bool { return c.holds },
					Peer:  func(mac net.HardwareAddr) bool { return c.peer && bytes.Equal(mac, otherMAC) },
				}, w)
				ended := make(chan error)
				go func() { ended <- watch.Run(t.Context()) }()
				w.say(theirClaim)
				if s := watch.State(); s.Conflicts != c.conflicts || s.Defences != c.defends {
					t.Errorf("expected %d conflicts and %d defences, found %+v", c.conflicts, c.defends, s)
				}
				before := len(w.frames())
				if err := watch.ProbeGateway(); err != nil {
					t.Error(err)
				}
				for _, f := range w.frames()[before:] {
					p, err := Parse(f.frame)
					if err != nil || p.TargetIP != gateway || (p.SenderIP == address) != c.holds || p.SenderIP.IsUnspecified() == c.holds {
						t.Errorf("request %+v, %v", p, err)
					}
				}
				watch.Close()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Neither a frame that a switch sends back nor a probe is a claim.
func TestNoConflict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		watch, reports := run(t, w)
		w.say(ourClaim, ourProbe, theirProbe, Packet{Reply, otherMAC, neighbour, ourMAC, address})
		if s := watch.State(); s.Conflicts != 0 || len(*reports) != 0 || len(w.frames()) != 0 {
			t.Errorf("state %+v, reports %q, sent %d", s, *reports, len(w.frames()))
		}
	})
}

// A failed defence is not counted, and the next one keeps the interval.
func TestDefenceFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		watch, reports := run(t, w)
		w.fail = os.ErrPermission
		w.say(theirClaim)
		w.mu.Lock()
		w.fail = nil
		w.mu.Unlock()
		w.say(theirClaim)
		if s := watch.State(); s.Conflicts != 2 || s.Defences != 0 || len(w.frames()) != 0 || len(*reports) != 1 {
			t.Errorf("state %+v, reports %q, sent %d", s, *reports, len(w.frames()))
		}
		time.Sleep(defendInterval)
		w.say(theirClaim)
		if s := watch.State(); s.Defences != 1 {
			t.Errorf("state %+v", s)
		}
	})
}

func TestGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		watch, reports := run(t, w)
		start := time.Now()
		reply := Packet{Reply, otherMAC, gateway, ourMAC, address}
		at := func(seconds float64) time.Time { return start.Add(time.Duration(seconds * 1e9)) }
		until := func(seconds float64) {
			time.Sleep(time.Until(at(seconds)))
			synctest.Wait()
		}
		check := func(want GatewayState) {
			t.Helper()
			if diff := cmp.Diff(want, watch.State().Gateway); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		}

		check(GatewayState{})
		for range 2 { // the second call does nothing
			if err := watch.ProbeGateway(); err != nil {
				t.Error(err)
			}
		}
		until(1.2)
		check(GatewayState{Misses: 2})
		until(1.7)
		check(GatewayState{Known: true, Since: at(1.35), Misses: 3})
		until(4.0)
		check(GatewayState{Known: true, Since: at(1.35), Misses: 5}) // at 2.35 and 3.35
		w.say(reply)
		check(GatewayState{Known: true, Reachable: true, Since: at(4), MAC: otherMAC, Answered: at(4)})
		until(5.4) // slow
		w.say(reply)
		check(GatewayState{Known: true, Reachable: true, Since: at(4), MAC: otherMAC, Answered: at(5.4)})
		until(7.4) // requests at 6.4, 6.85 and 7.3
		check(GatewayState{Known: true, Reachable: true, Since: at(4), MAC: otherMAC, Answered: at(5.4), Misses: 2})
		// Another router takes over and sends a request.
		vrrp := net.HardwareAddr{0, 0, 0x5e, 0, 1, 1}
		w.say(Packet{Request, vrrp, gateway, unknown(), neighbour})
		check(GatewayState{Known: true, Reachable: true, Since: at(4), MAC: vrrp, Answered: at(7.4)})
		until(10.2)
		check(GatewayState{Known: true, Since: at(9.75), MAC: vrrp, Answered: at(7.4), Misses: 3})
		w.say(reply, reply)
		check(GatewayState{Known: true, Reachable: true, Since: at(10.2), MAC: otherMAC, Answered: at(10.2)})

		want := []string{
			"gateway false  at 1.35s", "gateway true 02:00:5e:10:00:50 at 4s",
			"gateway false 00:00:5e:00:01:01 at 9.75s", "gateway true 02:00:5e:10:00:50 at 10.2s",
		}
		if diff := cmp.Diff(want, *reports); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		// The first request after an answer is for the gateway alone.
		const all = " ff:ff:ff:ff:ff:ff"
		if diff := cmp.Diff([]string{
			"0s" + all, "450ms" + all, "900ms" + all, "1.35s" + all, "2.35s" + all, "3.35s" + all,
			"5s 02:00:5e:10:00:50",
			"6.4s 02:00:5e:10:00:50", "6.85s" + all, "7.3s" + all,
			"8.4s 00:00:5e:00:01:01", "8.85s" + all, "9.3s" + all, "9.75s" + all,
		}, w.requests(t, start)); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

// requests returns the times and receivers of the requests that were sent.
func (w *wire) requests(t *testing.T, start time.Time) (sent []string) {
	t.Helper()
	for _, f := range w.frames() {
		if !bytes.Equal(f.frame[6:], unhex(t, gatewayRequest)[6:]) {
			t.Errorf("sent %x", f.frame)
		}
		sent = append(sent, fmt.Sprint(f.at.Sub(start), " ", net.HardwareAddr(f.frame[:6])))
	}
	return sent
}

// While another program requests the gateway each second, as arping does, the Watch sends
// nothing, and knows within 3 s if the gateway is lost.
func TestGatewayAnswersAnotherProgram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		watch, reports := run(t, w)
		start := time.Now()
		if err := watch.ProbeGateway(); err != nil {
			t.Error(err)
		}
		w.say(Packet{Reply, otherMAC, gateway, ourMAC, address})
		time.Sleep(500 * time.Millisecond)
		for range 10 {
			w.say(Packet{Reply, otherMAC, gateway, ourMAC, address})
			time.Sleep(time.Second)
		}
		if sent := w.requests(t, start); len(sent) != 1 {
			t.Errorf("sent %q, want the first request only", sent)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if want := []string{"gateway true 02:00:5e:10:00:50 at 0s", "gateway false 02:00:5e:10:00:50 at 12.35s"}; !slices.Equal(*reports, want) {
			t.Errorf("reports %q, want %q", *reports, want)
		}
	})
}

// A gateway that takes half a second for each answer is never unreachable.
func TestSlowGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		w.sending = func() {
			time.AfterFunc(500*time.Millisecond, func() { w.packets <- Packet{Reply, otherMAC, gateway, ourMAC, address} })
		}
		watch, reports := run(t, w)
		if err := watch.ProbeGateway(); err != nil {
			t.Error(err)
		}
		time.Sleep(100 * time.Second)
		synctest.Wait()
		if want := []string{"gateway true 02:00:5e:10:00:50 at 500ms"}; !slices.Equal(*reports, want) {
			t.Errorf("reports %q, want %q", *reports, want)
		}
		time.Sleep(time.Second)
	})
}

// A gateway that is lost without a carrier is in the state at once, and is reported if 3
// requests with a carrier are unanswered, once.
func TestGatewayWithoutCarrier(t *testing.T) {
	reply := Packet{Reply, otherMAC, gateway, ourMAC, address}
	for name, test := range map[string]struct {
		restored []time.Duration // carrier back, and lost again, in turn; from its loss at 500ms
		answers  time.Duration   // 0: never
		want     []string
	}{
		"still silent":       {[]time.Duration{10e9}, 0, []string{"gateway false 02:00:5e:10:00:50 at 11.85s"}},
		"before it is lost":  {[]time.Duration{1e9}, 0, []string{"gateway false 02:00:5e:10:00:50 at 2.85s"}},
		"answers":            {[]time.Duration{10e9}, 11e9, []string{"gateway true 02:00:5e:10:00:50 at 11.5s"}},
		"never back":         {nil, 0, nil},
		"back and lost":      {[]time.Duration{10e9, 11e9}, 0, nil},
		"back, lost, back":   {[]time.Duration{10e9, 11e9, 20e9}, 0, []string{"gateway false 02:00:5e:10:00:50 at 21.85s"}},
		"lost again, silent": {[]time.Duration{10e9, 15e9, 20e9}, 0, []string{"gateway false 02:00:5e:10:00:50 at 11.85s"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWire()
				watch, reports := run(t, w)
				begin := time.Now()
				if err := watch.ProbeGateway(); err != nil {
					t.Fatal(err)
				}
				w.say(reply)
				*reports = nil
				time.Sleep(500 * time.Millisecond)
				lost := time.Now()
				watch.SetCarrier(false)
				if test.answers > 0 {
					time.AfterFunc(test.answers, func() { w.packets <- reply })
				}
				for i, at := range test.restored {
					time.Sleep(time.Until(lost.Add(at)))
					if g := watch.State().Gateway; i == 0 && at > 3*time.Second && (g.Reachable || g.Since.Sub(begin) != 2350*time.Millisecond) {
						t.Errorf("gateway %+v before the carrier is back, want unreachable after 2.35s", g)
					}
					watch.SetCarrier(i%2 == 0)
					watch.SetCarrier(i%2 == 0) // changes nothing
				}
				if test.answers > 0 {
					time.Sleep(time.Until(lost.Add(test.answers + time.Second)))
				} else {
					time.Sleep(time.Minute)
				}
				synctest.Wait()
				if diff := cmp.Diff(test.want, *reports); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
			})
		})
	}
}

// Earlier unanswered requests count.
func TestGatewayMissesBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var unreachable time.Time
		watch := newWatch(Options{
			MAC: ourMAC, Addresses: []netip.Addr{address}, Gateway: gateway, Misses: 1,
			GatewayChanged: func(bool, net.HardwareAddr) { unreachable = time.Now() },
		}, newWire())
		defer watch.Close()
		start := time.Now()
		if err := watch.ProbeGateway(); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if after := unreachable.Sub(start); after != 2*gatewayRetry {
			t.Errorf("unreachable after %s, want 900ms", after)
		}
	})
}

// A request that cannot be sent counts as a miss.
func TestGatewayRequestFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		watch, reports := run(t, w)
		w.fail = os.ErrPermission
		if err := watch.ProbeGateway(); !errors.Is(err, os.ErrPermission) {
			t.Errorf("%v, want %v", err, os.ErrPermission)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if want := []string{"gateway false  at 1.35s"}; !slices.Equal(*reports, want) {
			t.Errorf("reports %q, want %q", *reports, want)
		}
	})
}

// A closed Watch sends no more requests, and counts no more misses.
func TestGatewayClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		watch := newWatch(Options{MAC: ourMAC, Addresses: []netip.Addr{address}, Gateway: gateway}, w)
		if err := watch.ProbeGateway(); err != nil {
			t.Error(err)
		}
		w.mu.Lock()
		w.fail = os.ErrClosed
		w.mu.Unlock()
		time.Sleep(time.Minute)
		watch.Close()
		if s := watch.State(); s.Gateway.Misses != 0 || len(w.frames()) != 1 {
			t.Errorf("state %+v, sent %d", s, len(w.frames()))
		}
	})
}

func TestNoGateway(t *testing.T) {
	w := newWire()
	watch := newWatch(Options{MAC: ourMAC, Addresses: []netip.Addr{address}}, w)
	for range 10 {
		if err := watch.ProbeGateway(); err != nil {
			t.Error(err)
		}
	}
	if s := watch.State(); s.Gateway.Known || len(w.frames()) != 0 {
		t.Errorf("state %+v, sent %d", s, len(w.frames()))
	}
}

// A callback may call State, and every option may be empty.
func TestCallbacks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		var watch *Watch
		var seen State
		watch = newWatch(Options{
			MAC: ourMAC, Addresses: []netip.Addr{address}, Gateway: gateway,
			Conflict: func(netip.Addr, net.HardwareAddr) { seen = watch.State() },
		}, w)
		watch.see(theirClaim)
		watch.see(Packet{Reply, otherMAC, gateway, ourMAC, address})
		if seen.Conflicts != 1 || seen.Defences != 1 {
			t.Errorf("state in the callback: %+v", seen)
		}
		newWatch(Options{MAC: ourMAC, Addresses: []netip.Addr{address}}, newWire()).see(theirClaim)
	})
}

func TestNewWatchRefuses(t *testing.T) {
	for name, o := range map[string]Options{
		"no interface":        {MAC: ourMAC, Addresses: []netip.Addr{address}},
		"no hardware address": {Index: 1, Addresses: []netip.Addr{address}},
		"no address":          {Index: 1, MAC: ourMAC},
		"an IPv6 gateway":     {Index: 1, MAC: ourMAC, Addresses: []netip.Addr{address}, Gateway: netip.MustParseAddr("2001:db8::1")},
		"another's index":     {Index: 1 << 30, MAC: ourMAC, Addresses: []netip.Addr{address}},
	} {
		if w, err := NewWatch(o); err == nil {
			w.Close()
			t.Errorf("%s: want an error", name)
		}
	}
}

// Each address is defended and reported on its own.
func TestConflictsOfTwoAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		watch, _ := run(t, w)
		watch.options.Addresses = []netip.Addr{address, neighbour}
		var claimed []netip.Addr
		watch.options.Conflict = func(a netip.Addr, _ net.HardwareAddr) { claimed = append(claimed, a) }
		second := theirClaim
		second.SenderIP = neighbour
		w.say(theirClaim, second, theirClaim, second)
		if s := watch.State(); s.Conflicts != 4 || s.Defences != 2 || s.Conflicting != neighbour || !slices.Equal(claimed, []netip.Addr{address, neighbour}) {
			t.Errorf("state %+v, reported %v", s, claimed)
		}
	})
}
