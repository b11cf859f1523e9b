package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// A flavour is one of the two kinds of iptables, in a directory that has its
// programs under their usual names.
type flavour struct {
	name      string // nft or legacy
	directory string
}

// flavours finds both kinds. The kernel forgets the directories made for them
// with this process, since its /run is its own.
func flavours() ([]flavour, error) {
	var found []flavour
	for _, name := range []string{"nft", "legacy"} {
		f, err := findFlavour(name)
		if err != nil {
			return nil, fmt.Errorf("finding iptables of the flavour %q: %w", name, err)
		}
		found = append(found, f)
	}
	return found, nil
}

// findFlavour looks where distributions put the one program that all iptables
// programs of a flavour are; it goes by the name it is called by (xtables-nft(8)).
func findFlavour(name string) (flavour, error) {
	const program = "/usr/sbin/xtables-%s-multi"
	multi := fmt.Sprintf(program, name)
	if _, err := os.Stat(multi); err != nil {
		return flavour{}, &hintedError{err, fmt.Sprintf("install the package iptables (Debian, Ubuntu) or iptables-%s (Alpine, Fedora)", name)}
	}
	directory, err := os.MkdirTemp("/run", "iptables-"+name+"-")
	if err != nil {
		return flavour{}, err
	}
	for _, link := range []string{"iptables", "iptables-save", "iptables-restore"} {
		if err := os.Symlink(multi, filepath.Join(directory, link)); err != nil {
			return flavour{}, err
		}
	}
	return flavour{name, directory}, nil
}

// path is the PATH with which a router uses this flavour.
func (f flavour) path() string { return "PATH=" + f.directory + ":" + os.Getenv("PATH") }

// restore loads input, the way that the router is measured against.
func (f flavour) restore(ctx context.Context, l *lab.Lab, ns *netns.Namespace, input string) (outcome, error) {
	file, err := os.Open(input)
	if err != nil {
		return outcome{}, err
	}
	defer file.Close()
	return execute(ctx, l, ns, nil, file, filepath.Join(f.directory, "iptables-restore"), "--noflush")
}

// rules returns what a router has put into ns, as input for iptables-restore
// --noflush: its own chains and, from the kernel's, the jumps to them.
func (f flavour) rules(ctx context.Context, l *lab.Lab, ns *netns.Namespace) (string, error) {
	o, err := execute(ctx, l, ns, nil, nil, filepath.Join(f.directory, "iptables-save"))
	if err != nil {
		return "", err
	}
	return restoreInput(o.stdout), nil
}

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
