package router

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egress-router/egress-router/internal/netns"
)

// A router that waits for the lock gives up when it is stopped, or after
// lockPatience, and gets the lock when the other one releases it.
func TestLockWaits(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	synctest.Test(t, func(t *testing.T) {
		if err := ns.Do(func() error {
			release, err := lock(t.Context())
			if err != nil {
				return err
			}
			stopped, stop := context.WithTimeout(t.Context(), time.Second)
			defer stop()
			if _, err := lock(stopped); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("stopped: %v, want %v", err, context.DeadlineExceeded)
			}
			if _, err := lock(t.Context()); err == nil || !strings.Contains(err.Error(), "held by another egress-router") {
				t.Errorf("after %v: %v, want an error that names the other router", lockPatience, err)
			}
			time.AfterFunc(time.Second, release)
			again, err := lock(t.Context())
			if err == nil {
				again()
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	})
}

// A router that takes the lock again as soon as it has released it keeps no other out.
func TestLockIsFair(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	synctest.Test(t, func(t *testing.T) {
		const comparisons = 1000
		held, greedy := make(chan struct{}), make(chan error, 1)
		go func() {
			greedy <- ns.Do(func() error {
				for n := range comparisons {
					release, err := lock(t.Context())
					if err != nil {
						return err
					}
					if n == 0 {
						close(held)
					}
					time.Sleep(300*time.Millisecond + time.Microsecond) // in step with no other
					release()
				}
				return nil
			})
		}()
		<-held
		for n := range 20 {
			if err := ns.Do(func() error {
				release, err := lock(t.Context())
				if err == nil {
					release()
				}
				return err
			}); err != nil {
				t.Errorf("time %d: %v", n, err)
				break
			}
		}
		if err := <-greedy; err != nil {
			t.Errorf("the other router: %v", err)
		}
	})
}
