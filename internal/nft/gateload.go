package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Load loads the gate, shut. It changes nothing if the kernel has it already, not even the
// permit. A damaged gate is replaced by a shut one; a new chain drops from the moment when the
// kernel knows it, even before the transaction ends.
func (g Gate) Load() error {
	found, err := g.Differs()
	if err != nil || len(found) == 0 {
		return err
	}
	tables, err := gateTables()
	if err != nil {
		return err
	}
	var b batch
	for _, t := range tables {
		b.deleteTable(t)
	}
	t := g.table()
	b.addTable(t)
	for i, set := range gateSets {
		b.addGateSet(t, set, uint32(i+1)) //nolint:gosec // a small number
	}
	chains := g.chains()
	for _, c := range chains {
		b.addChainOf(t, nftables.ChainTypeFilter, c)
	}
	for _, c := range chains {
		for _, r := range c.rules {
			b.addRule(t, c.name, r)
		}
	}
	if err := b.run(); err != nil {
		return fmt.Errorf("load gate: %w", err)
	}
	return nil
}

// gateFamilies are the families in which the gate may be.
var gateFamilies = []nftables.TableFamily{nftables.TableFamilyNetdev, nftables.TableFamilyINet}

// Shut drops everything from now on, in one transaction.
func (g Gate) Shut() error {
	return g.change("shut gate", permitSet, openSet, claimSet, armSet, ticketSet)
}

// Claim lets announcements and pings leave for a time.
func (g Gate) Claim(d time.Duration) error {
	return g.change("claim", claimSet, live{set: claimSet, left: d})
}

// Arm lets the answer to a ping that leaves from now on open the gate, for a time. The gate is
// shut until then.
func (g Gate) Arm(d time.Duration) error {
	steps := []any{ticketSet, permitSet, armSet, live{set: armSet, left: d}, live{set: openSet}}
	if g.Steers != "" {
		steps = append(steps, live{set: openSet, key: anyInterface})
	}
	return g.change("arm gate", steps...)
}

// Number makes the answer to a ping with a number count, if the kernel has no egress hook, by which
// it does that itself as the ping leaves. It is called before the ping is sent.
func (g Gate) Number(n uint32) error {
	if !g.WithoutEgress {
		return nil
	}
	return g.change("add ticket", live{ticketSet, binary.BigEndian.AppendUint32(nil, n), g.Ticket})
}

// A live is an element of a set, with its lifetime.
type live struct {
	set  string
	key  []byte        // nil: the interface
	left time.Duration // zero: it stays
}

// change flushes sets, by their names, and adds elements, in one transaction.
func (g Gate) change(what string, steps ...any) error {
	var b batch
	t := g.table()
	for _, s := range steps {
		switch s := s.(type) {
		case string:
			b.add(unix.NFT_MSG_DELSETELEM, 0, t.Family, func(e *netlink.AttributeEncoder) {
				e.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
				e.String(unix.NFTA_SET_ELEM_LIST_SET, s)
			})
		case live:
			if s.set != openSet && s.left < tick { // no tick: for ever
				return fmt.Errorf("%s: expected at least %v, found %v", what, tick, s.left)
			}
			if s.key == nil {
				key, err := g.key()
				if err != nil {
					return fmt.Errorf("%s: %w", what, err)
				}
				s.key = key
			}
			b.addElement(t, s)
		}
	}
	run := b.run
	if g.socket != nil {
		run = func() error { return g.socket.use(b.runOn) }
	}
	if err := run(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// Open returns the gate with a socket that stays open until Close, for changes of its elements
// and for Left: as it closes one, the kernel waits until all packets have left that may use what a
// transaction has deleted, some 15 ms (nft_rcv_nl_event in net/netfilter/nf_tables_api.c). Changes
// of other programs wait as long.
func (g Gate) Open() Gate {
	g.socket = new(lasting)
	return g
}

// Close closes that socket.
func (g Gate) Close() {
	if g.socket != nil {
		g.socket.close()
	}
}

// A lasting is a socket for several requests.
type lasting struct {
	mu   sync.Mutex
	conn *netlink.Conn // nil: none is open
}

// use calls fn with the socket. After an error, which may leave other answers unread, the next
// call gets another one.
func (l *lasting) use(fn func(*netlink.Conn) error) (err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		if l.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
			return fmt.Errorf("open nfnetlink socket: %w", err)
		}
	}
	if err = fn(l.conn); err != nil {
		l.end()
	}
	return err
}

