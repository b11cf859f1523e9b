// Package events tells when the kernel's network or its rules have changed, in
// one network namespace: whoever watches over them looks again then, and needs
// no polling.
package events

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A Kind is a set of what may have changed.
type Kind uint32

// The kinds.
const (
	Network Kind = 1 << iota // links, IPv4 addresses, routes, routing rules, and the sysctls of forwarding and rp_filter
	Rules                    // those of nftables, which are also those of iptables' nf_tables flavour
)

// networkGroups are the multicast groups of what a router configures
// (linux/rtnetlink.h). The kernel tells of IPv4 routes that are deleted, but not
// of those that go with their link or their address; of these it tells that the
// link or the address has changed. The last group has the sysctls
// (net/ipv4/devinet.c, inet_netconf_notify_devconf).
var networkGroups = []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV4_NETCONF}

// rulesGroup tells of each change of nftables
// (linux/netfilter/nfnetlink.h, NFNLGRP_NFTABLES).
const rulesGroup = 7

// A Subscription collects what has changed.
type Subscription struct {
	sockets []*os.File
	changed atomic.Uint32 // a Kind
	wake    chan struct{}
}

// Subscribe begins to listen in the calling thread's network namespace. A kernel
// without nftables tells of no rules.
func Subscribe() (*Subscription, error) {
	s := &Subscription{wake: make(chan struct{}, 1)}
	if err := s.listen(unix.NETLINK_ROUTE, Network, networkGroups...); err != nil {
		return nil, fmt.Errorf("subscribe to rtnetlink events: %w", err)
	}
	if err := s.listen(unix.NETLINK_NETFILTER, Rules, rulesGroup); err != nil && !errors.Is(err, unix.EPROTONOSUPPORT) {
		s.Close()
		return nil, fmt.Errorf("subscribe to nftables events: %w", err)
	}
	return s, nil
}

// listen opens a socket for groups of a netlink protocol, and reads it until the
// subscription is closed.
func (s *Subscription) listen(protocol int, kind Kind, groups ...int) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), "netlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		_ = file.Close()
		return os.NewSyscallError("bind", err)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			_ = file.Close()
			return os.NewSyscallError("setsockopt", err)
		}
	}
	raw, err := file.SyscallConn()
	if err != nil {
		_ = file.Close()
		return err
	}
	s.sockets = append(s.sockets, file)
	go func() {
		// What has changed is found by looking; that something has is all that
		// is read here. A few bytes of a message are enough to take it.
		var b [64]byte
		_ = raw.Read(func(fd uintptr) bool {
			told := false
			for {
				_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_DONTWAIT)
				switch {
				case err == nil, errors.Is(err, unix.ENOBUFS): // more than the socket holds
					told = true
					continue
				case errors.Is(err, unix.EINTR):
					continue
				}
				break
			}
			if told {
				s.tell(kind)
			}
			return false // wait for the next; it ends when the socket is closed
		})
	}()
	return nil
}

func (s *Subscription) tell(kind Kind) {
	s.changed.Or(uint32(kind))
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Changed returns a channel that has a value when something has changed since
// the last Take.
func (s *Subscription) Changed() <-chan struct{} { return s.wake }

// Take returns what has changed since the last call.
func (s *Subscription) Take() Kind { return Kind(s.changed.Swap(0)) }

// Close ends the subscription.
func (s *Subscription) Close() {
	for _, f := range s.sockets {
		_ = f.Close() // it is read only
	}
}
