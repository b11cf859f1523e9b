package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// CarryTable is the name of the table of a Carry, of IPv4.
const CarryTable = "egress-router-carry"

// A Carry sorts the packets of the tunnel between the routers of one address. It works in
// each router, whether that holds the address or not:
//
//   - A reply from the physical network to a port of another router's range gets that router's
//     mark, by which it is routed into the tunnel. The same holds for an ICMP error about a
//     packet from such a port.
//   - A packet from the tunnel with the address as its source, and a port of the range of a
//     known router, continues to the physical network. One to a port of the own range is a
//     reply that the holder sends back. Every other one is dropped.
//   - What arrives for a connection of a router that is not known yet is dropped, and not reset.
//
// Packets of the connections of others are not tracked: this router may see one direction of
// them only, from any time on.
//
// The tunnel's own packets, by UDP, have to come from another router of the address by the
// cluster side.
type Carry struct {
	Interface, Cluster, Egress string // names of the tunnel and of the two sides
	Sources                    []netip.Addr
	UDP                        uint16 // port of the tunnel's packets
	First, Last                uint16 // own range of source ports
	Peers                      []CarryPeer
	Mask                       uint32 // of the marks of peers
	MSS                        uint16 // highest maximum segment size of TCP that the tunnel takes
}

// A CarryPeer is another router.
type CarryPeer struct {
	Address     netip.Addr // on the cluster side
	First, Last uint16     // its range of source ports
	Mark        uint32     // of packets that are sent back to it
}

// The names of the chains.
const (
	sortChain = "sort" // of packets that arrive, before conntrack sees them
	// The chains behind it, so that a packet of a client passes two rules, and others those of its
	// way and kind only: there are some for each peer and address.
	arrivedChain        = "arrived"         // from the physical network
	arrivedErrorsChain  = "arrived-errors"  // ICMP errors
	conveyedChain       = "conveyed"        // from the tunnel
	conveyedErrorsChain = "conveyed-errors" // ICMP errors

	admitChain = "admit" // of the tunnel's own packets
	sendChain  = "send"  // of the tunnel's own packets that leave, before conntrack sees them
	spareChain = "spare" // of the connections of routers that are not known yet
	clampChain = "clamp" // of the segment size
)

// The priorities of the chains: behind the defragmentation (-400, linux/netfilter_ipv4.h,
// NF_IP_PRI_CONNTRACK_DEFRAG) and before conntrack (-200); before filters; behind mangle (-150).
const (
	sortPriority  = -350
	admitPriority = -10
	clampPriority = -140
)

// Offsets in an ICMP error (RFC 792) about a packet without options: of the length of its
// header, of its protocol and of its ports.
const (
	quotedHeader      = 8
	quotedProtocol    = 8 + 9
	quotedSource      = 8 + 20
	quotedDestination = 8 + 20 + 2

	sourcePort      = 0
	lengthUnreached = 3 // destination unreachable, which includes fragmentation needed
	timeExceeded    = 11
	badParameter    = 12
)

func (c Carry) table() *nftables.Table {
	return &nftables.Table{Name: CarryTable, Family: nftables.TableFamilyIPv4}
}

// Validate returns what is wrong with the description.
func (c Carry) Validate() error {
	switch {
	case c.Interface == "" || c.Cluster == "" || c.Egress == "":
		return fmt.Errorf("carry: expected a tunnel and two sides, found %q, %q and %q", c.Interface, c.Cluster, c.Egress)
	case len(c.Sources) == 0 || slices.ContainsFunc(c.Sources, netip.Addr.Is6):
		return fmt.Errorf("carry: expected reserved IPv4 addresses, found %v", c.Sources)
	case c.UDP == 0 || c.MSS == 0 || c.Mask == 0:
		return errors.New("carry: expected a port, a segment size and a mask of marks")
	case c.First == 0 || c.First > c.Last:
		return fmt.Errorf("carry: expected a range of ports, found %d-%d", c.First, c.Last)
	}
	for i, p := range c.Peers {
		switch {
		case !p.Address.Is4() || p.Mark == 0 || p.Mark&^c.Mask != 0 || p.First == 0 || p.First > p.Last:
			return fmt.Errorf("carry: invalid peer %+v", p)
		case p.First <= c.Last && c.First <= p.Last:
			return fmt.Errorf("carry: ports %d-%d of %s are ports of this router", p.First, p.Last, p.Address)
		}
		for _, other := range c.Peers[:i] {
			if p.Address == other.Address || p.Mark == other.Mark || p.First <= other.Last && other.First <= p.Last {
				return fmt.Errorf("carry: peers %+v and %+v are not different", other, p)
			}
		}
	}
	return nil
}

