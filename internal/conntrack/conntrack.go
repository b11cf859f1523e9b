// Package conntrack tells what the kernel's connection table says about
// redirected connections: how many there were to each destination and how much
// they carried, who is connected now, and, as they come and go, which.
//
// The kernel counts; nothing here is on a packet's way. Both rule backends leave
// the same entries in the table, so this is the same for both, and loading rules
// does not touch the counters.
//
// Counters take two things: the event that a connection has ended, with its
// totals, and, when they are asked for, a listing of those that are open. Without
// either nothing runs.
package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// A Destination is one line of the destination list, as counters name it. The
// zero Protocol, Port and ToPort are those of the fallback.
type Destination struct {
	Protocol rules.Protocol
	Port     rules.Port // of the pod
	To       netip.Addr
	ToPort   rules.Port // also where the line leaves it out
}

// Traffic is what connections carry, as IP packets and with the headers from
// that of IP on. Out is toward the server. Segments that the network card or
// driver has joined (GRO) are one packet.
type Traffic struct {
	PacketsOut, BytesOut, PacketsIn, BytesIn uint64
}

func (t *Traffic) add(other Traffic) {
	t.PacketsOut += other.PacketsOut
	t.BytesOut += other.BytesOut
	t.PacketsIn += other.PacketsIn
	t.BytesIn += other.BytesIn
}

func (t Traffic) minus(other Traffic) Traffic {
	return Traffic{t.PacketsOut - other.PacketsOut, t.BytesOut - other.BytesOut, t.PacketsIn - other.PacketsIn, t.BytesIn - other.BytesIn}
}

// less reports whether t cannot be a later count of what other counts.
func (t Traffic) less(other Traffic) bool {
	return t.PacketsOut < other.PacketsOut || t.BytesOut < other.BytesOut || t.PacketsIn < other.PacketsIn || t.BytesIn < other.BytesIn
}

// Counts are those of the connections to one destination.
type Counts struct {
	Connections uint64 // that began since the destination is in the list, and the Tracker there
	Traffic            // since then, also of connections from before
	// Open is how many there are now. A TCP connection that is over is not,
	// although it stays in the table for a while.
	Open int
}

// A Line is a line of the destination list with its counts.
type Line struct {
	Destination
	Counts
}

// Ports says how many ports of the reserved address are taken by connections to
// one server. A connection that is over keeps its port until the kernel forgets
// it, two minutes with TCP (nf_conntrack_tcp_timeout_time_wait).
type Ports struct {
	Protocol rules.Protocol
	Server   netip.AddrPort
	InUse    int
}

// PortLimit is how many connections to one port of one server can have the
// reserved address as their source at once: as many as there are ports of the
// range from which the kernel takes another one, where the client's is taken
// (nf_nat_l4proto_unique_tuple in net/netfilter/nf_nat_core.c). Clients that come
// from a port below 1024 get one below.
const PortLimit = 65535 - 1024 + 1

// A Report is what there is to know at one time.
type Report struct {
	Lines []Line  // in the order of the list, the fallback last
	Ports []Ports // by protocol and server; of servers without a connection none
	// Accounted says that packets and bytes are known: the kernel counts them.
	Accounted bool
	// Overruns is how often events came faster than they were read, so that
	// some were lost. Connections are then missing from the counts.
	Overruns uint64
}

// An Event is that a redirected connection begins or ends.
type Event struct {
	Began    bool // else it has ended
	Protocol rules.Protocol
	Client   netip.AddrPort
	Port     rules.Port     // of the pod, that the client connected to
	Server   netip.AddrPort // that it was redirected to
	Reserved netip.AddrPort // that the server sees
	// Of a connection that has ended:
	Traffic
	Accounted bool          // Traffic is known
	Duration  time.Duration // to some milliseconds; zero: its begin was not seen
	Lost      bool          // its end was not seen either, only that it is gone; Traffic is what it had when last seen
}

// Options say what to watch.
type Options struct {
	Source netip.Addr // the reserved address
	Mark   rules.Mark // of connections that came in on the cluster side
	Set    rules.Set  // the destinations
	Count  bool       // keep counters
	// Audit is told of each redirected connection that begins or ends, one at a
	// time. It must not call the Tracker. Nil: nobody is.
	Audit func(Event)
	Log   *slog.Logger
}

