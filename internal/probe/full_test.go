package probe_test

import (
	"encoding/binary"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/sysctl"
)

// attribute returns a netlink attribute (struct nlattr in linux/netlink.h).
func attribute(kind int, parts ...[]byte) []byte {
	data := slices.Concat(parts...)
	b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofNlAttr+len(data)))
	b = append(binary.NativeEndian.AppendUint16(b, uint16(kind)), data...)
	return append(b, make([]byte, -len(b)&(unix.NLMSG_ALIGNTO-1))...)
}

// tuple returns one direction of a TCP connection (enum ctattr_tuple in
// linux/netfilter/nfnetlink_conntrack.h).
func tuple(kind int, from, to netip.AddrPort) []byte {
	const nested = unix.NLA_F_NESTED
	return attribute(nested|kind,
		attribute(nested|nl.CTA_TUPLE_IP, attribute(nl.CTA_IP_V4_SRC, from.Addr().AsSlice()), attribute(nl.CTA_IP_V4_DST, to.Addr().AsSlice())),
		attribute(nested|nl.CTA_TUPLE_PROTO, attribute(nl.CTA_PROTO_NUM, []byte{unix.IPPROTO_TCP}),
			attribute(nl.CTA_PROTO_SRC_PORT, binary.BigEndian.AppendUint16(nil, from.Port())),
			attribute(nl.CTA_PROTO_DST_PORT, binary.BigEndian.AppendUint16(nil, to.Port()))),
	)
}

// established returns the request for the entry of an established connection, whose packets
// go from one address to another one, and the answers back between two. The kernel drops
// no entry of one that has the status assured to make room for another one.
func established(from, to, back, backTo netip.AddrPort) []byte {
	const seenReply, assured, confirmed = 1 << 1, 1 << 2, 1 << 3 // enum ip_conntrack_status
	const state, nested = 3, unix.NLA_F_NESTED                   // TCP_CONNTRACK_ESTABLISHED
	body := slices.Concat([]byte{unix.AF_INET, 0, 0, 0},         // struct nfgenmsg
		tuple(nl.CTA_TUPLE_ORIG, from, to), tuple(nl.CTA_TUPLE_REPLY, back, backTo),
		attribute(nl.CTA_STATUS, binary.BigEndian.AppendUint32(nil, seenReply|assured|confirmed)),
		attribute(nl.CTA_TIMEOUT, binary.BigEndian.AppendUint32(nil, 7200)),
		attribute(nested|nl.CTA_PROTOINFO, attribute(nested|nl.CTA_PROTOINFO_TCP, attribute(nl.CTA_PROTOINFO_TCP_STATE, []byte{state}))))
	head := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	head = binary.NativeEndian.AppendUint16(head, unix.NFNL_SUBSYS_CTNETLINK<<8|nl.IPCTNL_MSG_CT_NEW)
	head = binary.NativeEndian.AppendUint16(head, unix.NLM_F_REQUEST|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	return slices.Concat(head, make([]byte, 8), body)
}

// fillTable adds connections of other hosts until the kernel's table has no room. A namespace
// has a table of its own with the limit of the machine, which it cannot change.
func fillTable(p *labtest.Pod) {
	p.Helper()
	err := p.Lab.Router.Do(func() error {
		limit, err := sysctl.ReadInt("net.netfilter.nf_conntrack_max")
		if err != nil || limit == 0 {
			p.Fatalf("limit of the table: %d, %v", limit, err)
		}
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		defer func() { _ = unix.Close(fd) }()
		to := netip.MustParseAddrPort("198.51.100.1:443")
		const firstPort, batch = 1024, 256
		for host := netip.MustParseAddr("198.18.0.1"); ; host = host.Next() {
			for port := firstPort; port < 1<<16; port += batch {
				if n, err := sysctl.ReadInt("net.netfilter.nf_conntrack_count"); err != nil || n >= limit {
					return err
				}
				var requests []byte
				for i := range batch {
					from := netip.AddrPortFrom(host, uint16(port+i))
					requests = append(requests, established(from, to, to, from)...)
				}
				if err := unix.Sendto(fd, requests, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
					return os.NewSyscallError("sendto", err)
				}
			}
		}
	})
	if err != nil {
		p.Fatal(err)
	}
}

// A full table is named by a diagnosis and by the health of a router that stays: new
// connections of clients are dropped, and cross again once there is room.
func TestDiagnoseFullTable(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 0, lab.Options{}, func(p *labtest.Pod) {
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		fillTable(p) // without a connection before: its entry would make room when it ends
		if a, err := p.Flow(53).Try(); err == nil {
			p.Errorf("a new connection with a full table got the answer %+v", a)
		}
		fromEverywhere(p, func(p *labtest.Pod, d diagnose.Diagnosis) {
			p.Helper()
			if d.OK || d.Fault != diagnose.TableFull || !strings.Contains(text(d), ": the kernel drops new connections") {
				p.Errorf("fault %q, want %q:\n%s", d.Fault, diagnose.TableFull, text(d))
			}
		})
		if _, out := p.Health(); !strings.Contains(out, "    fault: conntrack-full\n") {
			p.Errorf("health:\n%s", out)
		}
		if err := p.Lab.ForgetConnections(p.Lab.Router); err != nil {
			p.Fatal(err)
		}
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
	})
}
