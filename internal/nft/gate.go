package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// GateTable is the name of the gate's table, in any family. Elements of its sets come and go all the
// time.
const GateTable = "egress-router-gate"

// A Gate drops what leaves an interface with a reserved address, unless the gateway, or
// another witness, has just answered a ping from that address. Whoever gets the answer is
// whom the neighbours take for the holder of the address: of several hosts with it, at most
// one sends. The kernel alone closes it, at the end of the time that an answer permits, even
// if the process has ended or hangs.
//
// The pings, and the announcements by which the neighbours learn the address, come from
// packet sockets with the gate's mark (socket(7), SO_MARK). The table has sets with
// lifetimes (nft(8), timeout). That of tickets contains numbers of pings, the others the interface:
//
//	ticket  a ping; set by the kernel as it leaves
//	permit  packets leave; extended by the kernel as the answer to a live ticket arrives,
//	        if it is alive or the gate is armed
//	claim   marked announcements and pings leave
//	arm     pings leave, and an answer opens
//	open    a permit counts; without a lifetime, since an answer on its way during Shut may
//	        extend the permit afterwards
//
// Probes for an address (RFC 5227, section 2.1.1; RFC 4862, section 5.4.2) and the packets of
// a link-local address always leave, unless these advertise a reserved address.
//
// A kernel without the egress hook of netdev (Linux 5.16, CONFIG_NETFILTER_EGRESS) has the rules
// behind the translation of sources, where they see no ARP and no packet socket, and a packet that
// has passed them may wait for the link or the hardware address of its next hop. ARP is to be
// answered by a process (arp.ListenRequests), not by the kernel.
//
// All methods work in the calling thread's network namespace.
type Gate struct {
	Interface string
	// Sources are the reserved addresses. Only answers to the first one open: two hosts of
	// which each had an answer to another address would both send.
	Sources []netip.Addr
	// Witnesses are the host whose answers open, exactly one of the family of the first source:
	// another one could take another router for the holder. Others do not count.
	Witnesses []netip.Addr
	Mark      uint32 // of the packet sockets
	// Ticket is the time in which a ping has to be answered, Permit the time that an answer
	// permits. The kernel rounds them down to its ticks, of 1 to 10 ms.
	Ticket, Permit time.Duration
	WithoutEgress  bool // the kernel has no egress hook
	// Steers is an interface whose packets get SteerMark, of the bits SteerMask, as they arrive
	// while the gate is shut, so that a routing rule leads them elsewhere; empty: there is none.
	// The kernel does that by itself, as it shuts.
	Steers               string
	SteerMark, SteerMask uint32
	Index                int // of the interface; zero: it is looked up, which waits on a busy machine

	socket *lasting // nil: each call opens one
}

// The names of the gate's sets and chains.
const (
	ticketSet = "ticket"
	permitSet = "permit"
	claimSet  = "claim"
	armSet    = "arm"
	openSet   = "open"

	egressChain  = "egress"
	ingressChain = "ingress"
	leaveChain   = "leave" // the rules of egress for the interface, in inet
	pingChain    = "ping"  // our pings to a witness
	replyChain   = "reply" // their answers
	steerChain   = "steer" // ingress of Gate.Steers
)

// gateSets are the gate's sets, in the order of their creation.
var gateSets = []string{ticketSet, permitSet, claimSet, armSet, openSet}

// most is the number of elements of a set. The kernel collects dead elements once a second
// (nft_set_gc_interval in net/netfilter).
const most = 1 << 16

// tick is the longest tick of a kernel (CONFIG_HZ=100): it rounds lifetimes down to whole ticks.
const tick = 10 * time.Millisecond

// netdevEgress is the egress hook of netdev (linux/netfilter.h, nf_dev_hooks), inetIngress the
// ingress hook of inet (NF_INET_INGRESS).
const (
	netdevIngress = 0
	netdevEgress  = 1
	inetIngress   = 5
)

