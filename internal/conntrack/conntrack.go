// Package conntrack counts redirected connections and their traffic, lists the
// open ones, and reports their begin and end, from the kernel's connection table.
//
// The kernel counts; nothing here is in the path of packets. Both rule backends
// create the same entries in the table, and loading rules does not change their
// counters.
//
// A Tracker uses two sources: the events of ended connections, with their totals,
// and, when counters are read, a dump of the open ones.
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

// Traffic counts IP packets and their bytes, including IP headers. Out is toward
// the server. Segments joined by the network card or driver (GRO) are one packet.
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

// less reports whether t cannot be a later count of the same connection as other.
func (t Traffic) less(other Traffic) bool {
	return t.PacketsOut < other.PacketsOut || t.BytesOut < other.BytesOut || t.PacketsIn < other.PacketsIn || t.BytesIn < other.BytesIn
}

// Counts are the counters of the connections to one destination.
type Counts struct {
	Connections uint64 // number since the Tracker has had the destination
	Traffic            // traffic since then, including older connections
	// Open is the number of open connections. A closed TCP connection does not
	// count, although it stays in the table for a while.
	Open int
	// Of these connections, those over TCP and SCTP that the server refused, or did not
	// answer, which includes an ICMP error. They count when their entry is deleted: an
	// unanswered one nf_conntrack_tcp_timeout_syn_sent, 2 minutes, after the last SYN.
	Refused, Unanswered uint64
	LastRefused         time.Time // the zero Time: none was refused
}

// A Line is a redirect with its counters. The fallback has only the address of its server;
// another one that keeps the port of its connections has it as its remote port.
type Line struct {
	rules.Redirect
	Counts
}

// Ports is the number of ports of a reserved address that connections to one
// server use. A closed connection keeps its port until its entry is deleted, two
// minutes later for TCP (nf_conntrack_tcp_timeout_time_wait).
type Ports struct {
	Protocol rules.Protocol
	Server   netip.AddrPort
	Reserved netip.Addr
	InUse    int
}

// PortLimit is the largest number of connections from a reserved address to one
// port of one server: the number of ports in the kernel's range for a connection
// whose own source port is taken (nf_nat_l4proto_unique_tuple in
// net/netfilter/nf_nat_core.c). For source ports below 1024 there is another range
// below.
const PortLimit = 65535 - 1024 + 1

// A Report is a snapshot of all counters.
type Report struct {
	Lines []Line  // in the order of the list, the fallback last
	Ports []Ports // sorted by protocol, server and reserved address, without unused ones
	// Accounted is set if the kernel counts packets and bytes.
	Accounted bool
	// Overruns is the number of times that events arrived faster than they were
	// read, so that some were lost and Lines lack their connections.
	Overruns uint64
}

// An Event is the begin or the end of a redirected connection.
type Event struct {
	Began    bool // false: it ended
	Protocol rules.Protocol
	Client   netip.AddrPort
	Port     rules.Port     // local port, on the pod
	Local    netip.AddrPort // destination of the client's packets: the pod, and Port
	Server   netip.AddrPort // destination of the redirect
	Reserved netip.AddrPort // source that the server sees
	// For an ended connection:
	Traffic
	Accounted bool    // Traffic is valid
	Outcome   Outcome // empty: unknown
	Timed     bool    // Duration is valid: its begin was seen
	// Duration is the time until the last FIN or RST, or until the last packet. It is
	// accurate to some milliseconds for the outcomes closed, reset and refused. For the
	// others it is the time of the entry without its timeout: accurate to some
	// milliseconds with nf_conntrack_timestamp, otherwise up to a minute too long, and
	// accurate to a second for the outcome removed. The kernel shortens the timeout of
	// an established TCP connection with unacknowledged data; if it is older than that
	// of others, this cannot be seen, and Duration is too short by the difference.
	Duration time.Duration
	Lost     bool // there was no event of its end; Traffic is the last known
}

// Options configure a Tracker.
type Options struct {
	Sources []netip.Addr // the reserved addresses
	Mark    rules.Mark   // mark of connections from the cluster side
	Set     rules.Set    // the destinations
	Count   bool         // keep counters
	// Audit is called for each begin and end of a redirected connection, one at
	// a time. It must not call the Tracker. May be nil.
	Audit func(Event)
	// Passive leaves the kernel's settings as they are.
	Passive bool
	Log     *slog.Logger
}

// A Tracker tracks the connections of one network namespace. Its methods may be
// called from several goroutines.
type Tracker struct {
	source map[[16]byte]bool // the reserved addresses
	mark   uint32
	log    *slog.Logger
	table  *socket // for requests and dumps
	events *socket // nil: none needed

	accounted bool

	mu       sync.Mutex // guards all fields below, and reads from the sockets
	book     *book
	buffer   [8 << 10]byte // an event has less than 1 KiB
	overruns uint64
	repaired time.Time // time of the last search for connections whose end was lost
	lost     bool      // events were lost since then
}

