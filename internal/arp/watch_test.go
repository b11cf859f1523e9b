package arp

import (
	"bytes"
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
		MAC: ourMAC, Address: address, Gateway: gateway,
		Conflict:       func(mac net.HardwareAddr) { tell("conflict %s", mac) },
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
		probe := func() {
			t.Helper()
			time.Sleep(10 * time.Second)
			if err := watch.ProbeGateway(); err != nil {
				t.Error(err)
			}
		}
		reply := Packet{Reply, otherMAC, gateway, ourMAC, address}
		check := func(want GatewayState) {
			t.Helper()
			if diff := cmp.Diff(want, watch.State().Gateway); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		}
		at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }

		check(GatewayState{})
		probe()
		probe()
		probe()
		check(GatewayState{Misses: 2})
		probe() // at 40 s: the third miss
		check(GatewayState{Known: true, Since: at(40), Misses: 3})
		probe()
		check(GatewayState{Known: true, Since: at(40), Misses: 4})
		w.say(reply)
		check(GatewayState{Known: true, Reachable: true, Since: at(50), MAC: otherMAC, Answered: at(50)})
		probe()
		w.say(reply)
		probe()
		probe()
		probe() // at 90 s: two misses
		check(GatewayState{Known: true, Reachable: true, Since: at(50), MAC: otherMAC, Answered: at(60), Misses: 2})
		// Another router takes over and sends a request.
		w.say(Packet{Request, net.HardwareAddr{0, 0, 0x5e, 0, 1, 1}, gateway, unknown(), neighbour})
		vrrp := net.HardwareAddr{0, 0, 0x5e, 0, 1, 1}
		check(GatewayState{Known: true, Reachable: true, Since: at(50), MAC: vrrp, Answered: at(90)})
		probe()
		probe()
		probe()
		probe() // at 130 s
		check(GatewayState{Known: true, Since: at(130), MAC: vrrp, Answered: at(90), Misses: 3})
		w.say(reply, reply)
		probe() // answered: no miss
		check(GatewayState{Known: true, Reachable: true, Since: at(130), MAC: otherMAC, Answered: at(130)})

		want := []string{
			"gateway false  at 40s", "gateway true 02:00:5e:10:00:50 at 50s",
			"gateway false 00:00:5e:00:01:01 at 2m10s", "gateway true 02:00:5e:10:00:50 at 2m10s",
		}
		if diff := cmp.Diff(want, *reports); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		for _, f := range w.frames() {
			if !bytes.Equal(f.frame, unhex(t, gatewayRequest)) {
				t.Errorf("sent %x", f.frame)
			}
		}
	})
}

// A request that cannot be sent counts as a miss.
func TestGatewayRequestFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		watch, reports := run(t, w)
		w.fail = os.ErrPermission
		for range 4 {
			if err := watch.ProbeGateway(); err == nil {
				t.Error("no error")
			}
		}
		if want := []string{"gateway false  at 0s"}; !slices.Equal(*reports, want) {
			t.Errorf("reports %q, want %q", *reports, want)
		}
	})
}

func TestNoGateway(t *testing.T) {
	w := newWire()
	watch := newWatch(Options{MAC: ourMAC, Address: address}, w)
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
			MAC: ourMAC, Address: address, Gateway: gateway,
			Conflict: func(net.HardwareAddr) { seen = watch.State() },
		}, w)
		watch.see(theirClaim)
		watch.see(Packet{Reply, otherMAC, gateway, ourMAC, address})
		if seen.Conflicts != 1 || seen.Defences != 1 {
			t.Errorf("state in the callback: %+v", seen)
		}
		newWatch(Options{MAC: ourMAC, Address: address}, newWire()).see(theirClaim)
	})
}

func TestNewWatchRefuses(t *testing.T) {
	for name, o := range map[string]Options{
		"no interface":        {MAC: ourMAC, Address: address},
		"no hardware address": {Index: 1, Address: address},
		"no address":          {Index: 1, MAC: ourMAC},
		"an IPv6 gateway":     {Index: 1, MAC: ourMAC, Address: address, Gateway: netip.MustParseAddr("2001:db8::1")},
		"another's index":     {Index: 1 << 30, MAC: ourMAC, Address: address},
	} {
		if w, err := NewWatch(o); err == nil {
			w.Close()
			t.Errorf("%s: want an error", name)
		}
	}
}
