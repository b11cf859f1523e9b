package nft

import (
	"bytes"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// register is the register of all comparisons, the kernel's first one. secondWord and
// thirdWord are the numbers of the second and third word of its 16 bytes, and nextRegister that of the first
// word behind it: they contain the second part of a concatenation, behind a part of
// four or 16 bytes (linux/netfilter/nf_tables.h, nft_registers).
const (
	register     = unix.NFT_REG_1
	secondWord   = unix.NFT_REG32_01
	thirdWord    = unix.NFT_REG32_02
	nextRegister = unix.NFT_REG_2
)

// Bits of a connection's status (linux/netfilter/nf_conntrack_common.h,
// ip_conntrack_status).
const (
	statusExpected       = 1 << 0
	statusConfirmed      = 1 << 3
	statusDestinationNAT = 1 << 5
)

// A format is the parts of a family's rules that differ from the other family's.
type format struct {
	source, destination uint32     // offsets of the addresses in the header
	length              uint32     // length of an address in bytes
	port, lastPort      uint32     // registers of two ports behind an address
	repliesTo           expr.CtKey // destination of a connection's replies
	portUnreachable     uint8      // code of the message of a rejection
	number              nftables.TableFamily
	name                string // as nft(8) prints it
}

// formats are those of IPv4 (RFC 791, RFC 792) and IPv6 (RFC 8200, RFC 4443).
var formats = map[rules.Family]format{
	rules.IPv4: {12, 16, 4, secondWord, unix.NFT_REG32_02, expr.CtKeyDSTIP, 3, nftables.TableFamilyIPv4, "ip"},
	rules.IPv6: {8, 24, 16, nextRegister, unix.NFT_REG32_05, expr.CtKeyDSTIP6, 4, nftables.TableFamilyIPv6, "ip6"},
}

// Offsets in the TCP and UDP headers (RFC 9293, RFC 768).
const (
	destinationPort = 2
	tcpFlags        = 13
)

// Flags in the TCP header, and its option for the maximum segment size, whose value
// is behind type and length (RFC 9293, section 3.1 and 3.2).
const (
	flagSYN     = 1 << 1
	flagRST     = 1 << 2
	flagACK     = 1 << 4
	optionMSS   = 2
	optionValue = 2
)

// expressions returns a rule of a family as the kernel's expressions, in the form in
// which the kernel lists them, so that drift can be detected by comparison.
func expressions(f rules.Family, r rules.Rule) []expr.Any {
	e := formats[f].matches(r)
	if r.Drops() {
		e = append(e, &expr.Counter{})
	}
	return append(e, formats[f].actions(r)...)
}

// matches returns the matches of the rule.
func (f format) matches(r rules.Rule) []expr.Any {
	var e []expr.Any
	add := func(more ...expr.Any) { e = append(e, more...) }
	for _, i := range []struct {
		name string
		key  expr.MetaKey
		op   expr.CmpOp
	}{
		{r.In, expr.MetaKeyIIFNAME, expr.CmpOpEq},
		{r.Out, expr.MetaKeyOIFNAME, expr.CmpOpEq},
		{r.NotOut, expr.MetaKeyOIFNAME, expr.CmpOpNeq},
	} {
		if i.name != "" {
			add(&expr.Meta{Key: i.key, Register: register}, compare(i.op, interfaceName(i.name)))
		}
	}
	if r.Protocol != 0 {
		add(protocol(r.Protocol)...)
	}
	port := func(op expr.CmpOp, p rules.Port) expr.Any { return compare(op, []byte{byte(p >> 8), byte(p)}) }
	if r.Port != 0 {
		add(&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: destinationPort, Len: 2})
		if r.Last == 0 {
			add(port(expr.CmpOpEq, r.Port))
		} else {
			add(port(expr.CmpOpGte, r.Port), port(expr.CmpOpLte, r.Last))
		}
	}
	if r.SYN {
		add(&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
			&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 1, Mask: []byte{flagSYN | flagRST}, Xor: []byte{0}},
			compare(expr.CmpOpEq, []byte{flagSYN}))
	}
	if r.Message != 0 {
		add(&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
			compare(expr.CmpOpEq, []byte{byte(r.Message)}))
	}
	add(f.connectionMatches(r)...)
	// The addresses are last, since most packets match them until their source
	// is translated.
	for _, a := range []struct {
		addr   netip.Prefix
		offset uint32
		op     expr.CmpOp
	}{
		{r.From, f.source, expr.CmpOpEq},
		{r.NotFrom, f.source, expr.CmpOpNeq},
		{r.Toward, f.destination, expr.CmpOpEq},
		{r.NotToward, f.destination, expr.CmpOpNeq},
	} {
		if a.addr.IsValid() {
			add(&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: a.offset, Len: f.length})
			if !a.addr.IsSingleIP() {
				mask := net.CIDRMask(a.addr.Bits(), a.addr.Addr().BitLen())
				add(&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: f.length, Mask: mask, Xor: make([]byte, f.length)})
			}
			add(compare(a.op, a.addr.Addr().AsSlice()))
		}
	}
	if r.Clients.Bits != 0 {
		add(&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: f.source + f.length - 1, Len: 1},
			&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 1, Mask: []byte{r.Clients.Mask()}, Xor: []byte{0}},
			compare(expr.CmpOpEq, []byte{r.Clients.End}))
	}
	return e
}

