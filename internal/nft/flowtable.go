package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// FlowtableTable is the name of the table of a Flowtable, of both families.
const FlowtableTable = "egress-router-flowtable"

// A Flowtable is the kernel's shortcut for the packets of established connections
// (Documentation/networking/nf_flowtable.rst): from the ingress of one interface they go to the
// other one, past rules, routing and conntrack, with both translations.
//
// A rule behind all filters of the forward hook chooses the connections: those of TCP and UDP that
// clients opened by the cluster side, that were answered and are assured, and whose replies go to
// one of the reserved addresses. Others never leave by it. A connection that lasts for less than two
// seconds by UDP is never assured (nf_conntrack_udp_packet), so that queries take no entry.
//
// The kernel keeps, besides the translations, the route of each direction. That of replies it
// looks up by the mark of the packet at hand (nft_flow_route in net/netfilter/nft_flow_offload.c),
// which is one of the other direction: the rule sets the mark of replies, and the next one takes it
// away. Since Linux 5.13 a change of routes ends the shortcut of the connections that it may concern
// (nf_flow_dst_check), and the egress hook, since 5.16, sees its packets, and so do gates.
//
// Fragments, packets with options, those longer than the MTU and those that end a connection take
// the usual way (nf_flow_table_ip.c).
type Flowtable struct {
	Cluster, Egress string // names of the two sides
	Sources         []netip.Addr
	Mark            uint32 // bits of the mark of connections from the cluster side, and of their replies
}

// The names of the flowtable and of the chain.
const (
	flowtableName = "established"
	offloadChain  = "offload"
)

// The attributes of a flowtable (linux/netfilter/nf_tables.h, nft_flowtable_attributes,
// nft_flowtable_hook_attributes, nft_devices_attributes), and its flag that keeps conntrack's
// counters right.
const (
	flowtableTable  = 1
	flowtableItself = 2
	flowtableHook   = 3
	flowtableFlags  = 7

	hookNumber   = 1
	hookPriority = 2
	hookDevices  = 3
	deviceName   = 1

	flowtableCounts = 1 << 1
)

// The bits of a connection's status (linux/netfilter/nf_conntrack_common.h, ip_conntrack_status) that
// all have that take the shortcut.
const statusSettled = 1<<1 | 1<<2 | 1<<4 // seen reply, assured, source translated

func (f Flowtable) table() *nftables.Table {
	return &nftables.Table{Name: FlowtableTable, Family: nftables.TableFamilyINet}
}

// Validate returns what is wrong with the description.
func (f Flowtable) Validate() error {
	switch {
	case f.Cluster == "" || f.Egress == "" || f.Cluster == f.Egress:
		return fmt.Errorf("flowtable: expected two sides, found %q and %q", f.Cluster, f.Egress)
	case len(f.Sources) == 0:
		return errors.New("flowtable: expected a reserved address, found none")
	case f.Mark == 0:
		return errors.New("flowtable: expected a mark, found none")
	}
	return nil
}

// devices returns the names of the interfaces in the order in which they are compared.
func (f Flowtable) devices() []string {
	return slices.Sorted(slices.Values([]string{f.Cluster, f.Egress}))
}

// chains returns the chain that the kernel shall have.
func (f Flowtable) chains() []gateChain {
	mark := rules.Mark(f.Mark)
	set := func(change expr.Any) []expr.Any {
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register}, change,
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register, SourceRegister: true},
		}
	}
	crosses := slices.Concat(arrivesBy(f.Cluster),
		[]expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: register}, compare(expr.CmpOpEq, interfaceName(f.Egress))})
	bit := binaryutil.NativeEndian.PutUint32(f.Mark)
	settled := binaryutil.NativeEndian.PutUint32(statusSettled)
	chosen := slices.Concat(crosses, []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: register}, compare(expr.CmpOpEq, []byte{expr.CtDirOriginal}),
		&expr.Ct{Key: expr.CtKeyMARK, Register: register}, bits(bit, make([]byte, 4)), compare(expr.CmpOpEq, bit),
		&expr.Ct{Key: expr.CtKeySTATUS, Register: register}, bits(settled, make([]byte, 4)), compare(expr.CmpOpEq, settled),
	})
	var list [][]expr.Any
	for _, s := range f.Sources {
		family, number := rules.IPv4, byte(unix.NFPROTO_IPV4)
		if s.Is6() {
			family, number = rules.IPv6, unix.NFPROTO_IPV6
		}
		list = append(list, slices.Concat(
			[]expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register}, compare(expr.CmpOpEq, []byte{number})}, chosen,
			[]expr.Any{&expr.Ct{Key: formats[family].repliesTo, Register: register, Direction: expr.CtDirReply}, compare(expr.CmpOpEq, s.AsSlice())},
			set(setBits(mark)), []expr.Any{&expr.FlowOffload{Name: flowtableName}},
		))
	}
	list = append(list, slices.Concat(crosses, set(bits(binaryutil.NativeEndian.PutUint32(^f.Mark), make([]byte, 4)))))
	return []gateChain{{
		name: offloadChain, based: true, hook: uint32(*nftables.ChainHookForward), at: int32(*nftables.ChainPrioritySELinuxLast), rules: list,
	}}
}

