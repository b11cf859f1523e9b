package cli

import (
	"fmt"
	"log/slog"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
)

// A flowtable is the kernel's shortcut for established connections.
type flowtable struct{}

func (flowtable) of(want plan.Flowtable) nft.Flowtable {
	return nft.Flowtable{Cluster: want.Cluster, Egress: want.Egress, Sources: want.Sources, Mark: want.Mark}
}

// Differs returns the differences of the kernel's flowtable.
func (f flowtable) Differs(want *plan.Flowtable) ([]string, error) {
	if want != nil {
		return f.of(*want).Differs()
	}
	loaded, err := nft.FlowtableLoaded()
	if err != nil || !loaded {
		return nil, err
	}
	return []string{"a flowtable is there"}, nil
}

// Load loads the flowtable.
func (f flowtable) Load(want plan.Flowtable) error { return f.of(want).Load() }

// Flush has the packets of all connections pass the rules again.
func (f flowtable) Flush(want plan.Flowtable) error { return f.of(want).Flush() }

// Remove removes the flowtable.
func (flowtable) Remove() error { return nft.RemoveFlowtable() }

// The reasons to do without a flowtable. The kernel follows changes of routes for it since Linux 5.13,
// and a gate sees its packets by the egress hook.
const (
	noFlowtables = "the kernel has no flowtables (CONFIG_NF_FLOW_TABLE_INET, CONFIG_NFT_FLOW_OFFLOAD)"
	oldFlowtable = "the kernel has no netdev egress hook (Linux 5.16): packets in its flowtable would follow no change of routes"
)

// settleFlowtable decides whether packets of established connections bypass the rules, and returns
// why they do not if they may. It is an error if they have to, and the kernel cannot.
func settleFlowtable(c *config.Config, log *slog.Logger) (why string, err error) {
	if c.Flowtable == spec.FlowtableOff {
		return "", nil
	}
	why, err = lacksFlowtable()
	switch {
	case err != nil || why == "":
		return "", err
	case c.Flowtable == spec.FlowtableRequire:
		return "", fmt.Errorf("EGRESS_FLOWTABLE=require: %s", why)
	}
	log.Info("flowtable not used", "because", why)
	c.Flowtable = spec.FlowtableOff
	return why, nil
}

// mostListed is the number of connections up to which a report counts those in the flowtable: to
// list as many takes some 10 ms.
const mostListed = 10_000

// reportFlowtable reports what packets bypass the rules, or why none do. entries is the number of
// tracked connections.
func reportFlowtable(r *health.Report, c config.Config, why string, entries int) {
	check := health.Check{Name: "flowtable", State: health.OK, Since: r.Started}
	switch {
	case why != "":
		check.State, check.Detail = health.Warning, "not used: "+why
	case c.Flowtable == spec.FlowtableOff:
		return
	case entries > mostListed:
		check.Detail = "established connections bypass the rules"
	default:
		all, fast := 0, 0
		if err := conntrack.Each(c.Sources.Addresses(), func(one conntrack.Connection) {
			all++
			if one.Offloaded {
				fast++
			}
		}); err != nil {
			check.State, check.Detail = health.Warning, err.Error()
			break
		}
		check.Detail = fmt.Sprintf("%d of %d connections bypass the rules", fast, all)
	}
	r.Checks = append(r.Checks, check)
}

// lacksFlowtable returns the reason to do without a flowtable; empty: there is none.
func lacksFlowtable() (string, error) {
	has, err := nft.HasFlowtables()
	if err != nil {
		return "", err
	}
	if !has {
		return noFlowtables, nil
	}
	if has, err = nft.HasEgressHook(); err != nil || has {
		return "", err
	}
	return oldFlowtable, nil
}
