package arp

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A wire is a port that the test controls, for the clock of synctest.
type wire struct {
	packets chan Packet
	done    chan struct{}
	once    sync.Once

	mu   sync.Mutex
	sent []sent
	fail error // error of send
	// sending is called for each frame; may be nil.
	sending func()
}

type sent struct {
	at    time.Time
	frame []byte
}

func newWire() *wire { return &wire{packets: make(chan Packet, 100), done: make(chan struct{})} }

func (w *wire) send(frame []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fail != nil {
		return w.fail
	}
	w.sent = append(w.sent, sent{time.Now(), bytes.Clone(frame)})
	if w.sending != nil {
		w.sending()
	}
	return nil
}

func (w *wire) frames() []sent {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]sent(nil), w.sent...)
}

func (w *wire) receive(until time.Time) (Packet, error) {
	var end <-chan time.Time
	if !until.IsZero() {
		end = time.After(time.Until(until))
	}
	select {
	case <-w.done:
		return Packet{}, os.ErrClosed
	default:
	}
	select {
	case p := <-w.packets:
		return p, nil
	default:
	}
	select {
	case p := <-w.packets:
		return p, nil
	case <-end:
		return Packet{}, os.ErrDeadlineExceeded
	case <-w.done:
		return Packet{}, os.ErrClosed
	}
}

func (w *wire) close() { w.once.Do(func() { close(w.done) }) }

func (w *wire) closed() bool {
	select {
	case <-w.done:
		return true
	default:
		return false
	}
}

var (
	theirClaim = Packet{Reply, otherMAC, address, ourMAC, zeroIP}
	theirProbe = Packet{Request, otherMAC, zeroIP, unknown(), address}
	ourProbe   = Packet{Request, ourMAC, zeroIP, unknown(), address}
	ourClaim   = Packet{Request, ourMAC, address, unknown(), address}
)

func TestAnswer(t *testing.T) {
	for name, test := range map[string]struct {
		packets []Packet
		want    net.HardwareAddr
		after   time.Duration
	}{
		"free":                {nil, nil, 50 * time.Millisecond},
		"held":                {[]Packet{theirClaim}, otherMAC, 0},
		"our own, sent back":  {[]Packet{ourProbe, ourClaim}, nil, 50 * time.Millisecond},
		"another probes":      {[]Packet{theirProbe}, nil, 50 * time.Millisecond},
		"held, and a prober":  {[]Packet{theirProbe, ourProbe, theirClaim}, otherMAC, 0},
		"about other address": {[]Packet{{Reply, otherMAC, neighbour, ourMAC, address}}, nil, 50 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWire()
				q := &Question{w, ourMAC, address}
				for _, p := range test.packets {
					w.packets <- p
				}
				start := time.Now()
				got, err := q.Answer(t.Context(), start.Add(50*time.Millisecond))
				if err != nil || !bytes.Equal(got, test.want) {
					t.Errorf("holder %v, %v; want %v", got, err, test.want)
				}
				if took := time.Since(start); took != test.after {
					t.Errorf("took %s, want %s", took, test.after)
				}
				if !w.closed() {
					t.Error("not closed")
				}
			})
		})
	}
}

func TestAnswerEndsWithContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		q := &Question{newWire(), ourMAC, address}
		_, err := q.Answer(ctx, time.Now().Add(time.Hour))
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want %v", err, context.DeadlineExceeded)
		}
	})
}

func TestAcquireFree(t *testing.T) {
	// The waits are random, so the test repeats the run.
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			w := newWire()
			w.packets <- ourProbe // sent back by a switch
			start := time.Now()
			holder, err := acquire(t.Context(), w, unhex(t, probe), conflicting(ourMAC, address))
			if holder != nil || err != nil {
				t.Fatalf("holder %v, %v; want none", holder, err)
			}
			last := start
			frames := w.frames()
			if len(frames) != 3 {
				t.Fatalf("%d probes, want 3", len(frames))
			}
			for i, f := range frames {
				if !bytes.Equal(f.frame, unhex(t, probe)) {
					t.Errorf("sent %x", f.frame)
				}
				low, high := time.Second, 2*time.Second
				if i == 0 {
					low, high = 0, time.Second
				}
				if wait := f.at.Sub(last); wait < low || wait > high {
					t.Errorf("probe %d after %s, want %s to %s", i+1, wait, low, high)
				}
				last = f.at
			}
			if wait := time.Since(last); wait != 2*time.Second {
				t.Errorf("free %s after the last probe, want 2s", wait)
			}
		})
	}
}

// A conflict ends the probe at once, at any time.
func TestAcquireConflict(t *testing.T) {
	for name, packet := range map[string]Packet{
		"answer":             theirClaim,
		"announcement":       {Request, otherMAC, address, unknown(), address},
		"simultaneous probe": theirProbe,
	} {
		t.Run(name, func(t *testing.T) {
			for _, after := range []time.Duration{0, time.Second, 2 * time.Second, 3500 * time.Millisecond} {
				synctest.Test(t, func(t *testing.T) {
					w := newWire()
					start := time.Now()
					time.AfterFunc(after, func() { w.packets <- packet })
					holder, err := acquire(t.Context(), w, unhex(t, probe), conflicting(ourMAC, address))
					if !bytes.Equal(holder, otherMAC) || err != nil {
						t.Errorf("holder %v, %v; want %v", holder, err, otherMAC)
					}
					if took := time.Since(start); took != after {
						t.Errorf("took %s, want %s", took, after)
					}
				})
			}
		})
	}
}

func TestAcquireFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire()
		w.fail = os.ErrPermission
		if _, err := acquire(t.Context(), w, nil, conflicting(ourMAC, address)); !errors.Is(err, os.ErrPermission) {
			t.Errorf("%v, want %v", err, os.ErrPermission)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		w := newWire()
		_, err := acquire(ctx, w, nil, conflicting(ourMAC, address))
		if err = failure(ctx, address, err); !errors.Is(err, context.DeadlineExceeded) || !w.closed() {
			t.Errorf("%v, want %v", err, context.DeadlineExceeded)
		}
	})
}
