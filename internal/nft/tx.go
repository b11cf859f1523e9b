package nft

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// keyType returns the type of a map's keys. The kernel pads each part of a concatenation to
// four bytes. A random number is a number in the order of the machine, as a mark is.
func (k mapKind) keyType() nftables.SetDatatype {
	types := keyTypes[k.ranges]
	return types[min(k.oneOf, 1)]
}

// keyTypes are the types of keys of maps, without and with a random number; of ranges: see
// mapKind.swap.
var keyTypes = func() map[bool][2]nftables.SetDatatype {
	protocol, port, number := nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeMark
	return map[bool][2]nftables.SetDatatype{
		false: {nftables.MustConcatSetType(protocol, port), nftables.MustConcatSetType(protocol, port, number)},
		true:  {nftables.MustConcatSetType(port, protocol), nftables.MustConcatSetType(port, protocol, number)},
	}
}()

// valueType returns the type of a map's values.
func (k mapKind) valueType(f nftables.TableFamily) nftables.SetDatatype {
	address := nftables.TypeIPAddr
	if f == nftables.TableFamilyIPv6 {
		address = nftables.TypeIP6Addr
	}
	if k.ports == 0 {
		return address
	}
	ports := slices.Repeat([]nftables.SetDatatype{nftables.TypeInetService}, k.ports)
	return nftables.MustConcatSetType(append([]nftables.SetDatatype{address}, ports...)...)
}

// valueLen returns the length of a map's values in bytes.
func (k mapKind) valueLen(f nftables.TableFamily) int { return int(k.valueType(f).Bytes) }

// tableOf returns one of our tables as the library identifies it.
func tableOf(key tableKey) *nftables.Table {
	return &nftables.Table{Name: key.name, Family: formats[key.family].number}
}

// tries is the number of tries of a change, after concurrent changes of the
// kernel's rules by other programs.
const tries = 5

// read reads the tables and their generation ID.
func (tx *Tx) read() error {
	for try := 1; ; try++ {
		before, err := generation()
		if err != nil {
			if missing(err) {
				return &KernelError{err}
			}
			return fmt.Errorf("get nftables generation ID: %w", err)
		}
		now, err := readTables(tx.keys())
		after, genErr := generation()
		if genErr == nil && after != before && try < tries {
			continue // the rules changed between two of the dumps
		}
		if err := errors.Join(err, genErr); err != nil {
			return err
		}
		tx.now, tx.generation = now, before
		return nil
	}
}

// readTables lists our tables.
func readTables(keys []tableKey) (state, error) {
	// One socket for all, since the kernel takes long to close one.
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	s := make(state)
	for _, key := range keys {
		found, err := readTable(conn, tableOf(key), key.family)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", key, err)
		}
		if found != nil {
			s[key] = found
		}
	}
	return s, nil
}

