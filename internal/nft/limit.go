package nft

import (
	"encoding/binary"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// The table of limits has a chain for each redirect with limits, and a map from its ports to
// that chain. The state of a limit is part of its rule in the kernel: while the rule stays,
// a change of other rules does not touch it.
//
// An element of a set would not do: Linux 5.10 deletes one that counts no connection
// (net/netfilter/nft_set_hash.c, nft_rhash_gc). A rule of iptables that counts
// begins at zero whenever any program replaces its table, in the legacy flavour.
//
//	limits              iifname eth0 meta l4proto . th dport vmap @limits
//	tcp-443             limit rate 100/second burst 200 packets ct count 500 accept
//	                    goto limits-prerouting
//	limits-prerouting   the rules that refuse
const (
	entryName = "limits" // name of the base chain, and of the map
	mapID     = 1000     // of the map, within a batch
)

// limitKind has the form of the map's keys.
var limitKind = mapKind{ranges: true}

// refusalName is the name of the chain with the plan's rules that refuse.
var refusalName = chainName(rules.Chain{Table: rules.Limits, Hook: rules.Prerouting})

// A limits is the map and the chains of redirects with limits, each sorted by key.
type limits struct {
	ports destinations // without values; with one: a verdict that is not ours
	lines []line
}

// A line is the chain of a redirect, whose key is its protocol and first port.
type line struct {
	key   [8]byte
	limit rules.Limit // zero: its rules are not ours
}

func compareLines(a, b line) int { return slices.Compare(a.key[:], b.key[:]) }

// newLimits returns the map and the chains for redirects with limits.
func newLimits(redirects []rules.Redirect) *limits {
	l := new(limits)
	for _, r := range redirects {
		key := portKey(r.Protocol, r.Port)
		l.ports = append(l.ports, destination{key: key, end: portKey(r.Protocol, max(r.Port, r.Last))})
		l.lines = append(l.lines, line{key, r.Limits.Value()})
	}
	l.ports.sort()
	slices.SortFunc(l.lines, compareLines)
	return l
}

// entry returns the base chain, for the plan's rule that checks limits.
func entry(f rules.Family, r rules.Rule) *chain {
	rule := append(formats[f].matches(r), limitKind.loadKey()...)
	rule = append(rule, &expr.Lookup{SourceRegister: register, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: entryName})
	return &chain{
		kind: nftables.ChainTypeNAT, hook: *nftables.ChainHookPrerouting, priority: *nftables.ChainPriorityNATDest - 3, based: true,
		rules: [][]expr.Any{rule},
	}
}

// lineName returns the name of a redirect's chain.
func lineName(key [8]byte) string {
	return rules.Protocol(key[0]).String() + "-" + strconv.Itoa(int(binary.BigEndian.Uint16(key[4:])))
}

// lineKey returns the key of a redirect's chain with the given name, and whether it is one.
func lineKey(name string) (key [8]byte, ok bool) {
	_, number, _ := strings.Cut(name, "-")
	port, err := strconv.ParseUint(number, 10, 16)
	for _, p := range []rules.Protocol{rules.TCP, rules.UDP, rules.SCTP} {
		if key = portKey(p, rules.Port(port)); err == nil && lineName(key) == name {
			return key, true
		}
	}
	return key, false
}

// lineRules returns the rules of a redirect's chain.
func lineRules(l rules.Limit) [][]expr.Any {
	var within []expr.Any
	if l.PerMinute != 0 {
		rate := &expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(l.PerMinute), Unit: expr.LimitTimeMinute, Burst: l.Burst}
		if l.PerMinute%60 == 0 {
			rate.Rate, rate.Unit = uint64(l.PerMinute/60), expr.LimitTimeSecond
		}
		within = append(within, rate)
	}
	if l.Max != 0 {
		within = append(within, &expr.Connlimit{Count: l.Max})
	}
	return [][]expr.Any{
		append(within, &expr.Verdict{Kind: expr.VerdictAccept}),
		{&expr.Verdict{Kind: expr.VerdictGoto, Chain: refusalName}},
	}
}