// addFlowtable adds a flowtable for interfaces, behind the gate's ingress chains.
func (b *batch) addFlowtable(t *nftables.Table, devices ...string) {
	b.add(newFlowtable, netlink.Create, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(flowtableTable, t.Name)
		e.String(flowtableItself, flowtableName)
		e.Nested(flowtableHook, func(e *netlink.AttributeEncoder) error {
			e.Uint32(hookNumber, netdevIngress)
			e.Uint32(hookPriority, 0)
			e.Nested(hookDevices, func(e *netlink.AttributeEncoder) error {
				for _, d := range devices {
					e.String(deviceName, d)
				}
				return nil
			})
			return nil
		})
		e.Uint32(flowtableFlags, flowtableCounts)
	})
}

// The messages about flowtables (linux/netfilter/nf_tables.h, nf_tables_msg_types).
const (
	newFlowtable = unix.NFT_MSG_NEWFLOWTABLE
	getFlowtable = unix.NFT_MSG_GETFLOWTABLE
)

// Load loads the table in one transaction. It changes nothing if the kernel has it already.
func (f Flowtable) Load() error {
	found, err := f.Differs()
	if err != nil || len(found) == 0 {
		return err
	}
	return f.replace("load flowtable")
}

// Flush has all packets take the usual way again, by which their connections may choose the shortcut
// anew. It is for connections that were deleted: the kernel itself looks for them once a second
// (nf_flow_offload_work_gc).
func (f Flowtable) Flush() error {
	there, err := FlowtableLoaded()
	if err != nil || !there {
		return err
	}
	return f.replace("flush flowtable")
}

func (f Flowtable) replace(what string) error {
	t := f.table()
	return replaceTable(t, f.chains(), what, func(b *batch) { b.addFlowtable(t, f.devices()...) })
}

// Differs returns the differences of the kernel from the table, one line each.
func (f Flowtable) Differs() (found []string, err error) {
	if err := f.Validate(); err != nil {
		return nil, err
	}
	there, err := FlowtableLoaded()
	if err != nil {
		return nil, err
	}
	if !there {
		return []string{"flowtable: missing"}, nil
	}
	say := func(format string, args ...any) { found = append(found, "flowtable: "+fmt.Sprintf(format, args...)) }
	devices, err := listFlowtable(f.table())
	if err != nil {
		return nil, fmt.Errorf("read flowtable: %w", err)
	}
	if !slices.Equal(devices, f.devices()) {
		say("expected the interfaces %v, found %v", f.devices(), devices)
	}
	if err := differences(f.table(), f.chains(), say); err != nil {
		return nil, fmt.Errorf("read flowtable: %w", err)
	}
	return found, nil
}

// listFlowtable returns the names of the interfaces of the flowtable, sorted. The kernel takes one away
// that is deleted.
func listFlowtable(t *nftables.Table) (devices []string, err error) {
	err = list(getFlowtable, t, func(a uint16, data []byte) error {
		if a != flowtableHook {
			return nil
		}
		return attributes(data, func(a uint16, data []byte) error {
			if a != hookDevices {
				return nil
			}
			return attributes(data, func(a uint16, data []byte) error {
				if a == deviceName {
					devices = append(devices, textOf(data))
				}
				return nil
			})
		})
	}, func() error { return nil })
	slices.Sort(devices)
	return devices, err
}

// FlowtableLoaded reports whether the kernel has the table.
func FlowtableLoaded() (bool, error) { return tableLoaded(Flowtable{}.table(), "flowtable") }

// RemoveFlowtable removes the table.
func RemoveFlowtable() error { return removeTable(Flowtable{}.table(), "flowtable") }

// hasFlowtables remembers that the kernel has or lacks them.
var hasFlowtables atomic.Pointer[bool]

// HasFlowtables reports whether the kernel has flowtables of both families (CONFIG_NF_FLOW_TABLE,
// CONFIG_NF_FLOW_TABLE_INET, CONFIG_NFT_FLOW_OFFLOAD). To find out it adds one to the loopback
// interface, with a rule, and deletes it, in one transaction.
func HasFlowtables() (bool, error) {
	if known := hasFlowtables.Load(); known != nil {
		return *known, nil
	}
	probe := &nftables.Table{Name: FlowtableTable + "-probe", Family: nftables.TableFamilyINet}
	var b batch
	b.addTable(probe)
	b.addFlowtable(probe, "lo")
	b.addChainOf(probe, nftables.ChainTypeFilter, gateChain{name: offloadChain, based: true, hook: uint32(*nftables.ChainHookForward)})
	b.addRule(probe, offloadChain, []expr.Any{&expr.FlowOffload{Name: flowtableName}})
	b.deleteTable(probe)
	err := b.run()
	has := err == nil
	if err != nil && !missing(err) && !errors.Is(err, unix.ENOENT) { // of a type without a module
		return false, fmt.Errorf("probe flowtables of nftables: %w", err)
	}
	hasFlowtables.Store(&has)
	return has, nil
}