// A Tracker watches the connections of one network namespace. Its methods may be
// called from several goroutines.
type Tracker struct {
	source [4]byte
	mark   uint32
	log    *slog.Logger
	table  *socket // for listings
	events *socket // nil: nobody wants any

	accounted bool

	mu       sync.Mutex // for all below, and for reading from the sockets
	book     *book
	buffer   [8 << 10]byte // an event has less than 1 KiB
	overruns uint64
	repaired time.Time // when connections whose end was lost were looked for
	lost     bool      // events, since then
}

// Open begins to watch the network namespace of the calling thread. It turns on
// what the kernel has to do for that: the counting of packets and bytes
// (nf_conntrack_acct).
func Open(o Options) (*Tracker, error) {
	if !o.Source.Is4() {
		return nil, fmt.Errorf("track connections from %q: not an IPv4 address", o.Source)
	}
	t := &Tracker{source: o.Source.As4(), mark: uint32(o.Mark), log: o.Log, book: newBook(o.Set, o.Count, o.Audit, time.Now())}
	var err error
	if t.table, err = openSocket(); err != nil {
		return nil, &KernelError{"open conntrack socket", err}
	}
	if err := t.open(o); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func (t *Tracker) open(o Options) error {
	var groups []int
	if o.Count || o.Audit != nil {
		groups = append(groups, unix.NFNLGRP_CONNTRACK_DESTROY)
	}
	if o.Audit != nil {
		groups = append(groups, unix.NFNLGRP_CONNTRACK_NEW)
	}
	if len(groups) == 0 {
		return nil
	}
	var err error
	if t.events, err = openSocket(groups...); err != nil {
		return &KernelError{"subscribe to conntrack events", err}
	}
	// Now the module is loaded, and its sysctls are there.
	t.accounted = startAccounting(t.log)
	checkEvents(t.log)
	if o.Count {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.look() // what is there already
	}
	return nil
}

// Close lets go of what Open took, after Run has returned.
func (t *Tracker) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range []*socket{t.table, t.events} {
		if s != nil {
			s.close()
		}
	}
}

// The pauses after events were taken in. Under load many come together then; to
// be woken for each costs more than all the rest, and the buffer holds those of
// far longer. For counters it does not matter when, since whoever asks for them
// has all events taken in first; of the audit log it makes the times less exact.
const (
	countPause = 10 * time.Millisecond
	auditPause = time.Millisecond
)

// Run takes in events until ctx ends. While there are none it waits in the
// kernel.
func (t *Tracker) Run(ctx context.Context) error {
	if t.events == nil {
		<-ctx.Done()
		return nil
	}
	// What ends the wait.
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("wait for conntrack events: %w", os.NewSyscallError("eventfd", err))
	}
	defer func() { _ = unix.Close(wake) }()
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_, _ = unix.Write(wake, binary.NativeEndian.AppendUint64(nil, 1)) // it cannot be full
		close(ended)
	})
	defer func() {
		if !stop() {
			<-ended // the descriptor is still in use until then
		}
	}()
	pause := countPause
	if t.book.audit != nil {
		pause = auditPause
	}
	for {
		if err := t.wait(wake); err != nil {
			return fmt.Errorf("wait for conntrack events: %w", err)
		}
		if ctx.Err() != nil {
			return nil
		}
		for empty := false; !empty; {
			if empty, err = t.takeSome(); err != nil {
				return fmt.Errorf("read conntrack events: %w", err)
			}
		}
		time.Sleep(pause)
	}
}

// wait returns when there is an event, or something in wake.
func (t *Tracker) wait(wake int) error {
	t.mu.Lock()
	fd := t.events.fd
	t.mu.Unlock()
	if fd < 0 {
		return os.ErrClosed
	}
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}, -1) //nolint:gosec // a descriptor
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		}
	}
}

// takeSome takes in some of the events that wait, and reports whether there were
// no more. Others get a turn in between.
func (t *Tracker) takeSome() (empty bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for range 256 {
		if empty, err = t.takeOne(); empty || err != nil {
			break
		}
	}
	if empty {
		t.repair()
	}
	return empty, err
}

// takeAll takes in all events that wait.
func (t *Tracker) takeAll() error {
	if t.events == nil {
		return nil
	}
	for {
		if empty, err := t.takeOne(); err != nil {
			return fmt.Errorf("read conntrack events: %w", err)
		} else if empty {
			return nil
		}
	}
}