// chains returns the chains that the kernel shall have.
func (c Carry) chains() []gateChain {
	arrived, arrivedErrors, conveyed, conveyedErrors := c.sort()
	way := func(name, chain string) []expr.Any {
		return append(arrivesBy(name), &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain})
	}
	return []gateChain{
		{name: arrivedErrorsChain, rules: arrivedErrors},
		{name: arrivedChain, rules: arrived},
		{name: conveyedErrorsChain, rules: conveyedErrors},
		{name: conveyedChain, rules: conveyed},
		{name: sortChain, based: true, hook: uint32(*nftables.ChainHookPrerouting), at: sortPriority, rules: [][]expr.Any{
			way(c.Egress, arrivedChain), way(c.Interface, conveyedChain), append(arrivesBy(c.Cluster), c.untracked()...),
		}},
		{name: sendChain, based: true, hook: uint32(*nftables.ChainHookOutput), at: sortPriority, rules: [][]expr.Any{c.untracked()}},
		{name: admitChain, based: true, hook: uint32(*nftables.ChainHookInput), at: admitPriority, rules: c.admit()},
		{name: spareChain, based: true, hook: uint32(*nftables.ChainHookInput), at: admitPriority, rules: c.spare()},
		{name: clampChain, based: true, hook: uint32(*nftables.ChainHookPostrouting), at: clampPriority, rules: c.clamp()},
	}
}

func arrivesBy(name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register}, compare(expr.CmpOpEq, interfaceName(name))}
}

func address(offset uint32, a netip.Addr) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4}, compare(expr.CmpOpEq, a.AsSlice()),
	}
}

// transport matches bytes of the transport header between two values.
func transport(offset uint32, first, last []byte) []expr.Any {
	load := &expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: uint32(len(first))} //nolint:gosec // at most 2
	if slices.Equal(first, last) {
		return []expr.Any{load, compare(expr.CmpOpEq, first)}
	}
	return []expr.Any{load, compare(expr.CmpOpGte, first), compare(expr.CmpOpLte, last)}
}

func portBytes(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }

// ported returns the matches of packets that have a port of a range at an offset.
func ported(offset uint32, first, last uint16) (all [][]expr.Any) {
	for _, p := range []rules.Protocol{rules.TCP, rules.UDP, rules.SCTP} {
		all = append(all, append(protocol(p), transport(offset, portBytes(first), portBytes(last))...))
	}
	return all
}

// quoting returns the matches of ICMP errors about packets that have a port of a range at an
// offset in the error.
func quoting(offset uint32, first, last uint16) (all [][]expr.Any) {
	for _, p := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP} {
		for _, kinds := range [][2]byte{{lengthUnreached, lengthUnreached}, {timeExceeded, badParameter}} {
			all = append(all, slices.Concat(transport(0, kinds[:1], kinds[1:]),
				transport(quotedHeader, []byte{0x45}, []byte{0x45}), transport(quotedProtocol, []byte{p}, []byte{p}),
				transport(offset, portBytes(first), portBytes(last))))
		}
	}
	return all
}

// sort returns the rules of packets from the physical network and of those from the tunnel, and in
// either case of the ICMP errors among them.
func (c Carry) sort() (arrived, arrivedErrors, conveyed, conveyedErrors [][]expr.Any) {
	const source, destination = 12, 16
	accept, drop := &expr.Verdict{Kind: expr.VerdictAccept}, []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
	errorsTo := func(chain string) [][]expr.Any {
		return [][]expr.Any{append(protocol(rules.ICMP), &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain})}
	}
	arrived, conveyed = errorsTo(arrivedErrorsChain), errorsTo(conveyedErrorsChain)
	add := func(to *[][]expr.Any, at uint32, matches [][]expr.Any, then ...expr.Any) {
		for _, s := range c.Sources {
			for _, match := range matches {
				*to = append(*to, slices.Concat(address(at, s), match, then))
			}
		}
	}
	for _, p := range c.Peers {
		mark := []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
			&expr.Bitwise{
				SourceRegister: register, DestRegister: register, Len: 4,
				Mask: binaryutil.NativeEndian.PutUint32(^c.Mask), Xor: binaryutil.NativeEndian.PutUint32(p.Mark),
			},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register, SourceRegister: true},
			&expr.Notrack{}, accept,
		}
		add(&arrived, destination, ported(destinationPort, p.First, p.Last), mark...)
		add(&arrivedErrors, destination, quoting(quotedSource, p.First, p.Last), mark...)
		add(&conveyed, source, ported(sourcePort, p.First, p.Last), &expr.Notrack{}, accept)
		add(&conveyedErrors, source, quoting(quotedDestination, p.First, p.Last), &expr.Notrack{}, accept)
	}
	add(&conveyed, destination, ported(destinationPort, c.First, c.Last), accept)
	add(&conveyedErrors, destination, quoting(quotedSource, c.First, c.Last), accept)
	return arrived, arrivedErrors, append(conveyed, drop), append(conveyedErrors, drop)
}