// The types of ICMP (RFC 792) and ICMPv6 (RFC 4443, RFC 4861) messages, and the offset of
// identifier and sequence number of a ping, which is its number here.
const (
	echoRequest4 = 8
	echoReply4   = 0
	echoRequest6 = 128
	echoReply6   = 129
	solicitation = 135
	advertises   = 136

	echoNumber   = 4
	arpSender    = 14 // offset of the sender's address (RFC 826)
	etherTypeAt  = 12
	etherTypeLen = 2
	etherLen     = 14
	hopByHop     = 0 // extension header (RFC 8200, section 4.3)
)

// family returns the family of the gate's table.
func (g Gate) family() nftables.TableFamily {
	if g.WithoutEgress {
		return nftables.TableFamilyINet
	}
	return nftables.TableFamilyNetdev
}

func (g Gate) table() *nftables.Table {
	return &nftables.Table{Name: GateTable, Family: g.family()}
}

// Validate returns what is wrong with the gate.
func (g Gate) Validate() error {
	switch {
	case g.Interface == "":
		return errors.New("gate: expected an interface, found none")
	case len(g.Sources) == 0 || len(g.witnesses()) != 1:
		return fmt.Errorf("gate: expected a reserved address and one witness of its family, found %v and %v", g.Sources, g.Witnesses)
	case g.Mark == 0:
		return errors.New("gate: expected a mark, found none")
	case g.Steers != "" && (g.Steers == g.Interface || g.SteerMark == 0 || g.SteerMark&^g.SteerMask != 0):
		return fmt.Errorf("gate: expected another interface to steer and a mark, found %q and 0x%x/0x%x", g.Steers, g.SteerMark, g.SteerMask)
	case g.Ticket < tick || g.Permit < tick: // without a lifetime an element stays
		return fmt.Errorf("gate: expected lifetimes of at least %v, found %v and %v", tick, g.Ticket, g.Permit)
	}
	return nil
}

// witnesses returns those of the family of the first source.
func (g Gate) witnesses() []netip.Addr {
	return slices.DeleteFunc(slices.Clone(g.Witnesses), func(a netip.Addr) bool { return a.Is4() != g.Sources[0].Is4() })
}

// A gateChain is a chain of the gate. Without a hook it is one to jump to.
type gateChain struct {
	name   string
	based  bool
	hook   uint32
	at     int32  // priority
	device string // of a hook of one interface
	drops  bool   // its policy is drop
	rules  [][]expr.Any
}

// chains returns the chains that the kernel shall have, each before a jump to it.
func (g Gate) chains() []gateChain {
	ping, reply := g.pings()
	egress := gateChain{name: egressChain, based: true, hook: netdevEgress, device: g.Interface, drops: true, rules: g.egress()}
	ingress := gateChain{name: ingressChain, based: true, hook: netdevIngress, device: g.Interface, rules: g.ingress()}
	var steer []gateChain
	if g.Steers != "" {
		steer = []gateChain{{name: steerChain, based: true, hook: netdevIngress, device: g.Steers, rules: g.steer()}}
	}
	if !g.WithoutEgress {
		return append([]gateChain{ping, reply, egress, ingress}, steer...)
	}
	for i := range steer {
		steer[i].hook = inetIngress
	}
	leave := gateChain{name: leaveChain, rules: egress.rules}
	egress = gateChain{name: egressChain, based: true, hook: uint32(*nftables.ChainHookPostrouting), at: int32(*nftables.ChainPriorityNATSource) + 2, rules: [][]expr.Any{{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: register}, compare(expr.CmpOpEq, interfaceName(g.Interface)),
		&expr.Verdict{Kind: expr.VerdictGoto, Chain: leaveChain},
	}}}
	ingress.hook = inetIngress
	return append([]gateChain{reply, leave, egress, ingress}, steer...)
}

// anyInterface is the key of the sets that stands for an open gate where a packet arrives that
// another interface would send. No interface has the index 0.
var anyInterface = make([]byte, 4)

func loadAny() expr.Any { return &expr.Immediate{Register: register, Data: anyInterface} }