func (l *lasting) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end()
}

// end closes the socket. The caller holds the lock.
func (l *lasting) end() {
	if l.conn != nil {
		_ = l.conn.Close()
		l.conn = nil
	}
}

// key returns the key of the interface, its index in the order of the machine.
func (g Gate) key() ([]byte, error) {
	if g.Index > 0 {
		return binary.NativeEndian.AppendUint32(nil, uint32(g.Index)), nil //nolint:gosec // positive
	}
	found, err := net.InterfaceByName(g.Interface)
	if err != nil {
		return nil, fmt.Errorf("find %q: %w", g.Interface, err)
	}
	return binary.NativeEndian.AppendUint32(nil, uint32(found.Index)), nil //nolint:gosec // positive
}

// addElement adds an element of one of the gate's sets.
func (b *batch) addElement(t *nftables.Table, l live) {
	b.add(unix.NFT_MSG_NEWSETELEM, netlink.Create, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
		e.String(unix.NFTA_SET_ELEM_LIST_SET, l.set)
		e.Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(e *netlink.AttributeEncoder) error {
			e.Nested(unix.NFTA_LIST_ELEM, func(e *netlink.AttributeEncoder) error {
				e.Nested(unix.NFTA_SET_ELEM_KEY, func(e *netlink.AttributeEncoder) error {
					e.Bytes(unix.NFTA_DATA_VALUE, l.key)
					return nil
				})
				if l.left != 0 {
					e.Uint64(unix.NFTA_SET_ELEM_TIMEOUT, uint64(l.left.Milliseconds())) //nolint:gosec // positive
				}
				return nil
			})
			return nil
		})
	})
}

// Left returns how long packets may leave without another answer; zero: the gate is shut.
func (g Gate) Left() (time.Duration, error) {
	key, err := g.key()
	if err != nil {
		return 0, err
	}
	var left time.Duration
	for _, set := range []string{openSet, permitSet} {
		found, err := g.elements(set)
		if err != nil {
			return 0, fmt.Errorf("read set %s of gate: %w", set, err)
		}
		at := slices.IndexFunc(found, func(l live) bool { return slices.Equal(l.key, key) })
		if at < 0 {
			return 0, nil
		}
		left = found[at].left
	}
	return left, nil
}

// elements returns the live elements of a set.
func (g Gate) elements(set string) (found []live, err error) {
	parse := func(b []byte) (live, error) { return parseLive(set, b) }
	compare := func(a, b live) int { return slices.Compare(a.key, b.key) }
	if g.socket == nil {
		return readElements(g.table(), set, parse, compare)
	}
	err = g.socket.use(func(conn *netlink.Conn) error {
		// Others wait for the socket: no pause before another try.
		for try := 1; ; try++ {
			found, err = listElements(conn, g.table(), set, parse, compare)
			if !errors.Is(err, errInterrupted) || try == tries {
				return err
			}
		}
	})
	return found, err
}

// parseLive reads an element of a set.
func parseLive(set string, b []byte) (l live, err error) {
	l.set = set
	err = attributes(b, func(kind uint16, data []byte) error {
		switch kind {
		case unix.NFTA_SET_ELEM_EXPIRATION:
			if len(data) == 8 {
				l.left = time.Duration(min(binary.BigEndian.Uint64(data), math.MaxInt32)) * time.Millisecond //nolint:gosec // limited
			}
		case unix.NFTA_SET_ELEM_KEY:
			return attributes(data, func(_ uint16, value []byte) error {
				l.key = slices.Clone(value)
				return nil
			})
		}
		return nil
	})
	return l, err
}