// Open begins to track the network namespace of the calling thread. It enables the
// kernel's counting of packets and bytes (nf_conntrack_acct), and for the audit log its
// times of connections (nf_conntrack_timestamp), unless it is passive.
func Open(o Options) (*Tracker, error) {
	sources := make(map[[16]byte]bool)
	for _, a := range o.Sources {
		sources[a.As16()] = true
	}
	t := &Tracker{source: sources, mark: uint32(o.Mark), log: o.Log, book: newBook(o.Set, o.Count, o.Audit, time.Now())}
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
		groups = append(groups, unix.NFNLGRP_CONNTRACK_NEW, unix.NFNLGRP_CONNTRACK_UPDATE)
	}
	if len(groups) == 0 {
		return nil
	}
	var err error
	if t.events, err = openSocket(groups...); err != nil {
		return &KernelError{"subscribe to conntrack events", err}
	}
	// Without its module the kernel subscribes, and sends nothing (nfnetlink_bind in
	// net/netfilter/nfnetlink.c).
	if _, _, err := t.Fill(); err != nil {
		return err
	}
	if o.Passive {
		return nil
	}
	// The subscription has loaded the module, so its sysctls exist.
	t.accounted = startAccounting(t.log)
	if o.Audit != nil {
		startTimestamps(t.log)
	}
	checkEvents(t.log)
	if o.Count {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.dump() // existing connections
	}
	return nil
}

// Close closes the sockets, after Run has returned.
func (t *Tracker) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range []*socket{t.table, t.events} {
		if s != nil {
			s.close()
		}
	}
}

// The pauses after a read of events. Under load many events arrive during a pause,
// which saves the cost of a wake-up for each; the buffer has room for a far longer
// pause. Counters stay exact, since reading them reads all events first; times in
// the audit log become less exact.
const (
	countPause = 10 * time.Millisecond
	auditPause = time.Millisecond
)

// Run processes events until ctx ends. Between events it sleeps in the kernel.
func (t *Tracker) Run(ctx context.Context) error {
	if t.events == nil {
		<-ctx.Done()
		return nil
	}
	// Ends the wait.
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
			<-ended // until then the callback uses the descriptor
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

// wait returns when there is an event, or a value in wake.
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

// takeSome processes some pending events, and reports whether there are no more.
// Other callers get the lock between two calls.
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

// takeAll processes all pending events.
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

// takeOne processes one event, and reports whether there was none.
func (t *Tracker) takeOne() (empty bool, err error) {
	n, err := t.events.read(t.buffer[:])
	switch {
	case errors.Is(err, unix.EAGAIN):
		return true, nil
	case errors.Is(err, unix.ENOBUFS):
		// The next read returns the events before the overrun.
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

// take processes one event.
func (t *Tracker) take(m message) {
	r, ok := decode(m.data)
	if !ok || !t.redirected(&r) {
		return
	}
	switch m.kind {
	case subsystem | messageNew:
		if m.flags&unix.NLM_F_CREATE != 0 {
			t.book.began(&r, time.Now())
		} else {
			t.book.changed(&r, time.Now())
		}
	case subsystem | messageDelete:
		t.book.ended(&r, time.Now())
	}
}

// redirected reports whether a connection came from the cluster side, was
// redirected, and has the reserved address as its source.
func (t *Tracker) redirected(r *record) bool {
	return r.mark&t.mark == t.mark && r.status&statusDNAT != 0 && t.source[r.reserved.addr]
}

func (t *Tracker) overrun() {
	if t.overruns == 0 {
		t.log.Warn("conntrack event overrun, counters incomplete",
			"hint", "give the container more CPU, or, if it is not privileged, raise net.core.rmem_max on the node")
	}
	t.overruns++
	t.lost = true
}

// repairPause is the least time between two searches for connections whose end was
// lost. A search takes about as long as a dump, 10 ms and more.
const repairPause = 10 * time.Second

// repair ends the connections whose end event was lost, for the audit log, which
// has reported their begin. Reading counters does the same.
func (t *Tracker) repair() {
	if !t.lost || t.book.audit == nil || time.Since(t.repaired) < repairPause {
		return
	}
	t.lost, t.repaired = false, time.Now()
	for range 2 { // a single dump may lack an entry
		if err := t.dump(); err != nil {
			t.log.Warn("conntrack listing failed", "error", err)
			return
		}
	}
}

// dump processes a dump of the open connections. It processes all pending events
// before, and the end events of expired connections after it: the kernel leaves
// these out of the dump and ends them during it (ctnetlink_dump_table in
// net/netfilter/nf_conntrack_netlink.c).
func (t *Tracker) dump() error {
	if err := t.takeAll(); err != nil {
		return err
	}
	t.book.beginDump(time.Now())
	// The kernel filters by mark, which excludes most of a node's entries.
	filter := [][2]uint32{{ctaMark, t.mark}, {ctaMarkMask, t.mark}}
	err := t.table.ask(messageGet, unix.NLM_F_DUMP, filter, func(m message) {
		if r, ok := decode(m.data); ok && t.redirected(&r) {
			t.book.listed(&r)
		}
	})
	if err != nil {
		return &KernelError{"list conntrack entries", err}
	}
	t.book.endDump(time.Now())
	return t.takeAll()
}

// Replace sets new destinations; call it after their rules are loaded. Counters of
// destinations in both lists continue, others are dropped, and new ones begin at 0.
func (t *Tracker) Replace(set rules.Set) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var err error
	if t.book.count {
		// Traffic up to now belongs to the old destinations.
		err = t.dump()
	}
	t.book.replace(set)
	return err
}

// Counts returns the counters as they are now.
func (t *Tracker) Counts() (Report, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.dump(); err != nil {
		return Report{}, err
	}
	r := t.book.report()
	r.Accounted, r.Overruns = t.accounted, t.overruns
	return r, nil
}

// Fill returns the number of connections that the kernel tracks in the namespace,
// including those of other programs, and its limit. It rejects more connections.
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
				entries = int(number(data)) //nolint:gosec // a number of 32 bits
			case ctaStatsMaxEntries:
				limit = int(number(data)) //nolint:gosec // a number of 32 bits
			}
		}
	})
	if err != nil {
		return 0, 0, &KernelError{"get conntrack statistics", err}
	}
	return entries, limit, nil
}
