// Package iptables puts a rule plan into the kernel with the iptables programs,
// of either flavour (nf_tables or legacy).
//
// One iptables-save reads the rules. One iptables-restore --noflush changes the
// router's chains, and the jumps to them from chains that it shares with other
// programs. The kernel takes each table as a whole or not at all; chains and
// rules of other programs stay (iptables-restore(8)).
//
// # Other versions
//
// Rules are compared as text, and iptables-save need not print a rule in the form
// that iptables-restore was given: neither iptables-save(8) nor iptables(8)
// promises one, and forms have changed (1.8.9 prints protocol numbers by name
// from a list of its own, "-p icmpv6" without /etc/protocols). A plan is rendered
// in the form of Debian's 1.8.9, which 1.8.7, 1.8.11 and 1.8.13 print too. With
// these the comparison needs nothing else.
//
// If a chain has another text, it may be damaged, or planned and in another form.
// A canary decides: the same rules are loaded into scratch chains, EGRESS-TMP-…,
// which nothing leads to, read back, and removed. The process keeps the forms
// found, so that the next comparison is one iptables-save again. No chain that
// packets meet changes for it. A canary that fails is an error of reading: rules
// that could not be compared do not count as planned.
package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	goiptables "github.com/coreos/go-iptables/iptables"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// lockSeconds is the longest wait, in seconds, for the xtables lock, which the
// legacy flavour takes (iptables(8), --wait). Other programs, and the restore of the other
// family, hold it well under a second, but a node that is busy can delay them for many.
const lockSeconds = 60

// directories contain iptables in most distributions. They are searched after
// PATH, which may lack them in a container or for a user.
var directories = []string{"/usr/sbin", "/sbin", "/usr/local/sbin"}

// oldest is the first version whose iptables-restore has -w.
var oldest = [3]int{1, 6, 2}

// A Flavour is one of the two kinds of iptables, which keep their rules in
// different places of the kernel. iptables prints it after its version; a version
// without one is of the legacy flavour (iptables 1.8.0 was the first to print it).
type Flavour string

// The flavours.
const (
	NFTables Flavour = "nf_tables"
	Legacy   Flavour = "legacy"
)

// A Backend is an installation of iptables.
type Backend struct {
	directory string         // directory of its programs
	variant   string         // part of the programs' names, such as "-legacy"
	families  []rules.Family // families to change, IPv4 first
	versioned func() error   // waits until version is set
	version   string         // version and flavour, as iptables prints them

	// The plan of the last Tx as text: rendering thousands of rules takes about
	// as long as loading them.
	plan      rules.Plan
	chains    []rules.TextChain
	planned   map[rules.Family]map[chainID][]byte // the texts of chains
	spellings map[rules.Family]*spelling
}

// A MissingError means that this machine has no usable iptables.
type MissingError struct{ Err error }

func (e *MissingError) Error() string { return fmt.Sprintf("looking for iptables: %v", e.Err) }

// Unwrap returns the cause.
func (e *MissingError) Unwrap() error { return e.Err }

// Hint returns the remedy.
func (e *MissingError) Hint(names wording.Names) string {
	return wording.Textf(`install the package "iptables", which contains iptables, iptables-save, iptables-restore and the same for IPv6; or %s`, otherPrograms).In(names)
}

// program returns the name of a family's program, with a suffix such as "save",
// or without one.
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

// Find returns the first iptables in PATH, or else in the usual directories, for
// the rules of the given families. All programs come from one directory, so that
// they are of one flavour. If one is missing, the error is a *MissingError.
func Find(ctx context.Context, families ...rules.Family) (*Backend, error) {
	return find(ctx, "", directories, families)
}

// find is Find for programs with variant in their names.
func find(ctx context.Context, variant string, directories []string, families []rules.Family) (*Backend, error) {
	b := &Backend{variant: variant, families: families, spellings: make(map[rules.Family]*spelling)}
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
		b.spellings[f] = new(spelling)
		for _, suffix := range []string{"save", "restore"} {
			if _, err := exec.LookPath(filepath.Join(b.directory, b.program(f, suffix))); err != nil {
				return nil, &MissingError{err}
			}
		}
	}
	b.versioned = sync.OnceValue(func() error { return b.setVersion(ctx, path) })
	go func() { _ = b.versioned() }() // Begin waits for it, and returns the error
	return b, nil
}

