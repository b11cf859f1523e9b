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
		Want: wanted(c), Mode: string(c.Mode), Names: c.Names(), Log: log,
		Network: func() (router.Network, error) { return link.Open() },
		Rules:   b.rules, Next: b.next, Strays: b.strays, Gate: gate{}, Tunnel: new(tunnel), Flowtable: flowtable{},
	}
}

// wanted returns the namespace of a configuration, with rules for the kernel's families.
func wanted(c config.Config) plan.Want {
	want := plan.WantOf(c.Router)
	if !link.HasIPv6() {
		want.Rules = want.Rules.Without(rules.IPv6)
	}
	return want
}

// keepNameServers keeps the pod's name servers on the cluster side.
func keepNameServers(c *config.Config, log *slog.Logger) { keepNameServersOf(c, resolvConf, log) }

// keepNameServersOf is keepNameServers with the name servers of a file.
func keepNameServersOf(c *config.Config, file string, log *slog.Logger) {
	if resolvConf, err := readFile(file); err != nil {
		log.Debug("name servers not read", "error", err)
	} else {
		c.KeepNameServers(resolvConf)
	}
}
