package cli

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// untilSignal returns a context that ends with SIGTERM or SIGINT, and a channel that is closed at the
// next one. Both are received from the start, so that the second one counts however soon it follows.
func untilSignal(parent context.Context) (ctx context.Context, again <-chan struct{}, stop func()) {
	received := make(chan os.Signal, 2)
	signal.Notify(received, syscall.SIGTERM, syscall.SIGINT)
	ctx, again, end := twice(parent, received)
	return ctx, again, func() {
		signal.Stop(received)
		end()
	}
}

// twice returns a context that ends with the first signal, and a channel that is closed at the second.
// It also ends with its parent: then every signal is the second one.
func twice(parent context.Context, received <-chan os.Signal) (ctx context.Context, again <-chan struct{}, stop func()) {
	ctx, cancel := context.WithCancel(parent)
	second, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		select {
		case <-received:
			cancel()
		case <-parent.Done():
		case <-stopped:
			return
		}
		select {
		case <-received:
			close(second)
		case <-stopped:
		}
	}()
	return ctx, second, func() {
		close(stopped)
		cancel()
	}
}
