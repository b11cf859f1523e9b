// Package events notifies of changes of the network and the rules in one network
// namespace, so that a watcher needs no polling.
package events

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"syscall"

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
	timed   []string // names of tables
	inside  bool     // a message of the current transaction of nftables has arrived
}

// Subscribe begins to receive events in the calling thread's network namespace. On
// a kernel without nftables there are no rule events. Elements of sets in the tables with
// the given names come and go all the time, and are no events.
func Subscribe(timed ...string) (*Subscription, error) {
	s := &Subscription{wake: make(chan struct{}, 1), timed: timed}
	if err := s.listen(unix.NETLINK_ROUTE, Network, networkGroups...); err != nil {
		return nil, fmt.Errorf("subscribe to rtnetlink events: %w", err)
	}
	if err := s.listen(unix.NETLINK_NETFILTER, Rules, rulesGroup); err != nil && !errors.Is(err, unix.EPROTONOSUPPORT) {
		s.Close()
		return nil, fmt.Errorf("subscribe to nftables events: %w", err)
	}
	return s, nil
}

// SubscribeLinks begins to receive the events of interfaces alone.
func SubscribeLinks() (*Subscription, error) {
	s := &Subscription{wake: make(chan struct{}, 1)}
	if err := s.listen(unix.NETLINK_ROUTE, Network, unix.RTNLGRP_LINK); err != nil {
		return nil, fmt.Errorf("subscribe to rtnetlink events: %w", err)
	}
	return s, nil
}

// open opens a socket for groups of a netlink protocol.
func open(protocol int, groups ...int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), "netlink")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		_ = file.Close()
		return nil, os.NewSyscallError("bind", err)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			_ = file.Close()
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	return file, nil
}

// listen opens a socket for groups of a netlink protocol, and reads it until the
// subscription is closed.
func (s *Subscription) listen(protocol int, kind Kind, groups ...int) error {
	file, err := open(protocol, groups...)
	if err != nil {
		return err
	}
	raw, err := file.SyscallConn()
	if err != nil {
		_ = file.Close()
		return err
	}
	s.sockets = append(s.sockets, file)
	go func() {
		// The watcher compares with the kernel: of a message of nftables its table alone
		// matters, and of others nothing. A few bytes are enough to consume one.
		b := make([]byte, 64)
		if kind == Rules && len(s.timed) > 0 {
			b = make([]byte, longest)
		}
		_ = raw.Read(func(fd uintptr) bool {
			notified := false
			for {
				n, _, err := unix.Recvfrom(int(fd), b, unix.MSG_DONTWAIT)
				switch {
				case err == nil && len(b) == longest:
					notified = s.matters(b[:n]) || notified
					continue
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

// longest is more than the kernel puts into one packet of messages (linux/netlink.h,
// NLMSG_GOODSIZE).
const longest = 64 << 10

// The types of messages of nftables (linux/netfilter/nf_tables.h).
const (
	newElement    = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWSETELEM
	deleteElement = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELSETELEM
	newGeneration = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN
)

// matters reports whether messages of nftables are of more than elements of the tables whose
// elements come and go. The kernel sends those of a transaction, and then a message with the
// number of the next generation (nf_tables_commit in net/netfilter/nf_tables_api.c).
func (s *Subscription) matters(b []byte) (matters bool) {
	messages, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return true
	}
	for _, m := range messages {
		if m.Header.Type == newGeneration {
			matters = matters || !s.inside // its messages are lost
			s.inside = false
			continue
		}
		s.inside = true
		matters = matters || !s.isTimed(m)
	}
	return matters
}

// isTimed reports whether a message is of an element of one of those tables. The name of the
// table is its first attribute (nf_tables_fill_setelem_info).
func (s *Subscription) isTimed(m syscall.NetlinkMessage) bool {
	const attributes = 4 // behind struct nfgenmsg
	if m.Header.Type != newElement && m.Header.Type != deleteElement || len(m.Data) < attributes+unix.NLA_HDRLEN {
		return false
	}
	first := m.Data[attributes:]
	length, kind := int(binary.NativeEndian.Uint16(first)), binary.NativeEndian.Uint16(first[2:])
	if kind != unix.NFTA_SET_ELEM_LIST_TABLE || length < unix.NLA_HDRLEN || length > len(first) {
		return false
	}
	return slices.Contains(s.timed, string(bytes.TrimRight(first[unix.NLA_HDRLEN:length], "\x00")))
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