// readTable returns the content of table t, nil if it does not exist.
func readTable(conn *nftables.Conn, t *nftables.Table, f rules.Family) (*table, error) {
	tables, err := conn.ListTablesOfFamily(formats[f].number)
	if err != nil {
		if missing(err) {
			return nil, &KernelError{err}
		}
		return nil, err
	}
	i := slices.IndexFunc(tables, func(other *nftables.Table) bool { return other.Name == t.Name })
	if i < 0 {
		return nil, nil
	}
	found := &table{flags: tables[i].Flags, chains: make(map[string]*chain), to: make(map[string]destinations)}
	if t.Name == limitsName {
		found.limits = new(limits)
	}
	if err := readChains(conn, t, f, found); err != nil {
		return nil, err
	}
	if found.helpers, found.others, err = readHelpers(t); err != nil {
		return nil, fmt.Errorf("list objects: %w", err)
	}
	sets, err := conn.GetSets(t)
	if err != nil {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	mapped := false // there is a map of limits
	for _, s := range sets {
		at := slices.IndexFunc(mapKinds, func(k mapKind) bool { return k.sameSet(s, t.Family) })
		switch {
		case at >= 0:
			found.to[s.Name], err = mapKinds[at].read(t)
		case found.limits != nil && isLimitsMap(s):
			found.limits.ports, err = readPorts(t)
			mapped = true
		default:
			found.others = append(found.others, "set "+s.Name)
		}
		if err != nil {
			return nil, fmt.Errorf("list elements of map %s: %w", s.Name, err)
		}
	}
	if !mapped {
		found.limits = nil
	}
	return found, nil
}

// sameSet reports whether a set of the kernel is a map of this kind.
func (k mapKind) sameSet(s *nftables.Set, f nftables.TableFamily) bool {
	return s.Name == k.name && s.IsMap && s.Interval == k.ranges && !s.Constant && s.Timeout == 0 &&
		s.KeyType.Name == k.keyType().Name && s.DataType.Name == k.valueType(f).Name
}

// readChains reads the chains of table t.
func readChains(conn *nftables.Conn, t *nftables.Table, f rules.Family, into *table) error {
	chains, err := conn.ListChainsOfTableFamily(formats[f].number)
	if err != nil {
		return fmt.Errorf("list chains: %w", err)
	}
	for _, c := range chains {
		if c.Table.Name != t.Name {
			continue
		}
		found := &chain{kind: c.Type, drops: c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop}
		if c.Hooknum != nil && c.Priority != nil {
			found.based, found.hook, found.priority = true, *c.Hooknum, *c.Priority
		}
		if key, is := lineKey(c.Name); is && into.limits != nil && !found.based {
			into.limits.lines = append(into.limits.lines, line{key: key}) // their rules are read at once
			continue
		}
		rules, err := conn.GetRules(t, c)
		if err != nil {
			return fmt.Errorf("list rules of chain %s: %w", c.Name, err)
		}
		for _, r := range rules {
			takeCount(r.Exprs)
			found.rules = append(found.rules, listed(r.Exprs))
		}
		into.chains[c.Name] = found
	}
	if into.limits != nil {
		return into.limits.readLines(t)
	}
	return nil
}

// become changes the tables to target in one transaction, and checks that the map
// has all elements.
func (tx *Tx) become(target state) error {
	for try := 1; ; try++ {
		if len(tx.differences(target)) == 0 {
			return nil
		}
		b := batch{generation: tx.generation}
		for _, key := range tx.keys() {
			b.change(tableOf(key), tx.now[key], target[key])
		}
		err := b.run()
		if err == nil {
			break
		}
		if !errors.Is(err, unix.ERESTART) || try == tries {
			return missingHelper(target, &LoadError{err})
		}
		if err := tx.read(); err != nil {
			return err
		}
	}
	var err error
	if tx.generation, err = generation(); err != nil {
		return err
	}
	tx.now = target
	for key, t := range target {
		for _, k := range mapKinds {
			want, there := t.to[k.name]
			if !there {
				continue
			}
			n, err := countElements(tableOf(key), k)
			if err == nil && n != len(want) {
				err = fmt.Errorf("expected %d elements, found %d", len(want), n)
			}
			if err != nil {
				// Undo starts from the kernel's state.
				return errors.Join(fmt.Errorf("check map %s: %w", k.name, err), tx.read())
			}
		}
	}
	return nil
}

// change adds the changes from have to want to the batch. Chains with other rules
// only keep their hooks, and unchanged elements of the map are not touched.
func (b *batch) change(t *nftables.Table, have, want *table) {
	if have != nil && (want == nil || !have.sameFrame(want)) {
		b.deleteTable(t)
		have = nil
	}
	if want == nil {
		return
	}
	if have == nil {
		t.Flags = want.flags
		b.addTable(t)
		for _, h := range want.helpers {
			b.addHelper(t, h)
		}
		have = &table{}
	}
	if want.limits != nil && have.limits == nil {
		have.limits = new(limits)
		b.addLimitsMap(t)
	}
	for _, k := range mapKinds {
		to, planned := want.to[k.name]
		if !planned {
			continue
		}
		if _, there := have.to[k.name]; !there {
			b.addMap(t, k)
		}
		gone, more := have.to[k.name].steps(to)
		b.changeElements(unix.NFT_MSG_DELSETELEM, 0, t, k, gone)
		b.changeElements(unix.NFT_MSG_NEWSETELEM, netlink.Create, t, k, more)
	}
	names := slices.Sorted(maps.Keys(want.chains))
	for _, name := range names { // before a jump to one
		if have.chains[name] == nil {
			b.addChain(t, name, want.chains[name])
		}
	}
	if want.limits != nil {
		b.changeLimits(t, have.limits, want.limits)
	}
	for _, name := range names {
		c, old := want.chains[name], have.chains[name]
		switch {
		case old == nil:
		case old.sameRules(c):
			continue
		default:
			b.deleteRules(t, name, 0)
		}
		for _, r := range c.rules {
			b.addRule(t, name, r)
		}
	}
	for _, k := range mapKinds { // that no rule looks up any more
		_, there := have.to[k.name]
		if _, planned := want.to[k.name]; there && !planned {
			b.deleteMap(t, k)
		}
	}
}

// sameFrame reports whether both tables have the same chains. It ignores their content, and
// the maps.
func (t *table) sameFrame(want *table) bool {
	if t.flags != want.flags || len(t.others) > 0 || !slices.Equal(t.helpers, want.helpers) || (t.limits == nil) != (want.limits == nil) || len(t.chains) != len(want.chains) {
		return false
	}
	for name, c := range want.chains {
		if t.chains[name] == nil || !t.chains[name].sameBase(c) {
			return false
		}
	}
	return true
}

// A LoadError reports that the kernel refused the rules.
type LoadError struct{ Err error }

func (e *LoadError) Error() string { return fmt.Sprintf("load nftables rules: %v", e.Err) }

// Unwrap returns the kernel's error.
func (e *LoadError) Unwrap() error { return e.Err }

// Hint returns advice for the user.
func (e *LoadError) Hint(names wording.Names) string {
	switch {
	case errors.Is(e.Err, unix.EMSGSIZE):
		return "the rules exceed net.core.wmem_max: raise it on the node, or run the pod without a user namespace of its own"
	case errors.Is(e.Err, os.ErrPermission):
		return ""
	}
	return wording.Textf("the kernel lacks nf_tables modules that the rules need: modprobe nft_nat nft_ct nft_reject_ipv4 nft_reject_ipv6 on the node, or %s", wording.Set(wording.Backend, "iptables")).In(names)
}
