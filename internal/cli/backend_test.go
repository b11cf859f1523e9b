package cli

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/rules"
)

// partial is a kernel that refuses plans.
type partial struct {
	router.Rules
	refuses func(rules.Plan) bool
	loaded  rules.Plan // empty: none
	loads   int        // attempts
}

func (k *partial) Apply(_ context.Context, plan rules.Plan) (undo func() error, err error) {
	k.loads++
	if k.refuses(plan) {
		return nil, &nft.LoadError{Err: unix.ENOENT}
	}
	before := k.loaded
	k.loaded = plan
	return func() error { k.loaded = before; return nil }, nil
}

// The largest plan that the kernel accepts is loaded, and the source guard is given up
// only if the kernel refuses it without the drop log, too. A plan that the kernel refuses
// without every part is tried three times.
func TestLargestPlanIsLoaded(t *testing.T) {
	plan := rules.NewPlan(rules.Set{Fallback: netip.MustParseAddr("203.0.113.27")},
		rules.Sides{Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{netip.MustParseAddr("192.168.12.99")}, Mark: 0x1000}).WithDropLog()
	has := func(parts ...rules.Part) func(rules.Plan) bool {
		return func(p rules.Plan) bool {
			return slices.ContainsFunc(parts, func(part rules.Part) bool { return slices.Contains(p.Parts(), part) })
		}
	}
	never := func(rules.Plan) bool { return false }
	always := func(rules.Plan) bool { return true }
	times := func(n int) func(rules.Plan) bool {
		return func(rules.Plan) bool { n--; return n >= 0 }
	}
	const drop, clamp = rules.DropLogPart, rules.MSSClampPart
	for name, test := range map[string]struct {
		rules, guard func(rules.Plan) bool // refuse
		optional     bool
		without      []rules.Part
		log          string // without the warnings' attributes
		loads        int    // at most, of the rules
		guardIsLost  bool
		fails        bool
	}{
		"everything":             {rules: never, guard: never, optional: true, loads: 1},
		"a failure that passes":  {rules: times(1), guard: never, optional: true, loads: 2},
		"drop log":               {rules: has(drop), guard: never, optional: true, without: []rules.Part{drop}, log: "drop log not loaded", loads: 4},
		"clamp":                  {rules: has(clamp), guard: never, optional: true, without: []rules.Part{clamp}, log: "MSS clamp not loaded", loads: 5},
		"both":                   {rules: has(drop, clamp), guard: never, optional: true, without: []rules.Part{drop, clamp}, log: "drop log not loaded, MSS clamp not loaded", loads: 5},
		"guard":                  {rules: never, guard: always, optional: true, log: "source guard not loaded", loads: 1, guardIsLost: true},
		"guard, drop log":        {rules: has(drop), guard: always, optional: true, without: []rules.Part{drop}, log: "source guard not loaded, drop log not loaded", loads: 4, guardIsLost: true},
		"drop log of the guard":  {rules: never, guard: has(drop), optional: true, without: []rules.Part{drop}, log: "drop log not loaded", loads: 2},
		"guard that passes":      {rules: never, guard: times(1), optional: true, loads: 1},
		"hopeless":               {rules: always, guard: never, optional: true, loads: 3, fails: true},
		"hopeless without guard": {rules: always, guard: always, optional: true, log: "source guard not loaded", loads: 3, guardIsLost: true, fails: true},
		"guard of nftables":      {rules: never, guard: always, loads: 0, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			var log strings.Builder
			b := &backend{choice: config.IPTables, log: slog.New(slog.NewTextHandler(&log, nil))}
			first, guard := &partial{refuses: test.rules}, &partial{refuses: test.guard}
			g := &guarded{b, first, guard, test.optional}
			undo, err := g.Apply(t.Context(), plan)
			if (err != nil) != test.fails {
				t.Fatalf("error %v, want one: %v", err, test.fails)
			}
			var warned []string
			for line := range strings.Lines(log.String()) {
				_, line, _ = strings.Cut(line, `msg="`)
				line, _, _ = strings.Cut(line, `"`)
				warned = append(warned, line)
			}
			if got := strings.Join(warned, ", "); got != test.log {
				t.Errorf("log %q, want %q", got, test.log)
			}
			if first.loads > test.loads {
				t.Errorf("%d loads, want at most %d", first.loads, test.loads)
			}
			if (g.guard == nil) != test.guardIsLost {
				t.Errorf("guard %v, want it lost: %v", g.guard, test.guardIsLost)
			}
			want := plan.WithoutParts(test.without)
			if test.fails {
				want = rules.Plan{}
			} else if !test.guardIsLost && !guard.loaded.Equal(want) {
				t.Errorf("parts of the guard: %q", guard.loaded.Parts())
			}
			if !first.loaded.Equal(want) {
				t.Errorf("parts %q, want %q", first.loaded.Parts(), want.Parts())
			}
			if undo != nil {
				if err := undo(); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff([]int{0, 0}, []int{len(first.loaded.Chains), len(guard.loaded.Chains)}); diff != "" {
				t.Errorf("chains after the rollback: - want, + got:\n%s", diff)
			}
		})
	}
}