// A gateSet is a set of the gate, as the kernel has it.
type gateSet struct {
	name                             string
	flags, keyType, keyLength, limit uint32
}

// setOf returns the set with a name that the kernel shall have.
func setOf(name string) gateSet {
	s := gateSet{name, unix.NFT_SET_TIMEOUT | unix.NFT_SET_EVAL, nftables.TypeIFIndex.GetNFTMagic(), nftables.TypeIFIndex.Bytes, most}
	switch name {
	case ticketSet:
		s.keyType = nftables.TypeMark.GetNFTMagic()
	case openSet:
		s.flags, s.limit = 0, 0
	}
	return s
}

// hostOrder is the user data by which nft(8) prints keys that are numbers in the order of the machine
// (libnftnl/udata.h, NFTNL_UDATA_SET_KEYBYTEORDER, of four bytes, which are 1).
var hostOrder = append([]byte{0, 4}, binary.NativeEndian.AppendUint32(nil, 1)...)

// addGateSet adds a set of the gate, without elements.
func (b *batch) addGateSet(t *nftables.Table, name string, id uint32) {
	s := setOf(name)
	b.add(unix.NFT_MSG_NEWSET, netlink.Create, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_SET_TABLE, t.Name)
		e.String(unix.NFTA_SET_NAME, name)
		e.Uint32(unix.NFTA_SET_ID, id)
		e.Uint32(unix.NFTA_SET_FLAGS, s.flags)
		e.Uint32(unix.NFTA_SET_KEY_TYPE, s.keyType)
		e.Uint32(unix.NFTA_SET_KEY_LEN, s.keyLength)
		if s.keyType == nftables.TypeIFIndex.GetNFTMagic() {
			e.Bytes(unix.NFTA_SET_USERDATA, hostOrder)
		}
		if s.limit != 0 {
			e.Nested(unix.NFTA_SET_DESC, func(e *netlink.AttributeEncoder) error {
				e.Uint32(unix.NFTA_SET_DESC_SIZE, s.limit)
				return nil
			})
		}
	})
}

// list calls fn for each object of our tables of a family with a given name, with its attributes.
// The number of the attribute with the name of the table is 1 in all of them.
func list(kind int, t *nftables.Table, fn func(attribute uint16, data []byte) error, next func() error) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer conn.Close()
	var b batch
	b.append(kind, netlink.Dump, t.Family, nil)
	if _, err := conn.Send(b.messages[0]); err != nil {
		return reason(err)
	}
	return receive(conn, func(m syscall.NetlinkMessage) error {
		content, ours := m.Data[len(header(0, 0)):], false
		if err := attributes(content, func(a uint16, data []byte) error {
			ours = ours || a == unix.NFTA_TABLE_NAME && textOf(data) == t.Name
			return nil
		}); err != nil || !ours {
			return err
		}
		if err := attributes(content, fn); err != nil {
			return err
		}
		return next()
	})
}

func textOf(data []byte) string { return strings.TrimRight(string(data), "\x00") }

func numberOf(data []byte) uint32 {
	if len(data) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(data)
}

// hasTable reports whether a table exists, and its flags are none.
func hasTable(t *nftables.Table) (there bool, err error) {
	err = list(unix.NFT_MSG_GETTABLE, t, func(uint16, []byte) error { return nil }, func() error { there = true; return nil })
	if missing(err) {
		return false, nil
	}
	return there, err
}

// isDormant reports whether a table is disabled.
func isDormant(t *nftables.Table) (dormant bool, err error) {
	err = list(unix.NFT_MSG_GETTABLE, t, func(a uint16, data []byte) error {
		dormant = dormant || a == unix.NFTA_TABLE_FLAGS && numberOf(data) != 0
		return nil
	}, func() error { return nil })
	return dormant, err
}

