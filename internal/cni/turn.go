package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/object"
)

// maxTurnWait is the time that ADD waits for the end of another pod with its address. A router
// ends a few seconds after its deletion. The kubelet repeats a failed ADD, after 10 to 15 s
// (kubelet, backOffPeriod), and a pod that is deleted while its ADD waits ends only after that.
const maxTurnWait = 15 * time.Second

// takeTurn waits until no other pod of the node has one of the addresses of a router, and
// reserves them until end is called. The successor of a deleted pod may start before that has ended, and two
// hosts with an address on the physical network take each other's replies. The kernel ends the
// reservation with the process.
//
// Two NICs may be in different networks, which may have the same addresses.
func (c *call) takeTurn(ctx context.Context, made object.Description) (end func(), err error) {
	var reserved []int
	release := func() {
		for _, fd := range reserved {
			_ = unix.Close(fd) // nothing was written
		}
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	var addresses []netip.Addr
	for _, s := range made.Sources {
		addresses = append(addresses, s.Prefix.Addr())
	}
	parent, err := parentOf(made.Master)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(addresses, netip.Addr.Compare) // two calls would wait for each other
	for _, a := range slices.Compact(addresses) {
		fd, err := reserveAddress(ctx, a, parent)
		if err != nil {
			return nil, err
		}
		reserved = append(reserved, fd)
	}
	return release, c.awaitEnd(ctx, addresses, parent)
}

// parentOf returns the index of the node's NIC that an interface on master has below it; 0: it
// is not known.
func parentOf(master string) (int, error) {
	if master == "" { // the interface is of another plugin
		return 0, nil
	}
	kernel, err := link.Open()
	if err != nil {
		return 0, err
	}
	defer kernel.Close()
	parent, err := kernel.ParentIndex(master)
	if is[*link.MissingError](err) {
		return 0, nil // the caller finds it next
	}
	return parent, err
}

// reserveAddress waits until no other call of the node takes an address on a NIC. A name of a
// socket exists once in a network namespace (unix(7), abstract sockets).
func reserveAddress(ctx context.Context, a netip.Addr, parent int) (fd int, err error) {
	if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
		err = retry(ctx, 5*time.Millisecond, func() (bool, error) {
			err := unix.Bind(fd, &unix.SockaddrUnix{Name: fmt.Sprintf("@egress-router %s %d", a, parent)})
			if errors.Is(err, unix.EADDRINUSE) {
				return false, nil
			}
			return err == nil, err
		})
		if err != nil {
			_ = unix.Close(fd) // nothing was written
		}
	}
	switch {
	case errors.Is(err, errTimeout):
		return 0, newError(types.ErrTryAgainLater, "", "take reserved address %s: another call that takes it has not ended", a)
	case err != nil:
		return 0, fmt.Errorf("take reserved address %s: reserve it on the node: %w", a, err)
	}
	return fd, nil
}

// awaitEnd waits until no other pod of the node has one of the addresses. A namespace that it
// cannot read is logged: it may belong to another program, and the probe of the address follows.
func (c *call) awaitEnd(ctx context.Context, addresses []netip.Addr, parent int) error {
	ctx, cancel := context.WithTimeout(ctx, maxTurnWait)
	defer cancel()
	var last string
	unread, waits := c.log.warnings().Warn, c.log.warnings().Warn
	err := retry(ctx, 50*time.Millisecond, func() (bool, error) {
		a, holder, err := c.holder(addresses, parent)
		if err != nil {
			unread("other pods not checked", "error", err)
			unread = func(string, ...any) {} // once
		}
		if holder == "" {
			return true, nil
		}
		last = fmt.Sprintf("take reserved address %s: another pod of the node has it: %s", a, holder)
		waits("waiting for another pod", "address", a, "holder", holder)
		waits = func(string, ...any) {}
		return false, nil
	})
	if errors.Is(err, errTimeout) {
		return newError(types.ErrTryAgainLater, "a router has one pod: delete the other one", "%s", last)
	}
	return err
}

// holder returns an address that another pod of the node has on the same NIC, as far as that is
// known, and where.
func (c *call) holder(addresses []netip.Addr, parent int) (a netip.Addr, where string, err error) {
	own, err := os.Stat(c.netns)
	if err != nil {
		return a, "", nil //nolint:nilerr // the namespace has gone, which the caller finds next
	}
	err = c.process.eachNamespace(func(file string, routers []attachment) error {
		if info, err := os.Stat(file); err != nil || os.SameFile(own, info) {
			return nil //nolint:nilerr // it has gone
		}
		for _, r := range routers {
			if r.parent != parent && r.parent != 0 && parent != 0 {
				continue
			}
			i := slices.IndexFunc(addresses, func(a netip.Addr) bool {
				return slices.ContainsFunc(r.addresses, func(p netip.Prefix) bool { return p.Addr() == a })
			})
			if i >= 0 {
				a, where = addresses[i], fmt.Sprintf("%s of %s, container %s", r.ifname, file, r.container)
			}
		}
		return nil
	})
	return a, where, err
}

var errTimeout = errors.New("timeout")

// retry calls do until it is done or fails, or ctx ends, or the process that has made this call:
// a runtime that does not wait for the result any more calls DEL, after which there must be no
// ADD.
func retry(ctx context.Context, interval time.Duration, do func() (done bool, err error)) error {
	for parent := os.Getppid(); ; {
		done, err := do()
		if done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return errTimeout
		case <-time.After(interval):
		}
		if os.Getppid() != parent {
			return newError(types.ErrTryAgainLater, "", "the runtime has ended while this call waited")
		}
	}
}
