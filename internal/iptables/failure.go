package iptables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"strings"

	"github.com/egress-router/egress-router/internal/wording"
)

// A programError is the failure of a program.
type programError struct {
	program string
	printed string // its messages; empty: it printed none
	err     error
}

func (e *programError) Error() string {
	if e.printed == "" {
		return fmt.Sprintf("running %s: %v", e.program, e.err)
	}
	return fmt.Sprintf("running %s: %s", e.program, e.printed)
}

func (e *programError) Unwrap() error { return e.err }

// runError returns the error of a program with its messages. errors.Is finds
// fs.ErrPermission in it if the kernel refused the call.
func runError(program string, err error, printed string) error {
	var lines []string
	for line := range strings.Lines(printed) {
		// "iptables-restore v1.8.9 (nf_tables): " may be a line of its own.
		if line = strings.TrimSpace(line); line != "" && !strings.HasSuffix(line, ":") && !strings.HasPrefix(line, "#") {
			lines = append(lines, line)
		}
	}
	printed = strings.Join(lines, "; ")
	if strings.Contains(printed, "Permission denied") || strings.Contains(printed, "Operation not permitted") {
		err = errors.Join(err, fs.ErrPermission)
	}
	return &programError{program, printed, err}
}

// Remedies of several failures.
var (
	nftables      = wording.Set(wording.Backend, "nftables")
	otherPrograms = wording.Textf("use the router's container image, or %s, which needs no program", nftables)
	otherBackend  = wording.Textf("or set %s", nftables)
)

// A failure is one kind of failure of iptables.
type failure struct {
	printed []string // parts of the programs' messages
	hint    wording.Text
	lacks   bool // of an extension or a module
}

// failures are the kinds of failure, by the messages of iptables 1.6 to 1.8, of both
// flavours, and of the C libraries' loaders. The first one that matches counts.
var failures = []failure{
	{
		[]string{"holding the xtables lock"},
		wording.Textf("another program holds the lock of iptables: find the process that has /run/xtables.lock open, and start the router again"),
		false,
	},
	{
		[]string{"lock file"},
		wording.Textf("iptables (legacy) needs a writable /run for its lock, or XTABLES_LOCKFILE with the name of a writable file"),
		false,
	},
	{
		[]string{"rror while loading shared librar", "rror loading shared librar", "rror relocating"},
		wording.Textf("the installation of iptables is incomplete: install the package again; or %s", otherPrograms),
		false,
	},
	{
		[]string{"Couldn't load match", "Couldn't load target", "Couldn't find match", "Couldn't find target", "unknown option", "unrecognized option", "Unknown arg", "invalid option"},
		wording.Textf("this iptables lacks an extension or an option that the rules need: %s", otherPrograms),
		true,
	},
	{
		[]string{"is incompatible", "CHAIN_ADD failed (Operation not supported)", "CHAIN_ADD failed (File exists)", "newer iptables"},
		wording.Textf("another program made a table of that name, by nft or by a newer iptables, in a form that this iptables cannot change: set %s, which has tables of its own, or delete that table (nft list tables)", nftables),
		false,
	},
	{
		[]string{
			"Table does not exist", "unable to initialize table", "an't initialize", "Failed to initialize nft", "No chain/target/match by that name", "missing kernel module", "restore: line ",
			"Protocol not supported", "Protocol not available", "(No such file or directory)", "(Operation not supported)", "(Invalid argument)",
		},
		wording.Textf("the node's kernel lacks a module of iptables: on the node, modprobe nf_tables nft_compat (iptables (nf_tables)), or iptable_nat iptable_mangle iptable_filter ip6table_filter (legacy; for IPv6 sources also ip6table_nat ip6table_mangle), and xt_conntrack xt_connmark xt_mark xt_nat xt_TCPMSS ipt_REJECT ip6t_REJECT; %s", otherBackend),
		true,
	},
}

// kind returns the kind of the failure, nil if it is none of the known.
func (e *programError) kind() *failure {
	for i, f := range failures {
		for _, part := range f.printed {
			if strings.Contains(e.printed, part) {
				return &failures[i]
			}
		}
	}
	return nil
}

// IsUnsupported reports whether a program failed because it, or the kernel, lacks an
// extension or a module that some rules need.
func IsUnsupported(err error) bool {
	e, ok := errors.AsType[*programError](err)
	if !ok {
		return false
	}
	kind := e.kind()
	return kind != nil && kind.lacks
}

// Hint returns the remedy. It is empty for a call that the kernel refused, and for an
// interruption: these are not specific to iptables.
func (e *programError) Hint(names wording.Names) string {
	if kind := e.kind(); kind != nil {
		return kind.hint.In(names)
	}
	_, ended := errors.AsType[*exec.ExitError](e.err)
	switch {
	case errors.Is(e.err, context.Canceled):
		return ""
	case errors.Is(e.err, context.DeadlineExceeded):
		return wording.Textf("the program does not end: it may wait for the lock of iptables or for a file system; %s", otherBackend).In(names)
	case e.printed == "" && !ended:
		return wording.Textf("the program cannot be started: it is broken, or of another architecture; %s", otherPrograms).In(names)
	case errors.Is(e.err, fs.ErrPermission):
		return ""
	case e.printed == "":
		return wording.Textf("the program ended without a message: it is broken, or was killed (out of memory); %s", otherPrograms).In(names)
	}
	return wording.Textf("run the program by hand in the pod's network namespace; %s", otherBackend).In(names)
}

// A versionError means that the version of iptables is unknown or too old.
type versionError struct{ err error }

func (e *versionError) Error() string { return e.err.Error() }
func (e *versionError) Unwrap() error { return e.err }

// Hint returns the remedy.
func (e *versionError) Hint(names wording.Names) string {
	return wording.Textf("this iptables is broken or too old: %s", otherPrograms).In(names)
}