// limitOf returns the limit of a redirect's chain with the given rules, zero if it has others.
func limitOf(found [][]expr.Any) (l rules.Limit) {
	if len(found) == 0 {
		return l
	}
	for _, x := range found[0] {
		switch x := x.(type) {
		case *expr.Limit:
			l.PerMinute, l.Burst = uint32(x.Rate*60/max(1, uint64(x.Unit))), x.Burst //nolint:gosec // compared below
		case *expr.Connlimit:
			l.Max = x.Count
		}
	}
	if !reflect.DeepEqual(found, lineRules(l)) {
		return rules.Limit{}
	}
	return l
}

// readLines reads the rules of the chains of redirects, which are in l without their limits.
// One dump for all chains of the table takes a hundredth of the time of one for each.
func (l *limits) readLines(t *nftables.Table) error {
	slices.SortFunc(l.lines, compareLines)
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer conn.Close()
	var b batch
	b.add(unix.NFT_MSG_GETRULE, netlink.Dump, t.Family, func(e *netlink.AttributeEncoder) { e.String(unix.NFTA_RULE_TABLE, t.Name) })
	if b.err != nil {
		return b.err
	}
	if _, err := conn.Send(b.messages[0]); err != nil {
		return reason(err)
	}
	var chain string
	var found [][]expr.Any // rules of chain
	end := func() {
		key, _ := lineKey(chain)
		if at, there := slices.BinarySearchFunc(l.lines, line{key: key}, compareLines); there {
			l.lines[at].limit = limitOf(found)
		}
	}
	err = receive(conn, func(m syscall.NetlinkMessage) error {
		return attributes(m.Data[len(header(0, 0)):], func(kind uint16, data []byte) error {
			switch kind {
			case unix.NFTA_RULE_CHAIN:
				if name := strings.TrimRight(string(data), "\x00"); name != chain {
					end()
					chain, found = name, nil
				}
			case unix.NFTA_RULE_EXPRESSIONS:
				rule, err := lineExpressions(byte(t.Family), data)
				found = append(found, rule)
				return err
			}
			return nil
		})
	})
	end()
	if err != nil {
		return fmt.Errorf("list rules of table %s: %w", t.Name, err)
	}
	return nil
}

// lineExpressions returns a rule with expressions that chains of redirects have. It contains
// nil for each other expression.
func lineExpressions(family byte, list []byte) (rule []expr.Any, err error) {
	err = attributes(list, func(_ uint16, b []byte) error {
		var x expr.Any
		err := attributes(b, func(kind uint16, data []byte) error {
			if kind == unix.NFTA_EXPR_NAME {
				switch strings.TrimRight(string(data), "\x00") {
				case "limit":
					x = new(expr.Limit)
				case "connlimit":
					x = new(expr.Connlimit)
				case "immediate":
					x = new(expr.Verdict)
				}
			}
			if kind == unix.NFTA_EXPR_DATA && x != nil {
				return expr.Unmarshal(family, data, x)
			}
			return nil
		})
		rule = append(rule, x)
		return err
	})
	return rule, err
}

// addLimitsMap adds the map, without elements.
func (b *batch) addLimitsMap(t *nftables.Table) {
	b.addSet(t, entryName, mapID, unix.NFT_SET_MAP|nftables.NFT_SET_CONCAT|unix.NFT_SET_INTERVAL, limitKind.keyType(), nftables.TypeVerdict)
}