// steer returns the rules that mark what arrives while the gate is shut.
func (g Gate) steer() [][]expr.Any {
	return [][]expr.Any{
		{loadAny(), lookUpIn(permitSet), lookUpIn(openSet), &expr.Verdict{Kind: expr.VerdictAccept}},
		{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
			&expr.Bitwise{
				SourceRegister: register, DestRegister: register, Len: 4,
				Mask: binaryutil.NativeEndian.PutUint32(^g.SteerMask), Xor: binaryutil.NativeEndian.PutUint32(g.SteerMark),
			},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register, SourceRegister: true},
		},
	}
}

// pings returns the chains of our pings and their answers.
func (g Gate) pings() (ping, reply gateChain) {
	update := func(set string, lives time.Duration) expr.Any {
		return &expr.Dynset{SrcRegKey: register, SetName: set, Operation: uint32(unix.NFT_DYNSET_OP_UPDATE), Timeout: lives.Truncate(time.Millisecond)}
	}
	ping, reply = gateChain{name: pingChain}, gateChain{name: replyChain}
	number := g.at(echoOf(g.Sources[0]).message+echoNumber, 4)
	for _, set := range []string{permitSet, claimSet, armSet} {
		ping.rules = append(ping.rules, append(leaves(set), number, update(ticketSet, g.Ticket), &expr.Verdict{Kind: expr.VerdictAccept}))
	}
	// Packet sockets have the answers; nothing else in the namespace has asked.
	drop := []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
	for _, set := range []string{permitSet, armSet} {
		extend := append(arrives(set), update(permitSet, g.Permit))
		if g.Steers != "" {
			extend = append(extend, loadAny(), update(permitSet, g.Permit))
		}
		reply.rules = append(reply.rules, append(extend, drop...))
	}
	reply.rules = append(reply.rules, drop)
	return ping, reply
}

// leaves matches while a set contains the interface by which the packet leaves.
func leaves(set string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIF, Register: register}, lookUpIn(set)}
}

// arrives does the same with the interface by which it has arrived.
func arrives(set string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: register}, lookUpIn(set)}
}

func lookUpIn(set string) expr.Any { return &expr.Lookup{SourceRegister: register, SetName: set} }

// isMarked matches packets with the gate's mark.
func (g Gate) isMarked() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: register}, compare(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(g.Mark))}
}

// isOf matches frames of a protocol (linux/if_ether.h).
func (g Gate) isOf(etherType uint16) []expr.Any {
	if g.WithoutEgress { // there are no frames behind routing
		number := map[uint16]byte{unix.ETH_P_IP: unix.NFPROTO_IPV4, unix.ETH_P_IPV6: unix.NFPROTO_IPV6}[etherType]
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register}, compare(expr.CmpOpEq, []byte{number})}
	}
	return []expr.Any{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseLLHeader, Offset: etherTypeAt, Len: etherTypeLen},
		compare(expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, etherType)),
	}
}

// at loads bytes of the packet behind the Ethernet header. What a packet socket says of its frame
// may be wrong, or missing, and the kernel then finds no header in it: only its bytes count.
func (g Gate) at(offset, length uint32) *expr.Payload {
	if g.WithoutEgress {
		return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length}
	}
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseLLHeader, Offset: etherLen + offset, Len: length}
}

// has matches bytes of that packet.
func (g Gate) has(offset uint32, value ...byte) []expr.Any {
	return []expr.Any{g.at(offset, uint32(len(value))), compare(expr.CmpOpEq, value)} //nolint:gosec // at most 16
}

// An echo is the pings of a family.
type echo struct {
	etherType      uint16
	protocol       byte
	protocolAt     uint32 // offset of the protocol in a packet
	message        uint32 // offset of the message in a packet without options
	request, reply byte   // types of the messages
	format         format
}

func echoOf(a netip.Addr) echo {
	if a.Is4() {
		return echo{unix.ETH_P_IP, unix.IPPROTO_ICMP, 9, 20, echoRequest4, echoReply4, formats[rules.IPv4]}
	}
	return echo{unix.ETH_P_IPV6, unix.IPPROTO_ICMPV6, 6, 40, echoRequest6, echoReply6, formats[rules.IPv6]}
}