// toward returns the single destination that a rule matches, if it does.
func (f format) toward(rule []expr.Any) (a netip.Addr, ok bool) {
	for i := range rule[:max(1, len(rule))-1] {
		load, loads := rule[i].(*expr.Payload)
		value, compares := rule[i+1].(*expr.Cmp)
		if loads && compares && load.Base == expr.PayloadBaseNetworkHeader && load.Offset == f.destination && load.Len == f.length && value.Op == expr.CmpOpEq {
			return netip.AddrFromSlice(value.Data)
		}
	}
	return a, false
}

// connectionMatches returns the matches of the packet's connection. For a packet
// without a connection the kernel matches only the state.
func (f format) connectionMatches(r rules.Rule) []expr.Any {
	var e []expr.Any
	add := func(more ...expr.Any) { e = append(e, more...) }
	if r.Unconnected {
		add(&expr.Ct{Key: expr.CtKeySTATE, Register: register})
		add(anyBit(expr.CtStateBitINVALID | expr.CtStateBitUNTRACKED)...)
	}
	if r.Invalid {
		add(&expr.Ct{Key: expr.CtKeySTATE, Register: register})
		add(anyBit(expr.CtStateBitINVALID)...)
	}
	if r.Redirected {
		add(&expr.Ct{Key: expr.CtKeySTATUS, Register: register})
		add(anyBit(statusDestinationNAT)...)
	}
	for _, a := range []struct {
		addr netip.Addr
		op   expr.CmpOp
	}{{r.RepliesTo, expr.CmpOpEq}, {r.RepliesNotTo, expr.CmpOpNeq}} {
		if a.addr.IsValid() {
			add(&expr.Ct{Key: f.repliesTo, Register: register, Direction: expr.CtDirReply}, compare(a.op, a.addr.AsSlice()))
		}
	}
	if r.Expected {
		add(&expr.Ct{Key: expr.CtKeySTATUS, Register: register})
		add(anyBit(statusExpected)...)
	}
	if r.Confirmed {
		add(&expr.Ct{Key: expr.CtKeySTATUS, Register: register})
		add(anyBit(statusConfirmed)...)
	}
	if r.Original {
		add(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: register}, compare(expr.CmpOpEq, []byte{expr.CtDirOriginal}))
	}
	if r.Reply {
		add(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: register}, compare(expr.CmpOpEq, []byte{expr.CtDirReply}))
	}
	for _, m := range []struct {
		mark rules.Mark
		op   expr.CmpOp
	}{{r.Marked, expr.CmpOpEq}, {r.Unmarked, expr.CmpOpNeq}} {
		if m.mark != 0 {
			mark := binaryutil.NativeEndian.PutUint32(uint32(m.mark))
			add(&expr.Ct{Key: expr.CtKeyMARK, Register: register}, bits(mark, make([]byte, 4)), compare(m.op, mark))
		}
	}
	return e
}

// actions returns the actions of the rule.
func (f format) actions(r rules.Rule) []expr.Any {
	switch r.Target {
	case rules.DNAT, rules.SNAT:
		nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.number), RegAddrMin: register, RegAddrMax: register}
		if r.Target == rules.SNAT {
			nat.Type = expr.NATTypeSourceNAT
		}
		e := []expr.Any{&expr.Immediate{Register: register, Data: r.To.AsSlice()}}
		if r.ToPort != 0 {
			nat.RegProtoMin, nat.RegProtoMax, nat.Specified = nextRegister, nextRegister, true
			e = append(e, &expr.Immediate{Register: nextRegister, Data: []byte{byte(r.ToPort >> 8), byte(r.ToPort)}})
		}
		if r.ToLast != 0 {
			nat.RegProtoMax = unix.NFT_REG_3
			e = append(e, &expr.Immediate{Register: unix.NFT_REG_3, Data: []byte{byte(r.ToLast >> 8), byte(r.ToLast)}})
		}
		return append(e, nat)
	case rules.MarkPacket:
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
			setBits(r.Mark),
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register, SourceRegister: true},
		}
	case rules.MarkConnection:
		return []expr.Any{
			&expr.Ct{Key: expr.CtKeyMARK, Register: register},
			setBits(r.Mark),
			&expr.Ct{Key: expr.CtKeyMARK, Register: register, SourceRegister: true},
		}
	case rules.Reject:
		if r.Protocol == rules.TCP {
			return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}
		}
		return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: f.portUnreachable}}
	case rules.AttachHelper:
		// iptables attaches none to a connection that another helper expected (init_conntrack
		// in net/netfilter/nf_conntrack_core.c).
		return []expr.Any{
			&expr.Ct{Key: expr.CtKeySTATUS, Register: register},
			bits(binaryutil.NativeEndian.PutUint32(statusExpected), make([]byte, 4)), compare(expr.CmpOpEq, make([]byte, 4)),
			&expr.Objref{Type: unix.NFT_OBJECT_CT_HELPER, Name: objectName(r.Helper, r.Protocol)},
		}
	case rules.ClampMSS:
		return append(pathMSS(), &expr.Exthdr{SourceRegister: register, Type: optionMSS, Offset: optionValue, Len: 2, Op: expr.ExthdrOpTcpopt})
	case rules.LogPacket:
		return []expr.Any{
			&expr.Limit{Type: expr.LimitTypePkts, Rate: 1, Unit: expr.LimitTimeSecond, Burst: rules.LogBurst},
			&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX, Group: rules.LogGroup, Data: []byte(r.Reason)},
		}
	case rules.Return:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}
	}
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
}

