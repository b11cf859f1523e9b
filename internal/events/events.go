// Package events notifies of changes of the network and the rules in one network
// namespace, so that a watcher needs no polling.
package events

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A Kind is a set of things that may have changed.
type Kind uint32

// The kinds.
const (
	Network Kind = 1 << iota // links, addresses, routes, routing rules, and the sysctls forwarding, rp_filter and proxy_arp
	Rules                    // nftables, including iptables' nf_tables flavour
)

// networkGroups are the multicast groups of a router's objects
// (linux/rtnetlink.h). The kernel notifies of deleted IPv4 routes, except of those
// that disappear with their link or their address; then it notifies of the change
// of the link or the address. The group of netconf has the sysctls
// (net/ipv4/devinet.c, inet_netconf_notify_devconf); the kernel notifies of no others.
var networkGroups = []int{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV4_NETCONF,
	unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV6_NETCONF,
}

// rulesGroup is the multicast group of nftables changes
// (linux/netfilter/nfnetlink.h, NFNLGRP_NFTABLES).
const rulesGroup = 7

// A Subscription collects changes.
type Subscription struct {
	sockets []*os.File
	changed atomic.Uint32 // a Kind
	wake    chan struct{}
}

// Subscribe begins to receive events in the calling thread's network namespace. On
// a kernel without nftables there are no rule events.
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
		// The content of a message does not matter: the watcher compares with the
		// kernel. A few bytes are enough to consume a message.
		var b [64]byte
		_ = raw.Read(func(fd uintptr) bool {
			notified := false
			for {
				_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_DONTWAIT)
				switch {
				case err == nil, errors.Is(err, unix.ENOBUFS): // more than the socket's buffer
					notified = true
					continue
				case errors.Is(err, unix.EINTR):
					continue
				}
				break
			}
			if notified {
				s.notify(kind)
			}
			return false // wait for the next one, until the socket is closed
		})
	}()
	return nil
}

func (s *Subscription) notify(kind Kind) {
	s.changed.Or(uint32(kind))
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Changed returns a channel that receives a value if something has changed since
// the last Take.
func (s *Subscription) Changed() <-chan struct{} { return s.wake }

// Take returns the changes since the last call.
func (s *Subscription) Take() Kind { return Kind(s.changed.Swap(0)) }

// Close ends the subscription.
func (s *Subscription) Close() {
	for _, f := range s.sockets {
		_ = f.Close() // it is read only
	}
}
