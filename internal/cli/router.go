package cli

import (
	"log/slog"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/link"
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
		Link: desired(c), Macvlan: macvlan(c), Plan: planOf(c), Forward: c.Mode.Redirects(), Conflict: conflicts[c.Conflict], Mode: string(c.Mode), Names: config.Names{}, Log: log,
		Network: func() (router.Network, error) { return link.Open() },
		Rules:   b.rules, Next: b.next, Strays: b.strays,
	}
}

func desired(c config.Config) link.Want {
	return link.Want{
		Interface: c.Egress, Address: c.Source, Gateway: c.Gateway,
		Cluster: link.ClusterSide{
			Interface: c.Cluster, Mark: uint32(c.ReplyMark), Table: c.ReplyTable, Destinations: c.ClusterDestinations,
		},
	}
}

// macvlan returns the egress interface to create; nil: none.
func macvlan(c config.Config) *link.Macvlan {
	if c.Macvlan == nil {
		return nil
	}
	return &link.Macvlan{Interface: c.Egress, Parent: c.Macvlan.Parent, Mode: string(c.Macvlan.Mode), HostNetns: c.Macvlan.HostNetns}
}

// planOf returns the rules of a configuration, for the kernel's families.
func planOf(c config.Config) rules.Plan {
	if !link.HasIPv6() {
		return c.Plan().Without(rules.IPv6)
	}
	return c.Plan()
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
var conflicts = map[config.Conflict]router.Conflict{
	config.ConflictWarn: router.ConflictWarn, config.ConflictRefuse: router.ConflictRefuse, config.ConflictDefend: router.ConflictDefend,
}