// rangeOffset is the flag of a translation to a port of a range at the offset of the
// original port (linux/netfilter/nf_nat.h, NF_NAT_RANGE_PROTO_OFFSET), which the library
// lacks.
const rangeOffset = 1 << 5

// A movingNAT is a translation with rangeOffset.
type movingNAT struct{ expr.NAT }

// lookUp returns the rule that redirects packets that match r by a map. For other protocols
// than those with ports the port in the key is arbitrary, which does not matter: the map
// has no key with them.
func lookUp(family rules.Family, r rules.Rule, k mapKind) []expr.Any {
	f := formats[family]
	e := append(f.matches(r), k.loadKey()...)
	if k.oneOf != 0 {
		e = append(e, &expr.Numgen{Register: thirdWord, Modulus: uint32(k.oneOf), Type: unix.NFT_NG_RANDOM}) //nolint:gosec // at most MaxAddresses
	}
	e = append(e, &expr.Lookup{SourceRegister: register, DestRegister: register, IsDestRegSet: true, SetName: k.name})
	nat := expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.number), RegAddrMin: register, RegAddrMax: register}
	switch k.ports {
	case 1:
		nat.RegProtoMin, nat.RegProtoMax, nat.Specified = f.port, f.port, true
	case 2:
		nat.RegProtoMin, nat.RegProtoMax, nat.Specified = f.port, f.lastPort, true
		return append(e, &movingNAT{nat})
	}
	return append(e, &nat)
}

// loadKey loads the key of a map, the packet's protocol and port.
func (k mapKind) loadKey() []expr.Any {
	protocol, port := uint32(register), uint32(secondWord)
	if k.ranges {
		protocol, port = secondWord, register
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: protocol},
		&expr.Payload{DestRegister: port, Base: expr.PayloadBaseTransportHeader, Offset: destinationPort, Len: 2},
	}
}

// pathMSS loads the maximum segment size of the path, in network byte order. The
// kernel never raises a segment size to it, as with iptables
// (net/netfilter/nft_exthdr.c, nft_exthdr_tcp_set_eval).
func pathMSS() []expr.Any {
	return []expr.Any{
		&expr.Rt{Register: register, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: register, DestRegister: register, Op: expr.ByteorderHton, Len: 2, Size: 2},
	}
}

// listed returns a rule as the kernel has it. The library does not know rangeOffset. The library cannot decode the two
// expressions of pathMSS and leaves them out, which would break the rule in a
// rollback. No other rule with a TCP option at its end is ours.
func listed(rule []expr.Any) []expr.Any {
	if last := len(rule) - 1; last >= 0 {
		if nat, is := rule[last].(*expr.NAT); is && nat.Type == expr.NATTypeDestNAT && nat.RegProtoMin != nat.RegProtoMax {
			rule[last] = &movingNAT{*nat}
		}
		if _, writes := rule[last].(*expr.Exthdr); writes {
			return slices.Insert(rule, last, pathMSS()...)
		}
	}
	return rule
}

func compare(op expr.CmpOp, data []byte) expr.Any {
	return &expr.Cmp{Op: op, Register: register, Data: data}
}

// protocol matches the protocol above IP.
func protocol(p rules.Protocol) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register}, compare(expr.CmpOpEq, []byte{byte(p)})}
}

// interfaceName returns a name padded to the length that the kernel compares
// (IFNAMSIZ in linux/if.h).
func interfaceName(name string) []byte {
	return append([]byte(name), bytes.Repeat([]byte{0}, unix.IFNAMSIZ-len(name))...)
}

// anyBit matches if the number in the register has one of the bits.
func anyBit(mask uint32) []expr.Any {
	return []expr.Any{bits(binaryutil.NativeEndian.PutUint32(mask), make([]byte, 4)), compare(expr.CmpOpNeq, make([]byte, 4))}
}

// setBits sets the bits of a mark in the register.
func setBits(m rules.Mark) expr.Any {
	return bits(binaryutil.NativeEndian.PutUint32(^uint32(m)), binaryutil.NativeEndian.PutUint32(uint32(m)))
}

// bits changes the register: AND mask, XOR xor.
func bits(mask, xor []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 4, Mask: mask, Xor: xor}
}