// listSets returns the sets of the gate.
func (g Gate) listSets() (found []gateSet, err error) {
	var s gateSet
	err = list(unix.NFT_MSG_GETSET, g.table(), func(a uint16, data []byte) error {
		switch a {
		case unix.NFTA_SET_NAME:
			s.name = textOf(data)
		case unix.NFTA_SET_FLAGS:
			s.flags = numberOf(data)
		case unix.NFTA_SET_KEY_TYPE:
			s.keyType = numberOf(data)
		case unix.NFTA_SET_KEY_LEN:
			s.keyLength = numberOf(data)
		case unix.NFTA_SET_DESC:
			return attributes(data, func(a uint16, data []byte) error {
				if a == unix.NFTA_SET_DESC_SIZE {
					s.limit = numberOf(data)
				}
				return nil
			})
		}
		return nil
	}, func() error {
		found, s = append(found, s), gateSet{}
		return nil
	})
	return found, err
}

// listChains returns the chains of a table, without their rules.
func listChains(t *nftables.Table) (found []gateChain, err error) {
	var c gateChain
	err = list(unix.NFT_MSG_GETCHAIN, t, func(a uint16, data []byte) error {
		switch a {
		case unix.NFTA_CHAIN_NAME:
			c.name = textOf(data)
		case unix.NFTA_CHAIN_POLICY:
			c.drops = numberOf(data) == uint32(nftables.ChainPolicyDrop)
		case unix.NFTA_CHAIN_HOOK:
			c.based = true
			return attributes(data, func(a uint16, data []byte) error {
				switch a {
				case unix.NFTA_HOOK_HOOKNUM:
					c.hook = numberOf(data)
				case unix.NFTA_HOOK_PRIORITY:
					c.at = int32(numberOf(data)) //nolint:gosec // the kernel writes two's complement
				case unix.NFTA_HOOK_DEV: // only if there is one
					c.device = textOf(data)
				}
				return nil
			})
		}
		return nil
	}, func() error {
		found, c = append(found, c), gateChain{}
		return nil
	})
	return found, err
}

// Differs returns the differences of the kernel from the gate, one line each. Elements of sets do
// not count.
func (g Gate) Differs() (found []string, err error) {
	if err := g.Validate(); err != nil {
		return nil, err
	}
	there, err := hasTable(g.table())
	if err != nil {
		return nil, fmt.Errorf("read gate: %w", err)
	}
	if !there {
		return []string{"gate: missing"}, nil
	}
	found, err = g.differences()
	if err != nil {
		return nil, fmt.Errorf("read gate: %w", err)
	}
	return found, nil
}

func (g Gate) differences() (found []string, err error) {
	say := func(format string, args ...any) { found = append(found, "gate: "+fmt.Sprintf(format, args...)) }
	sets, err := g.listSets()
	if err != nil {
		return nil, err
	}
	for _, name := range gateSets {
		if !slices.Contains(sets, setOf(name)) {
			say("set %s missing or of another kind", name)
		}
	}
	if len(sets) > len(gateSets) {
		say("sets not in the plan")
	}
	return found, differences(g.table(), g.chains(), say)
}