// setVersion runs iptables --version. The output does not depend on the network
// namespace, so any thread may run it.
func (b *Backend) setVersion(ctx context.Context, path string) error {
	// go-iptables parses the version, and does not export the flavour. Each
	// needs a process, so both run at the same time.
	numbers := make(chan [3]int, 1)
	failed := make(chan error, 1)
	go func() {
		ipt, err := goiptables.New(goiptables.Path(path), goiptables.IPFamily(goiptables.ProtocolIPv4))
		if err != nil {
			failed <- &versionError{fmt.Errorf("reading the version of %s: %w", path, err)}
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
			err = &versionError{fmt.Errorf("%s is too old: expected at least 1.6.2, whose iptables-restore has -w", b.version)}
		}
		return err
	}
}

// start starts one of the programs. The returned function waits for its end and
// returns its output. If the program fails, its messages become part of the error.
//
// The program runs in the network namespace of the calling thread.
func (b *Backend) start(ctx context.Context, input []byte, program string, args ...string) (finish func() (stdout, stderr []byte, err error)) {
	var out bytes.Buffer
	end := b.startTo(ctx, &out, input, program, args...)
	return func() (stdout, stderr []byte, err error) {
		if stderr, err = end(); err != nil {
			return nil, nil, err
		}
		return out.Bytes(), stderr, nil
	}
}

// startTo is start for a program that writes its output to out.
func (b *Backend) startTo(ctx context.Context, out io.Writer, input []byte, program string, args ...string) (finish func() (stderr []byte, err error)) {
	fail := func(err error) func() ([]byte, error) {
		return func() ([]byte, error) { return nil, err }
	}
	cmd := exec.CommandContext(ctx, filepath.Join(b.directory, program), args...)
	if len(input) > 0 {
		file, err := inMemory(program, input)
		if err != nil {
			return fail(err)
		}
		// The program has a descriptor of its own.
		defer file.Close()
		cmd.Stdin = file
	}
	var printed bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &printed
	// A process group of its own: Ctrl-C in a terminal ends the router, and does
	// not interrupt a change of rules.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fail(&programError{program: program, err: err})
	}
	return func() ([]byte, error) {
		if err := cmd.Wait(); err != nil {
			if ctx.Err() != nil {
				return nil, &programError{program: program, err: ctx.Err()}
			}
			return nil, runError(program, err, printed.String())
		}
		return printed.Bytes(), nil
	}
}

// inMemory returns a file in memory with the given content (memfd_create(2)). A
// large restore reads it faster than a pipe of 64 KiB.
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

// Begin reads the rules and returns a Tx to change them into plan, whose text is
// rendered while the programs run. An error is one of a program, of a version that
// is too old, or of ctx.
func (b *Backend) Begin(ctx context.Context, plan rules.Plan) (*Tx, error) {
	tx := &Tx{backend: b}
	var waits []func() error
	for _, family := range b.families {
		f := &familyTx{backend: b, family: family, spelling: b.spellings[family]}
		tx.families = append(tx.families, f)
		waits = append(waits, f.read(ctx))
	}
	before := b.chains
	if !plan.Equal(b.plan) {
		b.plan, b.chains = plan, plan.IPTables()
		b.planned = make(map[rules.Family]map[chainID][]byte)
		for _, c := range b.chains {
			if b.planned[c.Family] == nil {
				b.planned[c.Family] = make(map[chainID][]byte)
			}
			b.planned[c.Family][chainID{c.Table, c.Name}] = c.Saved
		}
	}
	var failed []error
	for _, wait := range waits {
		failed = append(failed, wait())
	}
	if err := errors.Join(append(failed, b.versioned())...); err != nil {
		return nil, err
	}
	for _, f := range tx.families {
		if err := f.recognise(ctx, plan, b.chains, before); err != nil {
			return nil, err
		}
	}
	return tx, nil
}

// Flavour returns the flavour of the programs.
func (tx *Tx) Flavour() Flavour {
	if strings.Contains(tx.backend.version, string(NFTables)) {
		return NFTables
	}
	return Legacy
}

// Watched reports whether the kernel notifies of changes of the rules. It does for
// the nf_tables flavour, by NFNLGRP_NFTABLES (linux/netfilter/nfnetlink.h).
func (tx *Tx) Watched() bool { return tx.Flavour() == NFTables }

// Holds reports whether the kernel has chains of the router.
func (tx *Tx) Holds() bool {
	return slices.ContainsFunc(tx.families, func(f *familyTx) bool { return f.now.hasChains() })
}
