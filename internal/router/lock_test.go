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