// differences calls say for each difference of a table's chains from the wanted ones.
func differences(t *nftables.Table, want []gateChain, say func(format string, args ...any)) error {
	dormant, err := isDormant(t)
	if err != nil {
		return err
	}
	if dormant {
		say("unexpected flags")
	}
	chains, err := listChains(t)
	if err != nil {
		return err
	}
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	for _, c := range want {
		at := slices.IndexFunc(chains, func(other gateChain) bool { return other.name == c.name })
		if at < 0 {
			say("chain %s is missing", c.name)
			continue
		}
		listed, err := conn.GetRules(t, &nftables.Chain{Name: c.name})
		if err != nil {
			return fmt.Errorf("list rules of chain %s: %w", c.name, err)
		}
		for _, r := range listed {
			takeCount(r.Exprs)
			chains[at].rules = append(chains[at].rules, r.Exprs)
		}
		if !slices.EqualFunc(chains[at].rules, c.rules, sameTimed) {
			say("chain %s has other rules", c.name)
		}
		if chains[at].rules = c.rules; !reflect.DeepEqual(chains[at], c) {
			say("chain %s has another interface, hook, priority or policy", c.name)
		}
	}
	if len(chains) > len(want) {
		say("chains not in the plan")
	}
	return nil
}

// sameTimed reports whether a rule of the kernel is the planned one.
func sameTimed(have, want []expr.Any) bool {
	return slices.EqualFunc(have, want, func(have, want expr.Any) bool {
		a, is := have.(*expr.Dynset)
		if b, also := want.(*expr.Dynset); is && also && a.Timeout <= b.Timeout && a.Timeout > b.Timeout-tick {
			same := *a
			same.Timeout = b.Timeout
			have = &same
		}
		return reflect.DeepEqual(have, want)
	})
}

// Dropped returns the number of packets that the gate has dropped.
func (g Gate) Dropped() (uint64, error) {
	if g.WithoutEgress {
		return g.count(leaveChain)
	}
	return g.count(egressChain)
}

// count returns the sum of the counters of a chain.
func (g Gate) count(chain string) (packets uint64, err error) {
	conn, err := nftables.New()
	if err != nil {
		return 0, fmt.Errorf("open nfnetlink socket: %w", err)
	}
	listed, err := conn.GetRules(g.table(), &nftables.Chain{Name: chain})
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("list rules of gate: %w", err)
	}
	for _, r := range listed {
		packets += takeCount(r.Exprs)
	}
	return packets, nil
}

// hasEgressHook remembers that the kernel has or lacks the hook: it keeps it as long as it runs.
var hasEgressHook atomic.Pointer[bool]

// HasEgressHook reports whether the kernel has the egress hook of netdev (Linux 5.16,
// CONFIG_NETFILTER_EGRESS). To find out it adds a chain to the loopback interface and deletes it,
// in one transaction.
func HasEgressHook() (bool, error) {
	if known := hasEgressHook.Load(); known != nil {
		return *known, nil
	}
	probe := &nftables.Table{Name: GateTable + "-probe", Family: nftables.TableFamilyNetdev}
	var b batch
	b.addTable(probe)
	b.addChainOf(probe, nftables.ChainTypeFilter, gateChain{name: egressChain, based: true, hook: netdevEgress, device: "lo"})
	b.deleteTable(probe)
	err := b.run()
	has := err == nil
	if err != nil && !missing(err) {
		return false, fmt.Errorf("probe the egress hook of nftables: %w", err)
	}
	hasEgressHook.Store(&has)
	return has, nil
}

// GateLoaded reports whether the kernel has a gate's table, in either form.
func GateLoaded() (bool, error) {
	tables, err := gateTables()
	return len(tables) > 0, err
}

// gateTables returns the tables of gates.
func gateTables() (found []*nftables.Table, err error) {
	for _, f := range gateFamilies {
		t := &nftables.Table{Name: GateTable, Family: f}
		there, err := hasTable(t)
		if err != nil {
			return nil, fmt.Errorf("read gate: %w", err)
		}
		if there {
			found = append(found, t)
		}
	}
	return found, nil
}

// RemoveGate removes the gate of any interface.
func RemoveGate() (removed bool, err error) {
	tables, err := gateTables()
	if err != nil {
		return false, err
	}
	var b batch
	for _, t := range tables {
		b.deleteTable(t)
	}
	if err := b.run(); err != nil {
		return false, fmt.Errorf("remove gate: %w", err)
	}
	return len(tables) > 0, nil
}