// takeOne takes in one event, and reports whether there is none.
func (t *Tracker) takeOne() (empty bool, err error) {
	n, err := t.events.read(t.buffer[:])
	switch {
	case errors.Is(err, unix.EAGAIN):
		return true, nil
	case errors.Is(err, unix.ENOBUFS):
		// The next read has what came before the buffer was full.
		t.overrun()
		return false, nil
	case err != nil:
		return false, err
	}
	for m, rest, ok := split(t.buffer[:n]); ok; m, rest, ok = split(rest) {
		t.take(m)
	}
	return false, nil
}

// take takes in one event.
func (t *Tracker) take(m message) {
	r, ok := decode(m.data)
	if !ok || !t.redirected(&r) {
		return
	}
	switch m.kind {
	case subsystem | messageNew:
		t.book.began(&r, time.Now())
	case subsystem | messageDelete:
		t.book.ended(&r, time.Now())
	}
}

// redirected reports whether a connection came in on the cluster side, was
// redirected, and leaves with the reserved address.
func (t *Tracker) redirected(r *record) bool {
	return r.mark&t.mark == t.mark && r.status&statusDNAT != 0 && r.reserved.addr == t.source
}

func (t *Tracker) overrun() {
	if t.overruns == 0 {
		t.log.Warn("conntrack event overrun, counters incomplete",
			"hint", "give the container more CPU, or, if it is not privileged, raise net.core.rmem_max on the node")
	}
	t.overruns++
	t.lost = true
}

// repairPause is the least time between two searches for connections whose end
// was lost. One takes about as long as a listing, 10 ms and more.
const repairPause = 10 * time.Second

// repair forgets the connections whose end was lost, which the audit log keeps
// the begin of. Counters do so whenever they are read.
func (t *Tracker) repair() {
	if !t.lost || t.book.audit == nil || time.Since(t.repaired) < repairPause {
		return
	}
	t.lost, t.repaired = false, time.Now()
	for range 2 { // one listing may lack an entry
		if err := t.look(); err != nil {
			t.log.Warn("conntrack listing failed", "error", err)
			return
		}
	}
}

// look takes in a listing of the open connections, before it all that was told
// of them, and after it the end of those that have timed out: the kernel leaves
// them out and ends them then (ctnetlink_dump_table in
// net/netfilter/nf_conntrack_netlink.c).
func (t *Tracker) look() error {
	if err := t.takeAll(); err != nil {
		return err
	}
	t.book.look(time.Now())
	// The kernel picks by the mark; most of a node's entries never get here.
	filter := [][2]uint32{{ctaMark, t.mark}, {ctaMarkMask, t.mark}}
	err := t.table.ask(messageGet, unix.NLM_F_DUMP, filter, func(m message) {
		if r, ok := decode(m.data); ok && t.redirected(&r) {
			t.book.listed(&r)
		}
	})
	if err != nil {
		return &KernelError{"list conntrack entries", err}
	}
	t.book.looked(time.Now())
	return t.takeAll()
}

// Replace counts for another list of destinations from now on; it is for when
// the rules for that are in. Counters of those that both have go on, those of
// others are dropped, new ones begin at 0.
func (t *Tracker) Replace(set rules.Set) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var err error
	if t.book.count {
		// What the old destinations' connections had is theirs.
		err = t.look()
	}
	t.book.replace(set)
	return err
}

// Counts returns the counters as they are now.
func (t *Tracker) Counts() (Report, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.look(); err != nil {
		return Report{}, err
	}
	r := t.book.report()
	r.Accounted, r.Overruns = t.accounted, t.overruns
	return r, nil
}

// Fill returns how many connections the kernel tracks in the namespace, whosever
// they are, and how many it can. More are refused.
func (t *Tracker) Fill() (entries, limit int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	err = t.table.ask(messageStats, unix.NLM_F_ACK, nil, func(m message) {
		if len(m.data) < genericLength {
			return
		}
		for kind, data, rest, more := attribute(m.data[genericLength:]); more; kind, data, rest, more = attribute(rest) {
			switch kind {
			case ctaStatsEntries:
				entries = int(number(data)) //nolint:gosec // of 32 bits
			case ctaStatsMaxEntries:
				limit = int(number(data)) //nolint:gosec // of 32 bits
			}
		}
	})
	if err != nil {
		return 0, 0, &KernelError{"get conntrack statistics", err}
	}
	return entries, limit, nil
}
