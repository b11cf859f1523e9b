package nstest_test

import (
	"slices"
	"testing"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestEnvironment(t *testing.T) {
	t.Setenv("GOCOVERDIR", "")
	t.Setenv("GORACE", "")
	if got := nstest.Environment(); len(got) != 0 {
		t.Errorf("Environment() = %q, want none", got)
	}
	t.Setenv("GOCOVERDIR", "/a")
	t.Setenv("GORACE", "halt_on_error=1")
	if got, want := nstest.Environment(), []string{"GOCOVERDIR=/a", "GORACE=halt_on_error=1"}; !slices.Equal(got, want) {
		t.Errorf("Environment() = %q, want %q", got, want)
	}
}
