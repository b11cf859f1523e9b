package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// A variant is a way of loading rules into the kernel.
type variant struct {
	name  string   // name in tables
	env   []string // variables that select it in a router
	tool  tool     // program that loads the same rules without a router
	rival *variant // variant whose tool is a second reference; may be nil
}

// A tool is a program of the distribution that loads and lists rules.
type tool interface {
	// load loads the rules of a file into ns.
	load(ctx context.Context, l *lab.Lab, ns *netns.Namespace, file string) (outcome, error)
	// rules returns the rules of a router in ns, as a file for load. It is an error if
	// the router has loaded its rules elsewhere.
	rules(ctx context.Context, l *lab.Lab, ns *netns.Namespace) (string, error)
	// redirects counts the destinations in such a text.
	redirects(rules string) int
}

// variants returns all variants. Their directories are in this process's own /run, and end
// with it.
func variants() ([]variant, error) {
	var found []variant
	for _, kind := range []string{"nft", "legacy"} {
		i, err := findIptables(kind)
		if err != nil {
			return nil, fmt.Errorf("finding iptables-%s: %w", kind, err)
		}
		env := []string{"EGRESS_ROUTER_BACKEND=iptables", "PATH=" + i.directory + ":" + os.Getenv("PATH")}
		found = append(found, variant{name: "iptables-" + kind, env: env, tool: i})
	}
	n, err := findNft("/usr/sbin/nft")
	if err != nil {
		return nil, fmt.Errorf("finding nft: %w", err)
	}
	env := []string{"EGRESS_ROUTER_BACKEND=nftables"}
	return append(found, variant{name: "nftables", env: env, tool: n, rival: &found[0]}), nil
}

// iptables is iptables-nft or iptables-legacy, in a directory with its programs under their
// usual names.
type iptables struct{ directory string }

// findIptables finds the program that contains all programs of iptables-nft or
// iptables-legacy, in the directory of all distributions. The name that it is run by
// selects the program (xtables-nft(8)).
func findIptables(kind string) (iptables, error) {
	const program = "/usr/sbin/xtables-%s-multi"
	multi := fmt.Sprintf(program, kind)
	if _, err := os.Stat(multi); err != nil {
		return iptables{}, &hintedError{err, fmt.Sprintf("install the package iptables (Debian, Ubuntu) or iptables-%s (Alpine, Fedora)", kind)}
	}
	directory, err := os.MkdirTemp("/run", "iptables-"+kind+"-")
	if err != nil {
		return iptables{}, err
	}
	for _, link := range []string{
		"iptables", "iptables-save", "iptables-restore",
		"ip6tables", "ip6tables-save", "ip6tables-restore",
	} {
		if err := os.Symlink(multi, filepath.Join(directory, link)); err != nil {
			return iptables{}, err
		}
	}
	return iptables{directory}, nil
}

func (i iptables) load(ctx context.Context, l *lab.Lab, ns *netns.Namespace, file string) (outcome, error) {
	return i.restore(ctx, l, ns, file, "--noflush")
}

// restore runs iptables-restore. Without --noflush it flushes the tables that the file
// names.
func (i iptables) restore(ctx context.Context, l *lab.Lab, ns *netns.Namespace, file string, arguments ...string) (outcome, error) {
	input, err := os.Open(file)
	if err != nil {
		return outcome{}, err
	}
	defer input.Close()
	return report(ctx, l, ns, nil, input, append([]string{filepath.Join(i.directory, "iptables-restore")}, arguments...)...)
}

// rules returns the router's own chains and the jumps to them in built-in chains. The few
// rules for IPv6 are left out: their number does not depend on the list.
func (i iptables) rules(ctx context.Context, l *lab.Lab, ns *netns.Namespace) (string, error) {
	o, err := report(ctx, l, ns, nil, nil, filepath.Join(i.directory, "iptables-save"))
	if err != nil {
		return "", err
	}
	return restoreInput(o.stdout), nil
}

// jumpDNAT is part of every rule that redirects.
const jumpDNAT = " -j DNAT "

func (iptables) redirects(rules string) int { return strings.Count(rules, jumpDNAT) }

// restoreInput removes the policies of built-in chains from the output of iptables-save,
// and tables without other lines.
func restoreInput(saved string) string {
	var all, table strings.Builder
	filled := false
	for line := range strings.Lines(saved) {
		switch line[0] {
		case '*':
			table.Reset()
			table.WriteString(line)
			filled = false
		case ':':
			// ":PREROUTING ACCEPT [0:0]", and "-" if a chain has no policy.
			if _, policy, _ := strings.Cut(line, " "); strings.HasPrefix(policy, "-") {
				table.WriteString(line)
				filled = true
			}
		case '-':
			table.WriteString(line)
			filled = true
		case 'C':
			if filled {
				all.WriteString(table.String())
				all.WriteString(line)
			}
		}
	}
	return all.String()
}

// nft is the program nft.
type nft struct{ program string }

// findNft checks the path of all distributions.
func findNft(program string) (nft, error) {
	if _, err := os.Stat(program); err != nil {
		return nft{}, &hintedError{err, "install the package nftables"}
	}
	return nft{program}, nil
}

func (n nft) load(ctx context.Context, l *lab.Lab, ns *netns.Namespace, file string) (outcome, error) {
	return report(ctx, l, ns, nil, nil, n.program, "-f", file)
}

// rules returns the router's tables, without the values of counters (-s). The table of IPv4
// must exist; that of IPv6 may be missing.
func (n nft) rules(ctx context.Context, l *lab.Lab, ns *netns.Namespace) (string, error) {
	const ip4, ip6 = "table ip egress-router\n", "table ip6 egress-router\n"
	tables, err := report(ctx, l, ns, nil, nil, n.program, "list", "tables")
	if err != nil {
		return "", err
	}
	if !strings.Contains(tables.stdout, ip4) {
		return "", fmt.Errorf("no %q: the router may not support EGRESS_ROUTER_BACKEND", strings.TrimSpace(ip4))
	}
	o, err := report(ctx, l, ns, nil, nil, n.program, "-s", "list", "table", "ip", "egress-router")
	if err != nil || !strings.Contains(tables.stdout, ip6) {
		return o.stdout, err
	}
	o6, err := report(ctx, l, ns, nil, nil, n.program, "-s", "list", "table", "ip6", "egress-router")
	return o.stdout + o6.stdout, err
}

// destination matches an element of a map of addresses (tcp . 80 : 203.0.113.25 . 80), and
// a rule that redirects without a map.
var destination = regexp.MustCompile(`(?: : | dnat to )\d+\.\d+\.\d+\.\d+`)

func (nft) redirects(rules string) int { return len(destination.FindAllString(rules, -1)) }
