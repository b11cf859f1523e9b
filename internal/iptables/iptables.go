// Package iptables puts a rule plan into the kernel with the iptables programs,
// of either flavour (nf_tables or legacy).
//
// What is there is read by one iptables-save. Chains, and the jumps into them
// from chains that we share with others, are changed by one iptables-restore
// --noflush, which the kernel takes table by table, each as a whole or not at
// all, and which leaves the chains and rules of other programs alone.
package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	goiptables "github.com/coreos/go-iptables/iptables"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// lockSeconds is how long to wait for the xtables lock, which the legacy
// flavour takes (iptables(8), --wait). Other programs hold it for as long as a
// large restore takes, well under a second.
const lockSeconds = 5

// directories are where distributions put iptables; they are looked into where
// PATH, as set for a container or a user, does not have them.
var directories = []string{"/usr/sbin", "/sbin", "/usr/local/sbin"}

// oldest is the first version whose iptables-restore takes -w.
var oldest = [3]int{1, 6, 2}

// A Flavour is one of the two kinds of iptables, which keep their rules in
// different places of the kernel, as iptables prints it with its version. Older
// ones, which print none, are of the legacy flavour.
type Flavour string

// The flavours.
const (
	NFTables Flavour = "nf_tables"
	Legacy   Flavour = "legacy"
)

// A Backend is an installation of iptables.
type Backend struct {
	directory string         // of its programs
	variant   string         // in the programs' names, such as "-legacy"
	families  []rules.Family // to change, IPv4 first
	asked     func() error   // waits for what follows to be known
	version   string         // with the flavour, as iptables prints it

	// The plan in hand as text: rendering thousands of rules takes about as
	// long as everything else here.
	plan   rules.Plan
	chains []rules.TextChain
}

// A MissingError says that there is no usable iptables on this machine.
type MissingError struct{ Err error }

func (e *MissingError) Error() string { return fmt.Sprintf("looking for iptables: %v", e.Err) }

// Unwrap returns what went wrong.
func (e *MissingError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *MissingError) Hint() string {
	return `install the package "iptables", which has iptables, iptables-save, iptables-restore and the same for IPv6; or use the router's container image, or EGRESS_ROUTER_BACKEND=nftables, which needs no program`
}

// program returns the name of a program: that of the family itself, or one with
// a suffix, such as iptables-save.
func (b *Backend) program(f rules.Family, suffix string) string {
	name := "iptables"
	if f == rules.IPv6 {
		name = "ip6tables"
	}
	name += b.variant
	if suffix != "" {
		name += "-" + suffix
	}
	return name
}

// Find returns the iptables that PATH names first, or one in the usual
// directories. All its programs are taken from one directory, so that they are
// of one flavour. Where one of them is not there, the error is a *MissingError.
// Families are those whose rules it is for.
func Find(ctx context.Context, families ...rules.Family) (*Backend, error) {
	return find(ctx, "", directories, families)
}

// find looks for the programs with variant in their names.
func find(ctx context.Context, variant string, directories []string, families []rules.Family) (*Backend, error) {
	b := &Backend{variant: variant, families: families}
	main := b.program(rules.IPv4, "")
	path, err := exec.LookPath(main)
	for _, d := range directories {
		if err == nil {
			break
		}
		if _, missing := exec.LookPath(filepath.Join(d, main)); missing == nil {
			path, err = filepath.Join(d, main), nil
		}
	}
	if err != nil {
		return nil, &MissingError{fmt.Errorf("%w, nor in %s", err, strings.Join(directories, ", "))}
	}
	b.directory = filepath.Dir(path)
	for _, f := range families {
		for _, suffix := range []string{"save", "restore"} {
			if _, err := exec.LookPath(filepath.Join(b.directory, b.program(f, suffix))); err != nil {
				return nil, &MissingError{err}
			}
		}
	}
	b.asked = sync.OnceValue(func() error { return b.ask(ctx, path) })
	go func() { _ = b.asked() }() // Begin waits for it, and has the error
	return b, nil
}

// ask asks iptables for its version and flavour. The answer does not depend on
// the network namespace, so any thread may ask.
func (b *Backend) ask(ctx context.Context, path string) error {
	// go-iptables knows versions, and keeps the flavour to itself. Each asks
	// by a process of its own, so they ask at the same time.
	numbers := make(chan [3]int, 1)
	failed := make(chan error, 1)
	go func() {
		ipt, err := goiptables.New(goiptables.Path(path), goiptables.IPFamily(goiptables.ProtocolIPv4))
		if err != nil {
			failed <- fmt.Errorf("asking %s for its version: %w", path, err)
			return
		}
		major, minor, patch := ipt.GetIptablesVersion()
		numbers <- [3]int{major, minor, patch}
	}()
	version, _, err := b.start(ctx, nil, filepath.Base(path), "--version")()
	b.version = strings.TrimSpace(string(version))
	select {
	case again := <-failed:
		return errors.Join(err, again)
	case number := <-numbers:
		if err == nil && slices.Compare(number[:], oldest[:]) < 0 {
			err = fmt.Errorf("%s is too old: 1.6.2 is the first that waits for the lock when it restores", b.version)
		}
		return err
	}
}

