package cli

import (
	"log/slog"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/rules"
)

func newRouter(c config.Config, log *slog.Logger) *router.Router {
	families := []rules.Family{rules.IPv4, rules.IPv6}
	if !link.HasIPv6() {
		families = families[:1]
	}
	b := &backend{choice: c.Backend, families: families, log: log}
	return &router.Router{
		Want: wanted(c), Mode: string(c.Mode), Names: config.Names{}, Log: log,
		Network: func() (router.Network, error) { return link.Open() },
		Rules:   b.rules, Next: b.next, Strays: b.strays,
	}
}

// wanted returns the namespace of a configuration, with rules for the kernel's families.
func wanted(c config.Config) plan.Want {
	want := configured(c)
	if !link.HasIPv6() {
		want.Rules = want.Rules.Without(rules.IPv6)
	}
	return want
}

// configured returns the namespace of a configuration, for any kernel.
func configured(c config.Config) plan.Want {
	want := plan.Want{
		Network: plan.Network{
			Interface: c.Egress, Sources: c.Sources,
			Cluster: plan.ClusterSide{
				Interface: c.Cluster, Mark: uint32(c.ReplyMark), Table: c.ReplyTable, Destinations: c.ClusterDestinations,
			},
		},
		Rules: c.Plan(), Forward: c.Mode.Redirects(), Conflict: conflicts[c.Conflict],
	}
	if m := c.Macvlan; m != nil {
		want.Macvlan = &plan.Macvlan{Interface: c.Egress, Parent: m.Parent, Mode: string(m.Mode), HostNetns: m.HostNetns}
	}
	return want
}

// keepNameServers keeps the pod's name servers on the cluster side.
func keepNameServers(c *config.Config, log *slog.Logger) {
	if resolvConf, err := readFile(resolvConf); err != nil {
		log.Debug("name servers not read", "error", err)
	} else {
		c.KeepNameServers(resolvConf)
	}
}

// conflicts maps the values of EGRESS_CONFLICT.
var conflicts = map[config.Conflict]plan.Conflict{
	config.ConflictWarn: plan.ConflictWarn, config.ConflictRefuse: plan.ConflictRefuse, config.ConflictDefend: plan.ConflictDefend,
}