// changeLimits adds the changes of the map and the chains from have to want. The chain that
// refuses exists.
func (b *batch) changeLimits(t *nftables.Table, have, want *limits) {
	gone, more := steps(have.ports, want.ports, compareDestinations)
	b.changePorts(unix.NFT_MSG_DELSETELEM, 0, t, gone)
	removed, added := steps(have.lines, want.lines, compareLines)
	for _, l := range removed {
		b.deleteRules(t, lineName(l.key), 0)
		if _, stays := slices.BinarySearchFunc(added, l, compareLines); !stays {
			b.deleteChain(t, lineName(l.key))
		}
	}
	for _, l := range added {
		if _, there := slices.BinarySearchFunc(removed, l, compareLines); !there {
			b.addChain(t, lineName(l.key), new(chain))
		}
		for _, r := range lineRules(l.limit) {
			b.addRule(t, lineName(l.key), r)
		}
	}
	b.changePorts(unix.NFT_MSG_NEWSETELEM, netlink.Create, t, more)
}

// portsInMessage is the number of elements in a message. Their list is one attribute, whose
// length has 16 bits; one has some 100 bytes.
const portsInMessage = 400

// changePorts adds elements to the map or deletes them (NFT_MSG_DELSETELEM).
func (b *batch) changePorts(kind int, flags netlink.HeaderFlags, t *nftables.Table, ports destinations) {
	value := func(e *netlink.AttributeEncoder, kind uint16, key [8]byte) {
		e.Nested(kind, func(e *netlink.AttributeEncoder) error {
			b := make([]byte, limitKind.keyLen())
			limitKind.putKey(b, key)
			e.Bytes(unix.NFTA_DATA_VALUE, b)
			return nil
		})
	}
	for part := range slices.Chunk(ports, portsInMessage) {
		b.add(kind, flags, t.Family, func(e *netlink.AttributeEncoder) {
			e.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
			e.String(unix.NFTA_SET_ELEM_LIST_SET, entryName)
			e.Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(e *netlink.AttributeEncoder) error {
				for _, p := range part {
					e.Nested(unix.NFTA_LIST_ELEM, func(e *netlink.AttributeEncoder) error {
						value(e, unix.NFTA_SET_ELEM_KEY, p.key)
						value(e, keyEnd, p.end)
						if kind == unix.NFT_MSG_DELSETELEM {
							return nil
						}
						e.Nested(unix.NFTA_SET_ELEM_DATA, func(e *netlink.AttributeEncoder) error {
							e.Nested(unix.NFTA_DATA_VERDICT, func(e *netlink.AttributeEncoder) error {
								e.Int32(unix.NFTA_VERDICT_CODE, unix.NFT_GOTO)
								e.String(unix.NFTA_VERDICT_CHAIN, lineName(p.key))
								return nil
							})
							return nil
						})
						return nil
					})
				}
				return nil
			})
		})
	}
}

// isLimitsMap reports whether a set of the kernel is the map.
func isLimitsMap(s *nftables.Set) bool {
	return s.Name == entryName && s.IsMap && s.Interval && !s.Constant && s.Timeout == 0 && s.KeyType.Name == limitKind.keyType().Name && s.DataType.Name == nftables.TypeVerdict.Name
}

// readPorts returns the elements of the map.
func readPorts(t *nftables.Table) (destinations, error) {
	return readElements(t, entryName, func(b []byte) (d destination, err error) {
		var code uint32
		var to string
		err = attributes(b, func(kind uint16, part []byte) error {
			return attributes(part, func(_ uint16, data []byte) error {
				switch kind {
				case unix.NFTA_SET_ELEM_KEY:
					d.key = limitKind.takeKey(data)
				case keyEnd:
					d.end = limitKind.takeKey(data)
				}
				if kind != unix.NFTA_SET_ELEM_DATA {
					return nil
				}
				return attributes(data, func(kind uint16, data []byte) error {
					switch {
					case kind == unix.NFTA_VERDICT_CODE && len(data) == 4:
						code = binary.BigEndian.Uint32(data)
					case kind == unix.NFTA_VERDICT_CHAIN:
						to = strings.TrimRight(string(data), "\x00")
					}
					return nil
				})
			})
		})
		if int32(code) != unix.NFT_GOTO || to != lineName(d.key) { //nolint:gosec // the kernel writes two's complement
			d.value[0] = 1
		}
		return d, err
	}, compareDestinations)
}
