package httpproxy

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// The first end of an expectation counts: its time, or the server's response.
func TestExpectation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		e := newExpectation()
		if <-e.met; e.err != nil || time.Since(begun) != expectPatience {
			t.Errorf("%v after %v", e.err, time.Since(begun))
		}
		if e.end(errFinalAnswer); e.err != nil {
			t.Errorf("a second end counts: %v", e.err)
		}
		e = newExpectation()
		e.end(errFinalAnswer)
		if <-e.met; !errors.Is(e.err, errFinalAnswer) {
			t.Errorf("%v", e.err)
		}
		time.Sleep(2 * expectPatience)
		(*expectation)(nil).end(nil)
	})
	// The timer may end it before newExpectation has set the timer.
	e := &expectation{met: make(chan struct{})}
	if e.meet(nil); e.err != nil {
		t.Error(e.err)
	}
	<-e.met
}