// tunnel returns the matches of the tunnel's own packets.
func (c Carry) tunnel() []expr.Any {
	return append(protocol(rules.UDP), transport(destinationPort, portBytes(c.UDP), portBytes(c.UDP))...)
}

// untracked returns the rule that keeps the tunnel's own packets out of conntrack: each carried
// connection has source ports of its own (vxlan_src_port in include/net/vxlan.h), and so an entry
// of its own beside that of the connection.
func (c Carry) untracked() []expr.Any { return append(c.tunnel(), &expr.Notrack{}) }

func (c Carry) admit() (all [][]expr.Any) {
	const source = 12
	tunnel := c.tunnel()
	for _, p := range c.Peers {
		all = append(all, slices.Concat(tunnel, arrivesBy(c.Cluster), address(source, p.Address),
			[]expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}))
	}
	return append(all, append(slices.Clone(tunnel), &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}))
}

// spare returns the rules that drop what arrives in the midst of an unknown TCP connection to a port
// of another router, which may not be known yet: this one has just been started. The kernel would
// reset the connection. A segment that is lost is repeated.
func (c Carry) spare() (all [][]expr.Any) {
	const destination, firstCarried = 16, 1024
	for _, s := range c.Sources {
		for _, ports := range [][2]uint16{{firstCarried, c.First - 1}, {c.Last + 1, 65535}} {
			if ports[0] == 0 || ports[0] > ports[1] { // behind the last port; before the first one
				continue
			}
			all = append(all, slices.Concat(arrivesBy(c.Egress), address(destination, s), protocol(rules.TCP),
				transport(destinationPort, portBytes(ports[0]), portBytes(ports[1])),
				[]expr.Any{
					&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
					&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 1, Mask: []byte{flagSYN | flagACK}, Xor: []byte{0}},
					compare(expr.CmpOpNeq, []byte{flagSYN}),
					&expr.Ct{Key: expr.CtKeySTATE, Register: register},
				}, anyBit(expr.CtStateBitNEW|expr.CtStateBitINVALID),
				[]expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}))
		}
	}
	return all
}

// clamp returns the rule that lowers the maximum segment size of connections, which may use
// the tunnel from any time on. The kernel raises none to it (net/netfilter/nft_exthdr.c,
// nft_exthdr_tcp_set_eval).
func (c Carry) clamp() [][]expr.Any {
	return [][]expr.Any{slices.Concat(protocol(rules.TCP), []expr.Any{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 1, Mask: []byte{flagSYN | flagRST}, Xor: []byte{0}},
		compare(expr.CmpOpEq, []byte{flagSYN}),
		&expr.Immediate{Register: register, Data: portBytes(c.MSS)},
		&expr.Exthdr{SourceRegister: register, Type: optionMSS, Offset: optionValue, Len: 2, Op: expr.ExthdrOpTcpopt},
	})}
}

// Load loads the table in one transaction. It changes nothing if the kernel has it already.
func (c Carry) Load() error {
	found, err := c.Differs()
	if err != nil || len(found) == 0 {
		return err
	}
	return replaceTable(c.table(), c.chains(), "load carry", func(*batch) {})
}

// Differs returns the differences of the kernel from the table, one line each.
func (c Carry) Differs() (found []string, err error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	there, err := CarryLoaded()
	if err != nil {
		return nil, err
	}
	if !there {
		return []string{"carry: missing"}, nil
	}
	err = differences(c.table(), c.chains(), func(format string, args ...any) { found = append(found, "carry: "+fmt.Sprintf(format, args...)) })
	if err != nil {
		return nil, fmt.Errorf("read carry: %w", err)
	}
	return found, nil
}

// CarryLoaded reports whether the kernel has the table.
func CarryLoaded() (bool, error) { return tableLoaded(Carry{}.table(), "carry") }

// RemoveCarry removes the table.
func RemoveCarry() error { return removeTable(Carry{}.table(), "carry") }
