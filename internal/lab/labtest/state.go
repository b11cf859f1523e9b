package labtest

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
)

// State describes, for comparison, everything in the router's namespace that a
// router can change. Routes and chains are sorted, since their order is that of
// creation; rules are not.
func (p *Pod) State() string {
	p.Helper()
	s, err := p.state()
	if err != nil {
		p.Fatal(err)
	}
	return s
}

func (p *Pod) state() (string, error) {
	var lines, routes []string
	err := p.Lab.Router.Do(func() error {
		kernel, err := link.Open()
		if err != nil {
			return err
		}
		defer kernel.Close()
		s, err := kernel.Observe(plan.Network{
			Interface: p.Lab.MacvlanName,
			Cluster:   plan.ClusterSide{Interface: p.Lab.ClusterName, Table: spec.DefaultReplyTable},
		})
		if _, missing := errors.AsType[*link.MissingError](err); missing {
			lines, err = append(lines, err.Error()), nil
		}
		if err != nil {
			return err
		}
		lines = append(lines, fmt.Sprintf("%s up %v forwards %v promotes %v forwarding %v", p.Lab.MacvlanName, s.Up, s.Forwards, s.Promotes, s.Forwarding))
		for _, a := range s.Advertised {
			lines = append(lines, "advertised address "+a.String())
		}
		for _, a := range s.Addresses {
			lines = append(lines, "address "+a.String())
		}
		for _, r := range s.Cluster.Rules {
			routes = append(routes, "rule "+r.String())
		}
		lines = append(lines, strings.TrimSpace(s.Sysctls.String()))
		for _, r := range s.Lost {
			routes = append(routes, "rule missing "+r.String())
		}
		for _, r := range slices.Concat(s.Routes, s.Cluster.Table, s.AdvertisedRoutes) {
			routes = append(routes, "route "+r.String())
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	slices.Sort(routes)
	rules, err := p.rules()
	return strings.Join(append(lines, routes...), "\n") + "\n" + rules, err
}

// Clear deletes all rules.
func (p *Pod) Clear() {
	p.Helper()
	p.NFT("flush ruleset")
	if p.Backend == IptablesLegacy {
		for _, table := range []string{"raw", "nat", "mangle", "filter"} {
			for _, program := range []string{"iptables", "ip6tables"} {
				if program == "ip6tables" && !slices.Contains(p.tables6(), table) {
					continue
				}
				p.Tool(p.Program(program), "-t", table, "-F")
				p.Tool(p.Program(program), "-t", table, "-X")
			}
		}
	}
}

// Rules describes the rules of every backend.
func (p *Pod) Rules() string {
	p.Helper()
	rules, err := p.rules()
	if err != nil {
		p.Fatal(err)
	}
	return rules
}

// tables6 returns the tables of IPv6 that have rules of the router: iptables of the legacy
// flavour creates the others for a list.
func (p *Pod) tables6() []string {
	if p.Lab.IPv6 {
		return []string{"nat", "filter", "mangle", "raw"}
	}
	return []string{"filter"}
}

// rules lists the rules with three processes: tests ask for them often, and a process takes
// milliseconds.
func (p *Pod) rules() (string, error) {
	var lines []string
	for _, tables := range []struct {
		save  string
		names []string
	}{{"iptables-save", []string{"nat", "filter", "mangle", "raw"}}, {"ip6tables-save", p.tables6()}} {
		saved, err := p.tool(p.Program(tables.save))
		if err != nil {
			return "", err
		}
		found := savedTables(saved)
		for _, table := range tables.names {
			lines = append(append(lines, tables.save+" table "+table), found[table]...)
		}
	}
	listed, err := p.tool("nft", "-s", "list ruleset") // without the values of counters
	if err != nil {
		return "", err
	}
	var own []string
	for table := range strings.SplitSeq(listed, "\n}") {
		table = strings.TrimSpace(table)
		if name, _, _ := strings.Cut(table, "\n"); strings.Contains(name, " egress-router") {
			// The order of chains is that of their creation.
			blocks := strings.Split(table, "\n\n")
			slices.Sort(blocks[1:])
			own = append(own, strings.Join(blocks, "\n"))
		}
	}
	slices.Sort(own)
	return strings.Join(append(lines, own...), "\n") + "\n", nil
}

// savedTables returns the chains, sorted, and rules of each table of iptables-save's output.
func savedTables(saved string) map[string][]string {
	tables := map[string][]string{}
	for text := range strings.SplitSeq(saved, "\n*") {
		name, content, _ := strings.Cut(text, "\n")
		var chains, rules []string
		for line := range strings.Lines(content) {
			line = strings.TrimSpace(line)
			switch {
			case strings.HasPrefix(line, ":"):
				// A table of which only the chains of the kernel are left, which accept, may be listed or not.
				if chain, _, _ := strings.Cut(line, " ["); !strings.HasSuffix(chain, " ACCEPT") { // without counters
					chains = append(chains, chain)
				}
			case strings.HasPrefix(line, "-"):
				rules = append(rules, line)
			}
		}
		slices.Sort(chains)
		tables[strings.TrimPrefix(name, "*")] = append(chains, rules...)
	}
	return tables
}

// WantState checks that the state has not changed.
func (p *Pod) WantState(want string) {
	p.Helper()
	if got := p.State(); got != want {
		p.Errorf("state (-want +got):\n%s", diff(want, got))
	}
}

// WantUnchanged checks that a run had nothing to change.
func (p *Pod) WantUnchanged(r Result) {
	p.Helper()
	for _, word := range []string{"network changed", "rules loaded"} {
		if strings.Contains(r.Stderr, word) {
			p.Errorf("a run without changes logs %q:\n%s", word, Tail(r.Stderr))
		}
	}
}