// sends matches messages of a type that leave, in a packet without options.
func (g Gate) sends(e echo, kind byte) []expr.Any {
	matches := g.isOf(e.etherType)
	if e.etherType == unix.ETH_P_IP {
		matches = append(matches, g.has(0, 0x45)...) // version, and the length of the header in words
	}
	return slices.Concat(matches, g.has(e.protocolAt, e.protocol), g.has(e.message, kind))
}

// egress returns the rules for what leaves.
func (g Gate) egress() (all [][]expr.Any) {
	accept, drop := &expr.Verdict{Kind: expr.VerdictAccept}, &expr.Verdict{Kind: expr.VerdictDrop}
	add := func(verdict expr.Any, matches ...[]expr.Any) {
		all = append(all, append(slices.Concat(matches...), verdict))
	}
	six := echoOf(netip.IPv6Unspecified())
	if !g.WithoutEgress {
		e := echoOf(g.Sources[0])
		for _, w := range g.witnesses() {
			add(&expr.Verdict{Kind: expr.VerdictJump, Chain: pingChain}, g.isMarked(), g.sends(e, e.request),
				g.has(e.format.source, g.Sources[0].AsSlice()...), g.has(e.format.destination, w.AsSlice()...))
		}
	}
	add(accept, leaves(permitSet), []expr.Any{lookUpIn(openSet)})
	if !g.WithoutEgress {
		add(accept, leaves(claimSet), g.isMarked(), g.isOf(unix.ETH_P_ARP))
		add(accept, g.isOf(unix.ETH_P_ARP), g.has(arpSender, 0, 0, 0, 0))
		for _, kind := range []byte{solicitation, advertises} {
			add(accept, leaves(claimSet), g.isMarked(), g.sends(six, kind))
		}
	}
	for _, a := range g.Sources {
		if a.Is6() { // behind flags, the target
			add(drop, g.sends(six, advertises), g.has(six.message+8, a.AsSlice()...), []expr.Any{&expr.Counter{}})
		}
	}
	linkLocal := []expr.Any{
		g.at(six.format.source, 2),
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 2, Mask: []byte{0xff, 0xc0}, Xor: make([]byte, 2)},
		compare(expr.CmpOpEq, []byte{0xfe, 0x80}), // fe80::/10 (RFC 4291, section 2.5.6)
	}
	// The reports of multicast listeners have an option (RFC 3810, section 5). Behind any other
	// extension header could be an advertisement.
	reports := slices.Concat(g.has(six.protocolAt, hopByHop), g.has(six.message, unix.IPPROTO_ICMPV6, 0),
		[]expr.Any{g.at(six.message+8, 1), compare(expr.CmpOpNeq, []byte{advertises})})
	for _, source := range [][]expr.Any{g.has(six.format.source, make([]byte, 16)...), linkLocal} {
		add(accept, g.isOf(unix.ETH_P_IPV6), source, g.has(six.protocolAt, unix.IPPROTO_ICMPV6))
		add(accept, g.isOf(unix.ETH_P_IPV6), source, reports)
	}
	add(drop, []expr.Any{&expr.Counter{}})
	return all
}

// ingress returns the rules for what arrives: the answers to live tickets.
func (g Gate) ingress() (all [][]expr.Any) {
	e := echoOf(g.Sources[0])
	header := func(offset uint32, a netip.Addr) []expr.Any {
		return []expr.Any{&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: e.format.length}, compare(expr.CmpOpEq, a.AsSlice())}
	}
	for _, w := range g.witnesses() {
		all = append(all, slices.Concat(g.isOf(e.etherType), []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register}, compare(expr.CmpOpEq, []byte{e.protocol}),
			&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1}, compare(expr.CmpOpEq, []byte{e.reply}),
		}, header(e.format.source, w), header(e.format.destination, g.Sources[0]), []expr.Any{
			&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: echoNumber, Len: 4},
			lookUpIn(ticketSet),
			&expr.Verdict{Kind: expr.VerdictJump, Chain: replyChain},
		}))
	}
	return all
}
