package router

import (
	"maps"
	"testing"

	"github.com/egress-router/egress-router/rules"
)

// A counter that is lower than before is that of a rule that was loaded again.
func TestDropsAdd(t *testing.T) {
	first := rules.DropRule{Family: rules.IPv4, Table: rules.Filter, Hook: rules.Input, Number: 1, Reason: rules.Invalid}
	second := first
	second.Number = 2
	other := first
	other.Hook, other.Reason = rules.Forward, rules.OtherInterface
	var d drops
	for i, step := range []struct {
		now            rules.Drops
		invalid, other uint64
	}{
		{rules.Drops{first: 5, second: 7, other: 1}, 12, 1},
		{rules.Drops{first: 5, second: 8, other: 1}, 13, 1},
		{rules.Drops{first: 2, second: 9, other: 3}, 16, 3}, // the first rule was loaded again
		{rules.Drops{other: 3}, 16, 3},                      // the chain is missing
		{rules.Drops{first: 4, second: 9, other: 0}, 29, 3},
		{rules.Drops{first: 4, second: 9, other: 1}, 29, 4},
	} {
		d.add(step.now)
		if want := map[rules.Reason]uint64{rules.Invalid: step.invalid, rules.OtherInterface: step.other}; !maps.Equal(d.total, want) {
			t.Errorf("step %d: %v, want %v", i, d.total, want)
		}
	}
}
