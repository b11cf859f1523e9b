// Package iptables puts a rule plan into the kernel with the iptables programs,
// of either flavour (nf_tables or legacy).
//
// Bodies of chains go in by one iptables-restore --noflush for each table,
// which the kernel takes as a whole or not at all, and which leaves chains of
// other programs alone. The jumps into our chains, which stand in chains that
// we share with others, are set one by one through go-iptables.
package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"

	"github.com/egress-router/egress-router/rules"
)

// lockSeconds is how long to wait for the xtables lock, which the legacy
// flavour takes (iptables(8), --wait). Other programs hold it for as long as a
// large restore takes, well under a second.
const lockSeconds = 5

// directories are where distributions put iptables; they are looked into where
// PATH, as set for a container or a user, does not have them.
var directories = []string{"/usr/sbin", "/sbin", "/usr/local/sbin"}

// A Backend is an installation of iptables.
type Backend struct {
	directory string // of iptables, iptables-save and iptables-restore
	version   string // with the flavour, as iptables prints it
	jumps     *goiptables.IPTables
}

// A MissingError says that there is no usable iptables on this machine.
type MissingError struct{ Err error }

func (e *MissingError) Error() string { return fmt.Sprintf("looking for iptables: %v", e.Err) }

// Unwrap returns what went wrong.
func (e *MissingError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *MissingError) Hint() string {
	return `install the package "iptables", which has iptables, iptables-save and iptables-restore, or use the router's container image`
}

// Find returns the iptables that PATH names first, or one in the usual
// directories. All its programs are taken from one directory, so that they are
// of one flavour. Where one of them is not there, the error is a *MissingError.
func Find(ctx context.Context) (*Backend, error) {
	path, err := exec.LookPath("iptables")
	for _, d := range directories {
		if err == nil {
			break
		}
		if _, missing := exec.LookPath(filepath.Join(d, "iptables")); missing == nil {
			path, err = filepath.Join(d, "iptables"), nil
		}
	}
	if err != nil {
		return nil, &MissingError{fmt.Errorf("%w, nor in %s", err, strings.Join(directories, ", "))}
	}
	b := &Backend{directory: filepath.Dir(path)}
	for _, program := range []string{"iptables-save", "iptables-restore"} {
		if _, err := exec.LookPath(filepath.Join(b.directory, program)); err != nil {
			return nil, &MissingError{err}
		}
	}
	// go-iptables asks too, and keeps the flavour to itself.
	version, err := b.run(ctx, nil, "iptables", "--version")
	if err != nil {
		return nil, err
	}
	b.version = strings.TrimSpace(string(version))
	b.jumps, err = goiptables.New(goiptables.Path(path), goiptables.IPFamily(goiptables.ProtocolIPv4), goiptables.Timeout(lockSeconds))
	if err != nil {
		return nil, fmt.Errorf("asking %s for its version: %w", path, err)
	}
	return b, nil
}

// run executes one of the programs and returns its output. What it prints as an
// error becomes part of the error.
func (b *Backend) run(ctx context.Context, input []byte, program string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(b.directory, program), args...)
	cmd.Stdin = bytes.NewReader(input)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, runError(program, err, stderr.String())
	}
	return stdout.Bytes(), nil
}

// runError folds what a program printed into its error. A refusal by the kernel
// becomes os.ErrPermission, for whoever asks with errors.Is.
func runError(program string, err error, printed string) error {
	printed = strings.Join(strings.FieldsFunc(printed, func(r rune) bool { return r == '\n' }), "; ")
	if printed == "" {
		return fmt.Errorf("running %s: %w", program, err)
	}
	if strings.Contains(printed, "Permission denied") || strings.Contains(printed, "Operation not permitted") {
		err = errors.Join(err, os.ErrPermission)
		return &printedError{program, printed, err}
	}
	return &printedError{program, printed, err}
}

// A printedError is the failure of a program that said why.
type printedError struct {
	program, printed string
	err              error
}

func (e *printedError) Error() string { return fmt.Sprintf("running %s: %s", e.program, e.printed) }
func (e *printedError) Unwrap() error { return e.err }

// Hint says what to do about the xtables lock, which is the one thing that can
// fail although rules and privileges are right.
func (e *printedError) Hint() string {
	if strings.Contains(e.printed, "lock") {
		return "iptables needs a writable /run for its lock (or XTABLES_LOCKFILE naming a writable place), and no other program that holds the lock for long"
	}
	return ""
}

// Begin reads what the kernel holds and returns a Tx that changes it.
func (b *Backend) Begin(ctx context.Context) (*Tx, error) {
	saved, err := b.run(ctx, nil, "iptables-save")
	if err != nil {
		return nil, fmt.Errorf("reading the rules: %w", err)
	}
	return &Tx{backend: b, tables: parse(saved)}, nil
}

// insertJump puts the jump to chain into the built-in chain hook, at the given
// position counted from 1.
func (b *Backend) insertJump(name rules.Table, hook rules.Hook, chain string, position int) error {
	return jumpError(b.jumps.Insert(string(name), string(hook), position, "-j", chain))
}

// deleteJump deletes the first jump to chain from the built-in chain hook. It
// names the rule, not its position, which another program may have changed.
func (b *Backend) deleteJump(name rules.Table, hook rules.Hook, chain string) error {
	return jumpError(b.jumps.Delete(string(name), string(hook), "-j", chain))
}

func jumpError(err error) error {
	if err == nil {
		return nil
	}
	if printed, ok := errors.AsType[*goiptables.Error](err); ok {
		return runError("iptables", err, printed.Error())
	}
	return runError("iptables", err, "")
}
