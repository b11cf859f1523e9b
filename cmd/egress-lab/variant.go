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

// A variant is one way for a router to have its rules in the kernel.
type variant struct {
	name string   // as the tables have it
	env  []string // that makes a router take it
	tool tool     // that loads the same rules without a router
	// rival is a variant to whose tool a router is compared besides its own; nil:
	// none.
	rival *variant
}

// A tool is a program of the distribution that loads and lists rules.
type tool interface {
	// load loads the rules of a file into ns.
	load(ctx context.Context, l *lab.Lab, ns *netns.Namespace, file string) (outcome, error)
	// rules returns what a router has put into ns, as a file for load. It is an
	// error if the router has put it elsewhere.
	rules(ctx context.Context, l *lab.Lab, ns *netns.Namespace) (string, error)
	// redirects counts the destinations in such a text.
	redirects(rules string) int
}

// variants finds all that are measured. The kernel forgets the directories made
// for them with this process, since its /run is its own.
func variants() ([]variant, error) {
	var found []variant
	for _, flavour := range []string{"nft", "legacy"} {
		i, err := findIptables(flavour)
		if err != nil {
			return nil, fmt.Errorf("finding iptables of the flavour %q: %w", flavour, err)
		}
		env := []string{"EGRESS_ROUTER_BACKEND=iptables", "PATH=" + i.directory + ":" + os.Getenv("PATH")}
		found = append(found, variant{name: "iptables-" + flavour, env: env, tool: i})
	}
	n, err := findNft("/usr/sbin/nft")
	if err != nil {
		return nil, fmt.Errorf("finding nft: %w", err)
	}
	env := []string{"EGRESS_ROUTER_BACKEND=nftables"}
	return append(found, variant{name: "nftables", env: env, tool: n, rival: &found[0]}), nil
}

// iptables is one of the two flavours of iptables, in a directory that has its
// programs under their usual names.
type iptables struct{ directory string }

// findIptables looks where distributions put the one program that all iptables
// programs of a flavour are; it goes by the name it is called by (xtables-nft(8)).
func findIptables(flavour string) (iptables, error) {
	const program = "/usr/sbin/xtables-%s-multi"
	multi := fmt.Sprintf(program, flavour)
	if _, err := os.Stat(multi); err != nil {
		return iptables{}, &hintedError{err, fmt.Sprintf("install the package iptables (Debian, Ubuntu) or iptables-%s (Alpine, Fedora)", flavour)}
	}
	directory, err := os.MkdirTemp("/run", "iptables-"+flavour+"-")
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

// restore runs iptables-restore. Without --noflush the tables that the file names
// hold nothing else afterwards.
func (i iptables) restore(ctx context.Context, l *lab.Lab, ns *netns.Namespace, file string, arguments ...string) (outcome, error) {
	input, err := os.Open(file)
	if err != nil {
		return outcome{}, err
	}
	defer input.Close()
	return report(ctx, l, ns, nil, input, append([]string{filepath.Join(i.directory, "iptables-restore")}, arguments...)...)
}

// rules returns the router's own chains and, from the kernel's, the jumps to
// them. The few rules for IPv6 are left out: they do not grow with the list.
func (i iptables) rules(ctx context.Context, l *lab.Lab, ns *netns.Namespace) (string, error) {
	o, err := report(ctx, l, ns, nil, nil, filepath.Join(i.directory, "iptables-save"))
	if err != nil {
		return "", err
	}
	return restoreInput(o.stdout), nil
}

// jumpDNAT is in every rule that redirects.
const jumpDNAT = " -j DNAT "

func (iptables) redirects(rules string) int { return strings.Count(rules, jumpDNAT) }

// restoreInput leaves out of the text of iptables-save what is the kernel's own:
// policies of built-in chains, and with them tables that hold nothing else.
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
			// ":PREROUTING ACCEPT [0:0]", and "-" where a chain has no policy.
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

// nft is the program of that name.
type nft struct{ program string }

// findNft looks at the one place where distributions put it.
func findNft(program string) (nft, error) {
	if _, err := os.Stat(program); err != nil {
		return nft{}, &hintedError{err, "install the package nftables"}
	}
	return nft{program}, nil
}

func (n nft) load(ctx context.Context, l *lab.Lab, ns *netns.Namespace, file string) (outcome, error) {
	return report(ctx, l, ns, nil, nil, n.program, "-f", file)
}

// rules returns the router's tables, without their counters' values (-s). That
// of IPv4 has to be there, and that of IPv6 may.
func (n nft) rules(ctx context.Context, l *lab.Lab, ns *netns.Namespace) (string, error) {
	const ip4, ip6 = "table ip egress-router\n", "table ip6 egress-router\n"
	tables, err := report(ctx, l, ns, nil, nil, n.program, "list", "tables")
	if err != nil {
		return "", err
	}
	if !strings.Contains(tables.stdout, ip4) {
		return "", fmt.Errorf("there is no %q: does the router know EGRESS_ROUTER_BACKEND?", strings.TrimSpace(ip4))
	}
	o, err := report(ctx, l, ns, nil, nil, n.program, "-s", "list", "table", "ip", "egress-router")
	if err != nil || !strings.Contains(tables.stdout, ip6) {
		return o.stdout, err
	}
	o6, err := report(ctx, l, ns, nil, nil, n.program, "-s", "list", "table", "ip6", "egress-router")
	return o.stdout + o6.stdout, err
}

// destination matches an element of a map that holds addresses (tcp . 80 :
// 203.0.113.25 . 80), and a rule that redirects without a map.
var destination = regexp.MustCompile(`(?: : | dnat to )\d+\.\d+\.\d+\.\d+`)

func (nft) redirects(rules string) int { return len(destination.FindAllString(rules, -1)) }
