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

	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// A Stray is the rules of an earlier run with iptables of the legacy flavour. They
// redirect beside the rules of the backend in use.
type Stray struct{ tx *Tx }

// A HeldError means that rules of an earlier run cannot be removed.
type HeldError struct{ Err error }

func (e *HeldError) Error() string {
	return fmt.Sprintf("removing rules of an earlier run with iptables (legacy): %v", e.Err)
}

// Unwrap returns the cause.
func (e *HeldError) Unwrap() error { return e.Err }

// Hint returns the remedy.
func (e *HeldError) Hint(wording.Names) string {
	return "delete the pod, so that the next one has a fresh network namespace; or use an image that has iptables-legacy-save and iptables-legacy-restore"
}

// FindStray returns the router's chains in the tables of the legacy flavour, nil if
// there are none. If there are, and this machine has no program of that flavour to
// remove them, the error is a *HeldError.
func FindStray(ctx context.Context, families []rules.Family) (*Stray, error) {
	var held []rules.Family
	for _, f := range families {
		found, err := legacyHolds(f)
		if err != nil {
			return nil, fmt.Errorf("looking for rules of iptables (legacy): %w", err)
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

// String describes the rules found.
func (s *Stray) String() string { return "chains of iptables (legacy)" }

// Remove removes all of it and returns the rollback. With an error the rollback is
// nil if the rules are as before.
func (s *Stray) Remove(ctx context.Context) (undo func() error, err error) {
	if undo, err = s.tx.Apply(ctx, rules.Plan{}); err != nil {
		err = fmt.Errorf("removing %s: %w", s, err)
	}
	return undo, err
}

// The socket options that return a table of the legacy flavour, and their
// structures (linux/netfilter_ipv4/ip_tables.h and ip6_tables.h, with the same
// numbers). Lengths and offsets are in bytes.
const (
	getInfo    = 64 // struct ipt_getinfo
	getEntries = 65 // struct ipt_get_entries
	tableLen   = 32 // length of a table's name, the first field of both
	infoLen    = 84 // length of the first
	sizeAt     = 80 // in the first, offset of the length of the entries
	entriesAt  = 40 // in the second, offset of the entries, aligned to 8 bytes
)

// legacyHolds reports whether the tables of one family have chains of the router.
// It reads existing tables only: the kernel would create others.
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
		if !slices.Contains([]rules.Table{rules.Raw, rules.Mangle, rules.NAT, rules.Filter}, rules.Table(name)) {
			continue
		}
		entries, err := legacyEntries(fd, level, name)
		if err != nil {
			return false, fmt.Errorf("reading table %s: %w", name, err)
		}
		for _, hook := range rules.Hooks {
			// A chain's first entry contains its name.
			if bytes.Contains(entries, append([]byte(rules.ChainPrefix+string(hook)), 0)) {
				return true, nil
			}
		}
	}
	return false, nil
}

// legacyEntries returns the entries of a table in the kernel's format.
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

// getsockopt reads a socket option, a structure of any length whose first fields
// are input.
func getsockopt(fd, level, option int, data []byte) error {
	length := uint32(len(data))                                                                     //nolint:gosec // a table's length has 32 bits
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), //nolint:gosec // file descriptors and constants
		uintptr(unsafe.Pointer(&data[0])), uintptr(unsafe.Pointer(&length)), 0) //nolint:gosec // the arguments of the system call
	if errno != 0 {
		return os.NewSyscallError("getsockopt", errno)
	}
	return nil
}
