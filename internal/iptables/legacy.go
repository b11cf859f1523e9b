package iptables

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// A Stray is what an earlier run with iptables of the legacy flavour left.
// Whatever the rules in use say, it would go on redirecting.
type Stray struct{ tx *Tx }

// A HeldError says that rules of an earlier run cannot be removed.
type HeldError struct{ Err error }

func (e *HeldError) Error() string {
	return fmt.Sprintf("removing what an earlier run loaded with the legacy flavour of iptables: %v", e.Err)
}

// Unwrap returns what is missing.
func (e *HeldError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *HeldError) Hint() string {
	return "delete the pod, so that the next one has a fresh network namespace; or use an image that has iptables-legacy-save and iptables-legacy-restore"
}

// FindStray looks for chains of ours in the tables of the legacy flavour, and
// returns nil where there are none. Where there are and no program of that
// flavour is here to remove them, the error is a *HeldError.
func FindStray(ctx context.Context, families []rules.Family) (*Stray, error) {
	var held []rules.Family
	for _, f := range families {
		found, err := legacyHolds(f)
		if err != nil {
			return nil, fmt.Errorf("looking for rules of the legacy flavour of iptables: %w", err)
		}
		if found {
			held = append(held, f)
		}
	}
	if len(held) == 0 {
		return nil, nil
	}
	b, err := find(ctx, "-legacy", directories, held)
	if err != nil {
		return nil, &HeldError{err}
	}
	tx, err := b.Begin(ctx, rules.Plan{})
	if err != nil {
		return nil, err
	}
	return &Stray{tx}, nil
}

// String says what was found.
func (s *Stray) String() string { return "chains of iptables (legacy)" }

// Remove removes all of it and returns the way back; with an error, where not all
// is as it was.
func (s *Stray) Remove(ctx context.Context) (undo func() error, err error) {
	if undo, err = s.tx.Apply(ctx, rules.Plan{}); err != nil {
		err = fmt.Errorf("removing %s: %w", s, err)
	}
	return undo, err
}

// What the kernel tells about a table of the legacy flavour
// (linux/netfilter_ipv4/ip_tables.h and ip6_tables.h, which number alike).
const (
	getInfo    = 64 // struct ipt_getinfo
	getEntries = 65 // struct ipt_get_entries
	tableLen   = 32 // of a table's name, at the front of both
	infoLen    = 84
	sizeAt     = 80 // in the first: how long the entries are
	entriesAt  = 40 // in the second: where they begin, aligned to 8 bytes
)

// legacyHolds reports whether the tables of one family hold chains of ours. It
// asks for tables that are there only: asking makes the kernel add others.
func legacyHolds(f rules.Family) (bool, error) {
	file, domain, level := "/proc/thread-self/net/ip_tables_names", unix.AF_INET, unix.SOL_IP
	if f == rules.IPv6 {
		file, domain, level = "/proc/thread-self/net/ip6_tables_names", unix.AF_INET6, unix.SOL_IPV6
	}
	names, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) || err == nil && len(names) == 0 {
		return false, nil // the kernel has none
	}
	if err != nil {
		return false, err
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	for name := range strings.FieldsSeq(string(names)) {
		if !slices.Contains([]rules.Table{rules.Mangle, rules.NAT, rules.Filter}, rules.Table(name)) {
			continue
		}
		entries, err := legacyEntries(fd, level, name)
		if err != nil {
			return false, fmt.Errorf("reading table %s: %w", name, err)
		}
		for _, hook := range rules.Hooks {
			// The name of a chain stands in the entry that begins it.
			if bytes.Contains(entries, append([]byte(rules.ChainPrefix+string(hook)), 0)) {
				return true, nil
			}
		}
	}
	return false, nil
}

// legacyEntries returns the entries of a table as the kernel has them.
func legacyEntries(fd, level int, table string) ([]byte, error) {
	info := make([]byte, infoLen)
	copy(info[:tableLen-1], table)
	if err := getsockopt(fd, level, getInfo, info); err != nil {
		return nil, err
	}
	size := binary.NativeEndian.Uint32(info[sizeAt:])
	entries := make([]byte, entriesAt+size)
	copy(entries[:tableLen-1], table)
	binary.NativeEndian.PutUint32(entries[tableLen:], size)
	if err := getsockopt(fd, level, getEntries, entries); err != nil {
		return nil, err
	}
	return entries[entriesAt:], nil
}

// getsockopt reads a socket option that is a structure of any length, which is
// also the question.
func getsockopt(fd, level, option int, data []byte) error {
	length := uint32(len(data))                                                                     //nolint:gosec // a table's length has 32 bits
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), //nolint:gosec // file descriptors and constants
		uintptr(unsafe.Pointer(&data[0])), uintptr(unsafe.Pointer(&length)), 0) //nolint:gosec // as the system call wants them
	if errno != 0 {
		return os.NewSyscallError("getsockopt", errno)
	}
	return nil
}
