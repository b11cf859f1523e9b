package cli

import (
	"context"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
)

// The second signal counts, also if it comes before anything has noticed the first one.
func TestSecondSignal(t *testing.T) {
	ended := func(c <-chan struct{}) bool {
		synctest.Wait()
		select {
		case <-c:
			return true
		default:
			return false
		}
	}
	for name, test := range map[string]func(t *testing.T, received chan os.Signal){
		"one after the other": func(t *testing.T, received chan os.Signal) {
			ctx, again, stop := twice(t.Context(), received)
			defer stop()
			if ended(ctx.Done()) || ended(again) {
				t.Error("ended without a signal")
			}
			received <- syscall.SIGTERM
			if !ended(ctx.Done()) || ended(again) {
				t.Error("after the first signal")
			}
			received <- syscall.SIGINT
			if !ended(again) {
				t.Error("after the second signal")
			}
		},
		"both at once": func(t *testing.T, received chan os.Signal) {
			received <- syscall.SIGTERM
			received <- syscall.SIGTERM
			ctx, again, stop := twice(t.Context(), received)
			defer stop()
			<-ctx.Done()
			<-again
		},
		"after the end of the parent": func(t *testing.T, received chan os.Signal) {
			parent, end := context.WithCancel(t.Context())
			ctx, again, stop := twice(parent, received)
			defer stop()
			end()
			if !ended(ctx.Done()) || ended(again) {
				t.Error("after the end of the parent")
			}
			received <- syscall.SIGTERM
			<-again
		},
		"stopped": func(t *testing.T, received chan os.Signal) {
			ctx, again, stop := twice(t.Context(), received)
			stop()
			if !ended(ctx.Done()) || ended(again) {
				t.Error("after the end")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, make(chan os.Signal, 2)) })
		})
	}
}

// Signals of the process arrive.
func TestUntilSignal(t *testing.T) {
	ctx, again, stop := untilSignal(t.Context())
	defer stop()
	for _, c := range []<-chan struct{}{ctx.Done(), again} {
		if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-c
	}
}

// A drain ends at the second signal, and not at the first one.
func TestCutAtSecondSignal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cut := 0
		again, stays := make(chan struct{}), make(chan struct{})
		go cutAt(again, stays, func() { cut++ })
		synctest.Wait()
		if cut != 0 {
			t.Error("cut without a signal")
		}
		close(again)
		synctest.Wait()
		if cut != 1 {
			t.Errorf("cut %d times after the signal", cut)
		}
		close(stays)
		cutAt(nil, stays, func() { t.Error("cut at the end") })
	})
}
