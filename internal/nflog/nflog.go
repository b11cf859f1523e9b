// Package nflog reads the packets that rules log to a group of nfnetlink_log: the
// target NFLOG of iptables, the log statement of nftables.
package nflog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/wording"
)

// A Packet is a logged packet.
type Packet struct {
	Prefix   string // of the rule
	In, Out  string // names of the interfaces; empty: none at the rule's hook
	Protocol string // name, or number if it has no name here
	// The ports are zero for protocols other than TCP, UDP and SCTP, and for fragments after
	// the first.
	Source, Destination netip.AddrPort
}

// A Log is a subscription to a group in one network namespace.
type Log struct{ conn *netlink.Conn }

// A KernelError reports that packets cannot be logged.
type KernelError struct {
	Group uint16
	Err   error
}

func (e *KernelError) Error() string {
	return fmt.Sprintf("bind to nflog group %d: %v", e.Group, e.Err)
}

// Unwrap returns the kernel's error.
func (e *KernelError) Unwrap() error { return e.Err }

// Hint returns advice for the user.
func (e *KernelError) Hint(wording.Names) string {
	if errors.Is(e.Err, unix.EPERM) { // both have this error (nfulnl_recv_config)
		return "reading logged packets requires the capability NET_ADMIN, and no other program of the pod that reads this group, such as a second router"
	}
	return "the kernel lacks nfnetlink_log, or the module is not loaded: modprobe nfnetlink_log on the node"
}

// Numbers of nfnetlink_log (linux/netfilter/nfnetlink_log.h).
const (
	messagePacket = 0 // NFULNL_MSG_PACKET
	messageConfig = 1 // NFULNL_MSG_CONFIG

	configCommand   = 1 // NFULA_CFG_CMD
	configMode      = 2 // NFULA_CFG_MODE
	configThreshold = 5 // NFULA_CFG_QTHRESH
	commandBind     = 1 // NFULNL_CFG_CMD_BIND
	copyPacket      = 2 // NFULNL_COPY_PACKET

	attributeIn      = 4  // NFULA_IFINDEX_INDEV
	attributeOut     = 5  // NFULA_IFINDEX_OUTDEV
	attributePayload = 9  // NFULA_PAYLOAD
	attributePrefix  = 10 // NFULA_PREFIX
)

// headerBytes is the part of a packet that the kernel copies: enough for the longest
// IPv4 header and the ports. The content of a packet is not read.
const headerBytes = 64

// genericLength is the length of netfilter's header before the attributes
// (linux/netfilter/nfnetlink.h, struct nfgenmsg).
const genericLength = 4

// Open subscribes to a group in the network namespace of the calling thread. A group
// has one reader.
func Open(group uint16) (*Log, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, &KernelError{group, err}
	}
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.Uint8(configCommand, commandBind)
	e.Bytes(configMode, append(binary.BigEndian.AppendUint32(nil, headerBytes), copyPacket, 0))
	e.Uint32(configThreshold, 1) // do not wait for more packets
	attributes, err := e.Encode()
	if err == nil {
		_, err = conn.Execute(netlink.Message{
			Header: netlink.Header{
				Type:  netlink.HeaderType(unix.NFNL_SUBSYS_ULOG<<8 | messageConfig),
				Flags: netlink.Request | netlink.Acknowledge,
			},
			Data: append(binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}, group), attributes...),
		})
	}
	if err != nil {
		if op, ok := errors.AsType[*netlink.OpError](err); ok {
			err = op.Err
		}
		return nil, errors.Join(&KernelError{group, err}, conn.Close())
	}
	return &Log{conn}, nil
}

// Run calls fn for each packet until ctx ends, and closes the Log.
func (l *Log) Run(ctx context.Context, fn func(Packet)) error {
	stop := context.AfterFunc(ctx, func() { _ = l.conn.Close() })
	defer func() {
		if stop() {
			_ = l.conn.Close()
		}
	}()
	for {
		messages, err := l.conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS): // some packets are missing
			continue
		case err != nil:
			return fmt.Errorf("read logged packets: %w", err)
		}
		for _, m := range messages {
			if m.Header.Type != netlink.HeaderType(unix.NFNL_SUBSYS_ULOG<<8|messagePacket) || len(m.Data) < genericLength {
				continue
			}
			if p, err := decode(m.Data[genericLength:], interfaceName); err == nil {
				fn(p)
			}
		}
	}
}

// interfaceName returns the name of an interface, or its index if it is gone.
func interfaceName(index uint32) string {
	if i, err := net.InterfaceByIndex(int(index)); err == nil {
		return i.Name
	}
	return strconv.Itoa(int(index))
}

// decode decodes the attributes of a message.
func decode(attributes []byte, name func(index uint32) string) (Packet, error) {
	var p Packet
	d, err := netlink.NewAttributeDecoder(attributes)
	if err != nil {
		return p, err
	}
	d.ByteOrder = binary.BigEndian
	for d.Next() {
		switch d.Type() {
		case attributePrefix:
			p.Prefix = d.String()
		case attributeIn:
			p.In = name(d.Uint32())
		case attributeOut:
			p.Out = name(d.Uint32())
		case attributePayload:
			p.decodeIP(d.Bytes())
		}
	}
	return p, d.Err()
}

// protocolNames are the protocols of the router and the commonest others.
var protocolNames = map[byte]string{
	unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp",
	unix.IPPROTO_ICMPV6: "icmpv6", unix.IPPROTO_SCTP: "sctp",
}

// decodeIP decodes an IPv4 header (RFC 791) or IPv6 header (RFC 8200) and the ports
// behind it. Extension headers of IPv6 are not decoded.
func (p *Packet) decodeIP(b []byte) {
	var protocol byte
	var source, destination netip.Addr
	var rest []byte
	first := true // not a later fragment
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		protocol = b[9]
		source, destination = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		first = binary.BigEndian.Uint16(b[6:])&0x1fff == 0
		rest = b[min(len(b), int(b[0]&0xf)*4):]
	case len(b) >= 40 && b[0]>>4 == 6:
		protocol = b[6]
		source, destination = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		rest = b[40:]
	default:
		return
	}
	var from, to uint16
	if (protocol == unix.IPPROTO_TCP || protocol == unix.IPPROTO_UDP || protocol == unix.IPPROTO_SCTP) && first && len(rest) >= 4 {
		from, to = binary.BigEndian.Uint16(rest), binary.BigEndian.Uint16(rest[2:])
	}
	p.Source, p.Destination = netip.AddrPortFrom(source, from), netip.AddrPortFrom(destination, to)
	p.Protocol = protocolNames[protocol]
	if p.Protocol == "" {
		p.Protocol = strconv.Itoa(int(protocol))
	}
}
