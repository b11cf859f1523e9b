package conntrack

import (
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// Messages and attributes of ctnetlink (linux/netfilter/nfnetlink_conntrack.h).
const (
	messageNew    = 0 // IPCTNL_MSG_CT_NEW: an entry, in an event or a dump
	messageGet    = 1 // IPCTNL_MSG_CT_GET
	messageDelete = 2 // IPCTNL_MSG_CT_DELETE: the end of an entry
	messageStats  = 5 // IPCTNL_MSG_CT_GET_STATS

	ctaTupleOrig     = 1
	ctaTupleReply    = 2
	ctaStatus        = 3
	ctaProtoInfo     = 4
	ctaTimeout       = 7
	ctaMark          = 8
	ctaCountersOrig  = 9
	ctaCountersReply = 10
	ctaID            = 12
	ctaTupleMaster   = 14
	ctaTimestamp     = 20
	ctaMarkMask      = 21
	ctaEventTime     = 27 // CTA_TIMESTAMP_EVENT, since Linux 6.14

	ctaTupleIP      = 1 // in ctaTuple…
	ctaTupleProto   = 2
	ctaIPv4Src      = 1 // in ctaTupleIP
	ctaIPv4Dst      = 2
	ctaIPv6Src      = 3
	ctaIPv6Dst      = 4
	ctaProtoNum     = 1 // in ctaTupleProto
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	ctaProtoInfoTCP   = 1 // in ctaProtoInfo
	ctaProtoInfoSCTP  = 3
	ctaProtoInfoState = 1 // in ctaProtoInfo…

	ctaTimestampStart = 1 // in ctaTimestamp
	ctaTimestampStop  = 2

	ctaCountersPackets = 1 // in ctaCounters…
	ctaCountersBytes   = 2

	ctaStatsEntries    = 1 // CTA_STATS_GLOBAL_ENTRIES
	ctaStatsMaxEntries = 2 // CTA_STATS_GLOBAL_MAX_ENTRIES, since Linux 4.18
)

// Bits of an entry's status (linux/netfilter/nf_conntrack_common.h).
const (
	statusSeenReply = 1 << 1  // IPS_SEEN_REPLY
	statusAssured   = 1 << 2  // IPS_ASSURED
	statusDNAT      = 1 << 5  // IPS_DST_NAT
	statusDying     = 1 << 9  // IPS_DYING
	statusOffload   = 1 << 14 // IPS_OFFLOAD
)

// genericLength is the length of netfilter's header, which follows netlink's
// (linux/netfilter/nfnetlink.h, struct nfgenmsg).
const (
	genericLength = 4
	headerLength  = unix.SizeofNlMsghdr + genericLength
)

// An endpoint is an address, an IPv4 one in its IPv6 form, and a port. It is compact
// since there is one for each connection.
type endpoint struct {
	addr [16]byte
	port uint16
}

func (e endpoint) address() netip.Addr { return netip.AddrFrom16(e.addr).Unmap() }

func (e endpoint) addrPort() netip.AddrPort { return netip.AddrPortFrom(e.address(), e.port) }

// A key identifies an entry by the addresses of its first packet and the kernel's
// ID. That ID depends on the entry's place in memory and its addresses
// (nf_ct_get_id in net/netfilter/nf_conntrack_core.c), so a later connection with
// the same addresses often has the same ID.
type key struct {
	id            uint32
	protocol      rules.Protocol
	client, local endpoint
}

// A record is an entry of the table, decoded from a message.
type record struct {
	key
	server, reserved endpoint // source and destination of replies
	mark, status     uint32
	accounted        bool  // Traffic is valid
	state            uint8 // of TCP or SCTP; 0: unknown
	Traffic
	// left is the time that the kernel would have kept an entry that was deleted, in
	// whole seconds; 0: it expired, or the kernel does not send it, as Linux 5.10.
	left time.Duration
	// at is the time of an event, as far as the kernel sends it, in Unix nanoseconds.
	// It sends both times only with nf_conntrack_timestamp. For the end of an entry it
	// is the time when it expired, which the kernel notices up to a minute later.
	at    int64
	start int64 // time of its first packet, likewise; 0: unknown
}

// closed reports whether it is a closed TCP connection whose entry waits for its timeout.
func (r *record) closed() bool { return r.protocol == rules.TCP && over(r.protocol, r.state) }

// decode decodes an entry from a message without its first header. It returns
// false for an entry that is neither IPv4 nor IPv6.
func decode(b []byte) (r record, ok bool) {
	if len(b) < genericLength || b[0] != unix.AF_INET && b[0] != unix.AF_INET6 {
		return record{}, false
	}
	for kind, data, rest, more := attribute(b[genericLength:]); more; kind, data, rest, more = attribute(rest) {
		switch kind {
		case ctaTupleOrig:
			r.protocol, r.client, r.local = decodeTuple(data)
		case ctaTupleReply:
			_, r.server, r.reserved = decodeTuple(data)
		case ctaStatus:
			r.status = uint32(number(data))
		case ctaMark:
			r.mark = uint32(number(data))
		case ctaID:
			r.id = uint32(number(data))
		case ctaProtoInfo:
			r.state = decodeState(data)
		case ctaTimeout:
			r.left = time.Duration(number(data)) * time.Second //nolint:gosec // a number of 32 bits
		case ctaTimestamp:
			if start, ok := find(data, ctaTimestampStart); ok {
				r.start = int64(number(start)) //nolint:gosec // until 2262
			}
			if stop, ok := find(data, ctaTimestampStop); ok {
				r.at = int64(number(stop)) //nolint:gosec // until 2262
			}
		case ctaEventTime:
			if r.at == 0 {
				r.at = int64(number(data)) //nolint:gosec // until 2262
			}
		case ctaCountersOrig:
			r.PacketsOut, r.BytesOut = decodeCounters(data)
			r.accounted = true
		case ctaCountersReply:
			r.PacketsIn, r.BytesIn = decodeCounters(data)
		}
	}
	return r, r.protocol != 0
}

func decodeTuple(b []byte) (protocol rules.Protocol, src, dst endpoint) {
	for kind, data, rest, more := attribute(b); more; kind, data, rest, more = attribute(rest) {
		for inner, value, left, ok := attribute(data); ok; inner, value, left, ok = attribute(left) {
			switch {
			case kind == ctaTupleIP && inner == ctaIPv4Src && len(value) == 4:
				src.addr = netip.AddrFrom4([4]byte(value)).As16()
			case kind == ctaTupleIP && inner == ctaIPv4Dst && len(value) == 4:
				dst.addr = netip.AddrFrom4([4]byte(value)).As16()
			case kind == ctaTupleIP && inner == ctaIPv6Src && len(value) == 16:
				src.addr = [16]byte(value)
			case kind == ctaTupleIP && inner == ctaIPv6Dst && len(value) == 16:
				dst.addr = [16]byte(value)
			case kind == ctaTupleProto && inner == ctaProtoNum:
				protocol = rules.Protocol(number(value))
			case kind == ctaTupleProto && inner == ctaProtoSrcPort:
				src.port = uint16(number(value))
			case kind == ctaTupleProto && inner == ctaProtoDstPort:
				dst.port = uint16(number(value))
			}
		}
	}
	return protocol, src, dst
}

func decodeCounters(b []byte) (packets, bytes uint64) {
	for kind, data, rest, more := attribute(b); more; kind, data, rest, more = attribute(rest) {
		switch kind {
		case ctaCountersPackets:
			packets = number(data)
		case ctaCountersBytes:
			bytes = number(data)
		}
	}
	return packets, bytes
}

// decodeState returns the state of a TCP or SCTP connection, 0 if there is none.
func decodeState(b []byte) uint8 {
	for _, protocol := range []uint16{ctaProtoInfoTCP, ctaProtoInfoSCTP} {
		if data, ok := find(b, protocol); ok {
			state, _ := find(data, ctaProtoInfoState)
			return uint8(number(state))
		}
	}
	return 0
}

// find returns the attribute of a kind among those in b.
func find(b []byte, kind uint16) (data []byte, ok bool) {
	for k, data, rest, more := attribute(b); more; k, data, rest, more = attribute(rest) {
		if k == kind {
			return data, true
		}
	}
	return nil, false
}

// attribute splits the first attribute of netlink(7) off b.
func attribute(b []byte) (kind uint16, data, rest []byte, ok bool) {
	if len(b) < unix.NLA_HDRLEN {
		return 0, nil, nil, false
	}
	length := int(binary.NativeEndian.Uint16(b))
	if length < unix.NLA_HDRLEN || length > len(b) {
		return 0, nil, nil, false
	}
	kind = binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
	aligned := min(len(b), (length+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1))
	return kind, b[unix.NLA_HDRLEN:length], b[aligned:], true
}

// number decodes a number of any length in network byte order, as in all of
// ctnetlink.
func number(b []byte) (n uint64) {
	for _, c := range b {
		n = n<<8 | uint64(c)
	}
	return n
}

// request returns a ctnetlink request for entries of every family.
func request(kind, flags uint16, sequence uint32, attributes ...[2]uint32) []byte {
	b := make([]byte, unix.SizeofNlMsghdr, headerLength+len(attributes)*(unix.NLA_HDRLEN+4))
	b = append(b, unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0)
	for _, a := range attributes {
		b = binary.NativeEndian.AppendUint16(b, unix.NLA_HDRLEN+4)
		b = binary.NativeEndian.AppendUint16(b, uint16(a[0]))
		b = binary.BigEndian.AppendUint32(b, a[1])
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], unix.NFNL_SUBSYS_CTNETLINK<<8|kind)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|flags)
	binary.NativeEndian.PutUint32(b[8:], sequence)
	return b
}

// A message is a netlink(7) message.
type message struct {
	kind     uint16
	flags    uint16
	sequence uint32
	data     []byte
}

// subsystem is the upper half of the type of ctnetlink messages.
const subsystem = unix.NFNL_SUBSYS_CTNETLINK << 8

// split splits the first message off b.
func split(b []byte) (m message, rest []byte, ok bool) {
	if len(b) < unix.SizeofNlMsghdr {
		return message{}, nil, false
	}
	length := int(binary.NativeEndian.Uint32(b))
	if length < unix.SizeofNlMsghdr || length > len(b) {
		return message{}, nil, false
	}
	m = message{
		kind:     binary.NativeEndian.Uint16(b[4:]),
		flags:    binary.NativeEndian.Uint16(b[6:]),
		sequence: binary.NativeEndian.Uint32(b[8:]),
		data:     b[unix.SizeofNlMsghdr:length],
	}
	return m, b[min(len(b), (length+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):], true
}
