package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/lookup"
	"github.com/egress-router/egress-router/internal/metrics"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/resolver"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/rules"
)

const (
	// onceLimit is how long a run that does not stay waits for the addresses of names. It
	// is the time of the resolver for one server that does not answer (resolv.conf(5)).
	onceLimit = 5 * time.Second
	// startLimit is how long the start of a router that stays waits for them: with the
	// first answers the rules of an earlier run, after a restart, stay in effect.
	startLimit = time.Second
)

// newFollower returns a follower of names for a configuration. The queries leave by the
// cluster side, to which the name servers are routed (keepNameServers).
func newFollower(c config.Config, log *slog.Logger) *lookup.Follower {
	return newFollowerOf(c, "", log)
}

// newFollowerOf is newFollower with the name servers of a file; empty: the pod's.
func newFollowerOf(c config.Config, resolvConf string, log *slog.Logger) *lookup.Follower {
	r, own := resolver.New(resolver.Options{ResolvConf: resolvConf, Log: log, EitherFamily: len(c.Sources.Of(true)) > 0}), new(netns.Addresses)
	return &lookup.Follower{
		Lookup: func(ctx context.Context, name string) (resolver.Answer, error) {
			answer, err := r.Lookup(ctx, netip.Addr{}, name)
			// Without a source of its family an address cannot be reached.
			answer.Addrs = slices.DeleteFunc(answer.Addrs, func(a netip.Addr) bool {
				return len(c.Sources.Of(a.Is6())) == 0
			})
			answer.OnlyIPv4 = answer.OnlyIPv4 && len(c.Sources.Of(true)) > 0
			answer.OnlyIPv6 = answer.OnlyIPv6 && len(c.Sources.Of(false)) > 0
			return answer, err
		},
		Unusable: func(a netip.Addr) string { return unusable(c, own, a) },
		Log:      log,
	}
}

// unusable returns why no line could have an address of a name, empty if one could: a name
// server is trusted with addresses of servers alone.
func unusable(c config.Config, own *netns.Addresses, a netip.Addr) string {
	if why := c.Sources.UnusableServer(a); why != "" {
		return why
	}
	if is, err := own.Has(a); err == nil && is {
		return "an address of the pod"
	}
	return ""
}

// resolveOnce sets the addresses that the names of the destinations have now. Nobody
// follows them.
func resolveOnce(ctx context.Context, c *config.Config, r *router.Router, log *slog.Logger) {
	names := c.Set.Names()
	if len(names) == 0 {
		return
	}
	looking, cancel := context.WithTimeout(ctx, onceLimit)
	defer cancel()
	f := newFollower(*c, log)
	f.Changed = func() {}
	f.Follow(names, true)
	go f.Run(looking)
	f.Await(looking)
	adopt(ctx, f, r, log)
	c.Set = c.Set.Resolve(f.Resolution)
	if without := len(slices.DeleteFunc(slices.Clone(c.Set.Redirects), func(r rules.Redirect) bool { return !r.Unresolved() })); without > 0 {
		log.Warn("destinations without address", "number", without, "effect", "their ports refuse connections")
	}
}

// adopt gives names without an answer the addresses that their redirects in the kernel have.
// Those of an earlier run are all that outlives a restart of the container. A name that is
// no longer configured is not adopted, so that no port leads to another name's server.
func adopt(ctx context.Context, f *lookup.Follower, r *router.Router, log *slog.Logger) {
	without := f.Without()
	if len(without) == 0 {
		return
	}
	named, err := r.Named(ctx)
	if err != nil { // Apply reports it
		log.Debug("addresses of an earlier run not read", "error", err)
	}
	for _, name := range without {
		f.Adopt(name, named[name])
	}
}

// follow starts to follow the names of the destinations, and waits a moment for the first
// answers.
func (w *watch) follow(ctx, lasting context.Context, c config.Config, r *router.Router) {
	if w.names == nil {
		return
	}
	w.names.Changed = func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.keeper.Resolve(wanted(w.resolved()))
	}
	names := c.Set.Names()
	w.names.Follow(names, true)
	w.background.Go(func() { w.names.Run(lasting) })
	if len(names) > 0 {
		waiting, cancel := context.WithTimeout(ctx, startLimit)
		defer cancel()
		w.names.Await(waiting)
		adopt(ctx, w.names, r, w.log)
	}
}

// resolved returns the configuration with the addresses of the names.
func (w *watch) resolved() config.Config {
	c := w.latest
	if w.names != nil {
		c.Set = c.Set.Resolve(w.names.Resolution)
	}
	return c
}

// mostNames is the number of names with a check each, those with a failure first.
const mostNames = 10

// reportNames reports the addresses of names. Without them the router is ready all the same:
// the other destinations are in place.
func reportNames(r *health.Report, states []lookup.State) {
	slices.SortStableFunc(states, func(a, b lookup.State) int {
		return int(oneIf(b.Failure != "") - oneIf(a.Failure != ""))
	})
	for _, s := range states[:min(len(states), mostNames)] {
		check := health.Check{Name: "name", State: health.OK, Since: s.Since, Detail: s.Name + ": " + diagnose.AddressText(s.Addresses)}
		if s.Failure != "" {
			check.State, check.Since, check.Fault = health.Warning, s.Failing, string(diagnose.NameFailed)
			check.Detail += ", lookup failed: " + s.Failure
		}
		r.Checks = append(r.Checks, check)
	}
	if more := len(states) - mostNames; more > 0 {
		r.Checks = append(r.Checks, health.Check{Name: "name", State: health.OK, Since: r.Started, Detail: fmt.Sprintf("%d more names", more)})
	}
}

// collectNames emits the metrics of names.
func (w *watch) collectNames(emit metrics.Emit) {
	if w.names == nil {
		return
	}
	states, lookups, failed := w.names.States()
	if len(states) == 0 {
		return
	}
	emit("egress_router_name_lookups_total", float64(lookups))
	emit("egress_router_name_lookup_failures_total", float64(failed))
}

// addresses returns the addresses of a name.
func (w *watch) addresses(name string) []netip.Addr {
	if w.names == nil {
		return nil
	}
	return w.names.Resolution(name).Addresses
}
