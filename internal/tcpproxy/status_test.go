package tcpproxy

import (
	"errors"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// wantStatus waits for a status, since connections are counted when they end.
func wantStatus(t *testing.T, p *Proxy, want ...Status) {
	t.Helper()
	await(t, func() error {
		got := p.Status()
		for i := range got {
			got[i].Since = time.Time{}
			if got[i].Err != nil {
				got[i].Err = errors.Unwrap(got[i].Err)
			}
		}
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b error) bool { return (a == nil) == (b == nil) })); diff != "" {
			return fmt.Errorf("status (- want, + got):\n%s", diff)
		}
		return nil
	})
}

func TestStatus(t *testing.T) {
	t.Parallel()
	serve(t, "127.0.1.1:87")
	p, _, _ := newProxy(t, nil)
	apply(t, p, "7011 127.0.1.1 87\n7012 127.0.1.1 1\n7013 gone.example")
	first := connect(t, 7011)
	first.ask(t, "127.0.1.1:87")
	second := connect(t, 7011)
	second.ask(t, "127.0.1.1:87")
	_ = second.Close()
	wantRefusal(t, 7012)

	up := Status{Destination: Destination{7011, "127.0.1.1", 87}, Addresses: 1, Looked: true}
	up.Counts = Counts{Connections: 2, Open: 1, Sent: 3, Received: int64(len("127.0.1.1:87 \"hi\\n\"\n"))}
	down := Status{Destination: Destination{7012, "127.0.1.1", 1}, Condition: Unusable, Addresses: 1, Aside: 1, Looked: true, Counts: Counts{Connections: 1, Failed: 1}}
	got := p.Status()
	if len(got) != 3 || got[2].Condition != Unusable || !got[2].Looked || got[2].LookupErr == nil || got[2].Lookups == 0 || got[2].Lookups != got[2].LookupFailures {
		t.Errorf("a name that does not exist: %+v", got[2])
	}
	apply(t, p, "7011 127.0.1.1 87\n7012 127.0.1.1 1") // the remaining ones keep their counters
	wantStatus(t, p, up, down)
	if n := p.Open(); n != 1 {
		t.Errorf("%d connections are open, want 1", n)
	}
	apply(t, p, "# none")
	wantStatus(t, p, []Status{}...)
	if n := p.Open(); n != 1 {
		t.Errorf("%d connections are open without a destination, want 1", n)
	}
}

// The status of a port in use has the time of the first failure.
func TestStatusOfPortInUse(t *testing.T) {
	other, err := net.Listen("tcp", ":7014")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	p, _, _ := newProxy(t, nil)
	list, err := Parse("7014 127.0.1.1 80")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Apply(list); err == nil {
		t.Fatal("the port is in use")
	}
	since := p.Status()[0].Since
	if err := p.Apply(list); err == nil {
		t.Fatal("the port is in use")
	}
	s := p.Status()[0]
	if s.Err == nil || s.Condition != Unusable || since.IsZero() || s.Since != since {
		t.Errorf("status %+v, at first since %s", s, since)
	}
	_ = other.Close()
	if err := p.Apply(list); err != nil {
		t.Fatal(err)
	}
	if s := p.Status()[0]; s.Err != nil || s.Condition != Usable {
		t.Errorf("status %+v", s)
	}
}

// The condition follows look-ups and connections, and has the time of its change.
func TestCondition(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world, p *pool) {
		start := time.Now()
		expect := func(step string, want Condition, since time.Duration) {
			t.Helper()
			synctest.Wait()
			var s Status
			p.status(&s)
			if s.Condition != want || s.Since.Sub(start) != since {
				t.Errorf("%s: condition %d since %s, want %d since %s", step, s.Condition, s.Since.Sub(start), want, since)
			}
		}
		w.set("192.0.2.1", "192.0.2.2")
		p.start(t.Context())
		expect("answered", Usable, 0)

		time.Sleep(10 * time.Second)
		w.breaks("192.0.2.1", errors.New("refused"))
		for range 2 {
			_, _ = w.connect(t.Context(), p)
		}
		expect("one is aside", Impaired, 10*time.Second)
		time.Sleep(time.Second)
		w.breaks("192.0.2.2", errors.New("refused"))
		_, _ = w.connect(t.Context(), p) // tries, with pauses, until all are
		var s Status
		p.status(&s)
		if s.Condition != Unusable || s.Aside != 2 || s.Addresses != 2 {
			t.Errorf("none answers: %+v", s)
		}
		w.breaks("192.0.2.1", nil)
		w.breaks("192.0.2.2", nil)
		time.Sleep(time.Minute) // probes
		synctest.Wait()
		if p.status(&s); s.Condition != Usable || s.Aside != 0 {
			t.Errorf("both answer again: %+v", s)
		}

		w.fail(errors.New("no answer"))
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if p.status(&s); s.Condition != Impaired || s.Addresses != 2 || s.LookupErr == nil {
			t.Errorf("name servers are silent: %+v", s)
		}
		w.fail(notFoundError{errors.New("no such name")})
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if p.status(&s); s.Condition != Unusable || s.Addresses != 0 {
			t.Errorf("removed name: %+v", s)
		}
	})
}