// start executes one of the programs. What it returns waits for its end and
// returns what it printed. Where it fails, what it printed as the reason becomes
// part of the error.
//
// The program runs in the network namespace of the thread that starts it.
func (b *Backend) start(ctx context.Context, input []byte, program string, args ...string) (finish func() (stdout, stderr []byte, err error)) {
	fail := func(err error) func() ([]byte, []byte, error) {
		return func() ([]byte, []byte, error) { return nil, nil, err }
	}
	cmd := exec.CommandContext(ctx, filepath.Join(b.directory, program), args...)
	if len(input) > 0 {
		file, err := inMemory(program, input)
		if err != nil {
			return fail(err)
		}
		// The program has one of its own.
		defer file.Close()
		cmd.Stdin = file
	}
	var out, printed bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &printed
	// Of a process group of its own, so that who interrupts the router from a
	// terminal does not interrupt a change of rules.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fail(fmt.Errorf("running %s: %w", program, err))
	}
	return func() ([]byte, []byte, error) {
		if err := cmd.Wait(); err != nil {
			if ctx.Err() != nil {
				return nil, nil, fmt.Errorf("running %s: %w", program, ctx.Err())
			}
			return nil, nil, runError(program, err, printed.String())
		}
		return out.Bytes(), printed.Bytes(), nil
	}
}

// inMemory returns a file in memory that holds data (memfd_create(2)). A large
// restore reads it faster than a pipe, which holds 64 KiB at a time.
func inMemory(name string, data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	file := os.NewFile(uintptr(fd), name)
	if _, err := file.WriteAt(data, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("writing the input of %s: %w", name, err), file.Close())
	}
	return file, nil
}

// runError folds what a program printed into its error. A refusal by the kernel
// becomes os.ErrPermission, for whoever asks with errors.Is.
func runError(program string, err error, printed string) error {
	var lines []string
	for line := range strings.Lines(printed) {
		// "iptables-restore v1.8.9 (nf_tables): " may stand alone on a line.
		if line = strings.TrimSpace(line); line != "" && !strings.HasSuffix(line, ":") && !strings.HasPrefix(line, "#") {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		return fmt.Errorf("running %s: %w", program, err)
	}
	printed = strings.Join(lines, "; ")
	if strings.Contains(printed, "Permission denied") || strings.Contains(printed, "Operation not permitted") {
		err = errors.Join(err, os.ErrPermission)
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
	switch {
	case strings.Contains(e.printed, "holding the xtables lock"):
		return "another program holds the lock of iptables for long: see which (it has /run/xtables.lock open), and start the router again"
	case strings.Contains(e.printed, "lock file"):
		return "the legacy flavour of iptables needs a writable /run for its lock, or XTABLES_LOCKFILE naming a file that is writable"
	}
	return ""
}

// Begin reads what the kernel holds and returns a Tx that changes it. Plan is what
// the kernel is to hold in the end: its text is made while the programs run.
func (b *Backend) Begin(ctx context.Context, plan rules.Plan) (*Tx, error) {
	tx := &Tx{backend: b}
	var waits []func() error
	for _, family := range b.families {
		f := &familyTx{backend: b, family: family}
		tx.families = append(tx.families, f)
		waits = append(waits, f.read(ctx))
	}
	b.text(plan)
	var failed []error
	for _, wait := range waits {
		failed = append(failed, wait())
	}
	if err := errors.Join(append(failed, b.asked())...); err != nil {
		return nil, err
	}
	return tx, nil
}

// Flavour returns which kind of iptables it is.
func (tx *Tx) Flavour() Flavour {
	if strings.Contains(tx.backend.version, string(NFTables)) {
		return NFTables
	}
	return Legacy
}

// Watched reports whether the kernel tells of changes to the rules: it does for
// those that are nftables' in truth.
func (tx *Tx) Watched() bool { return tx.Flavour() == NFTables }

// Holds reports whether chains of ours are there.
func (tx *Tx) Holds() bool {
	return slices.ContainsFunc(tx.families, func(f *familyTx) bool { return f.now.holdsAny() })
}
