package router_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/wording"
)

// hinted is an error with a hint, empty in some cases.
type hinted string

func (hinted) Error() string               { return "failed" }
func (h hinted) Hint(wording.Names) string { return string(h) }

func TestHintIsFirstInTree(t *testing.T) {
	plain := errors.New("plain")
	for name, test := range map[string]struct {
		err  error
		want string
	}{
		"no error":            {nil, ""},
		"no hint":             {fmt.Errorf("call: %w", plain), ""},
		"wrapped":             {fmt.Errorf("call: %w", hinted("do this")), "do this"},
		"behind an empty one": {errors.Join(fmt.Errorf("load: %w", hinted("")), fmt.Errorf("undo: %w", hinted("restart"))), "restart"},
		"first of two":        {errors.Join(plain, hinted("first"), hinted("second")), "first"},
		"several %w":          {fmt.Errorf("%w: %w", plain, hinted("do this")), "do this"},
	} {
		if got := router.Hint(test.err, nil); got != test.want {
			t.Errorf("%s: hint %q, want %q", name, got, test.want)
		}
	}
}
