package nstest_test

import (
	"testing"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestLong(t *testing.T) {
	for value, want := range map[string]bool{"": false, "0": false, "1": true} {
		t.Setenv("EGRESS_TEST_LONG", value)
		if got := nstest.Long(); got != want {
			t.Errorf("Long() with EGRESS_TEST_LONG=%q = %t, want %t", value, got, want)
		}
	}
}
