package nft_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/nft"
)

// A sorted is a packet that arrives, by its fields. Those of an ICMP error are about another packet.
type sorted struct {
	by             string
	from, to       netip.Addr
	protocol       byte
	source, dest   uint16
	kind           byte // of ICMP
	quoted, header byte
	qSource, qDest uint16
	inFragments    bool
}

// verdict is what becomes of a packet.
type verdict struct {
	arrives, untracked bool
	mark               uint32
}

// want returns the verdict that [nft.Carry] describes.
func (s sorted) want(c nft.Carry) verdict {
	source, destination := s.source, s.dest
	carried := slices.Contains([]byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP}, s.protocol)
	if s.protocol == unix.IPPROTO_ICMP { // about a packet of the other direction
		source, destination = s.qDest, s.qSource
		carried = slices.Contains([]byte{3, 11, 12}, s.kind) && s.header == 0x45 && slices.Contains([]byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP}, s.quoted)
	}
	of := func(port uint16) (mark uint32) {
		for _, p := range c.Peers {
			if port >= p.First && port <= p.Last {
				mark = p.Mark
			}
		}
		return mark
	}
	switch toUs, fromUs := slices.Contains(c.Sources, s.to), slices.Contains(c.Sources, s.from); {
	case s.by == c.Egress && carried && toUs && of(destination) != 0:
		return verdict{true, true, of(destination)}
	case s.by != c.Interface:
		return verdict{true, false, 0}
	case carried && fromUs && of(source) != 0:
		return verdict{true, true, 0}
	case carried && toUs && destination >= c.First && destination <= c.Last:
		return verdict{true, false, 0}
	}
	return verdict{}
}

// frames returns the IP packets, with an identification.
func (s sorted) frames(id uint16) [][]byte {
	content := make([]byte, 24)
	binary.BigEndian.PutUint16(content, s.source)
	binary.BigEndian.PutUint16(content[2:], s.dest)
	if s.protocol == unix.IPPROTO_TCP {
		const dataOffset, flags = 12, 13
		content[dataOffset], content[flags] = 5<<4, s.kind
	}
	if s.protocol == unix.IPPROTO_ICMP {
		content = make([]byte, 8+20+8)
		content[0] = s.kind
		content[8], content[8+9] = s.header, s.quoted
		binary.BigEndian.PutUint16(content[28:], s.qSource)
		binary.BigEndian.PutUint16(content[30:], s.qDest)
	}
	packet := func(offset uint16, content []byte) []byte {
		checked := byte(253) // no checksum of the content, which no rule looks at, except conntrack at that of TCP
		if s.protocol == unix.IPPROTO_TCP {
			checked = s.protocol
		}
		p := ip(s.from, s.to, checked, content)
		p[9] = s.protocol
		binary.BigEndian.PutUint16(p[4:], id)
		binary.BigEndian.PutUint16(p[6:], offset)
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
		return p
	}
	if s.inFragments {
		const more = 0x2000
		return [][]byte{packet(more, content[:8]), packet(1, content[8:])}
	}
	return [][]byte{packet(0, content)}
}

// arrivals returns packets of all kinds by all ways.
func arrivals(c nft.Carry) (all []sorted) {
	server := lab.Remote[0]
	ports := []uint16{c.First, c.Last, c.Peers[0].First, c.Peers[1].Last, 80}
	for _, by := range []string{c.Cluster, c.Egress, c.Interface} {
		for _, from := range append([]netip.Addr{server}, c.Sources...) {
			for _, to := range append([]netip.Addr{server}, c.Sources...) {
				for _, source := range ports {
					for _, dest := range ports {
						s := sorted{by: by, from: from, to: to, source: source, dest: dest}
						for _, s.protocol = range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_GRE} {
							s.inFragments = s.protocol == unix.IPPROTO_UDP && from != to
							all = append(all, s)
						}
						s = sorted{by: by, from: from, to: to, protocol: unix.IPPROTO_ICMP, header: 0x45, quoted: unix.IPPROTO_TCP, qSource: source, qDest: dest}
						for _, s.kind = range []byte{0, 3, 5, 8, 11, 12} {
							all = append(all, s)
						}
						s.kind = 3
						for _, s.quoted = range []byte{unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_ICMP} {
							all = append(all, s)
						}
						s.quoted, s.header = unix.IPPROTO_TCP, 0x46
						all = append(all, s)
					}
				}
			}
		}
	}
	return all
}

// What arrives in the midst of a connection to a port of a router that is not known yet reaches no
// socket, for want of which the kernel would reset the connection; other packets do.
func TestCarrySpares(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := ns.Do(func() error { spares(t, aCarry()); return nil }); err != nil {
		t.Fatal(err)
	}
}

func spares(t *testing.T, c nft.Carry) {
	c.Peers = nil
	c.First, c.Last = 22001, 40000
	const syn, ack, rst = 1 << 1, 1 << 4, 1 << 2
	var packets []sorted
	want := map[int]bool{}
	for _, flags := range []byte{syn, syn | ack, ack, ack | rst} {
		for _, port := range []uint16{80, 1023, 1024, 22000, 22001, 40000, 40001, 65535} {
			spared := port >= 1024 && (port < c.First || port > c.Last) && flags != syn
			want[len(packets)] = !spared
			packets = append(packets, sorted{by: c.Egress, from: lab.GatewayAddr, to: c.Sources[len(packets)%2], protocol: unix.IPPROTO_TCP, source: 80, dest: port, kind: flags})
		}
	}
	s := observe(t, c, "input", "0", map[string]string{"whole": ""})
	if err := s.h.AddrAdd(s.links[c.Egress], &netlink.Addr{IPNet: &net.IPNet{IP: lab.Source.AsSlice(), Mask: net.CIDRMask(24, 32)}}); err != nil {
		t.Fatal(err)
	}
	if err := s.h.AddrAdd(s.links[c.Egress], &netlink.Addr{IPNet: &net.IPNet{IP: c.Sources[1].AsSlice(), Mask: net.CIDRMask(24, 32)}}); err != nil {
		t.Fatal(err)
	}
	s.send(packets)
	s.await(len(packets), "spare")
	arrived := s.listed("whole")
	for i, p := range packets {
		if arrived[i] != want[i] {
			t.Errorf("flags %#x to port %d: arrives %v, want %v", p.kind, p.dest, arrived[i], want[i])
		}
	}
}

// Every packet, of each way, kind, address and port, gets its verdict.
func TestCarrySorts(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := ns.Do(func() error { sorts(t, aCarry()); return nil }); err != nil {
		t.Fatal(err)
	}
}

// An observer sees the packets that a tunnel's table lets through.
type observer struct {
	t     *testing.T
	h     *netlink.Handle
	links map[string]netlink.Link
	far   map[string]packetSocket
}

// observe loads the table, in a namespace with its interfaces, and keeps the identifications of the
// packets that match later, at a hook and a priority, in sets.
func observe(t *testing.T, c nft.Carry, hook, priority string, sets map[string]string) *observer {
	t.Helper()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	o := &observer{t, h, map[string]netlink.Link{}, map[string]packetSocket{}}
	for _, name := range []string{c.Cluster, c.Egress, c.Interface} {
		a := netlink.NewLinkAttrs()
		a.Name = name
		v := netlink.NewVeth(a)
		v.PeerName = name + "-far"
		if err := h.LinkAdd(v); err != nil {
			t.Fatal(err)
		}
		for _, end := range []string{name, v.PeerName} {
			l, err := h.LinkByName(end)
			if err != nil {
				t.Fatal(err)
			}
			if err := h.LinkSetUp(l); err != nil {
				t.Fatal(err)
			}
			if end == name {
				o.links[name] = l
				continue
			}
			s := packetSocket{t: t, index: l.Attrs().Index, mac: l.Attrs().HardwareAddr}
			if s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Close(s.fd) })
			o.far[name] = s
		}
	}
	if err := c.Load(); err != nil {
		t.Fatal(err)
	}
	o.nft("add table ip seen")
	o.nft("add chain ip seen arrived { type filter hook " + hook + " priority " + priority + " ; }")
	for name, match := range sets {
		o.nft("add set ip seen " + name + " { typeof ip id ; flags dynamic ; size 65535 ; }")
		o.nft("add rule ip seen arrived " + match + "update @" + name + " { ip id }")
	}
	return o
}

func (o *observer) nft(line string) string {
	o.t.Helper()
	out, err := exec.Command("nft", line).CombinedOutput()
	if err != nil {
		o.t.Fatalf("nft %s: %v\n%s", line, err, out)
	}
	return string(out)
}

// send sends packets, whose identifications are their numbers, from 1.
func (o *observer) send(packets []sorted) {
	for i, s := range packets {
		for _, f := range s.frames(uint16(i + 1)) { //nolint:gosec // fewer
			o.far[s.by].send(o.links[s.by].Attrs().HardwareAddr, unix.ETH_P_IP, f)
		}
	}
}

// await waits until all packets were seen, or dropped by chains of the table.
func (o *observer) await(all int, chains ...string) {
	o.t.Helper()
	dropped := regexp.MustCompile(`counter packets ([0-9]+)`)
	err := until("all packets have arrived", func() bool {
		n := len(o.listed("whole"))
		for _, chain := range chains {
			for _, found := range dropped.FindAllStringSubmatch(o.nft("list chain ip "+nft.CarryTable+" "+chain), -1) {
				count, _ := strconv.Atoi(found[1])
				n += count
			}
		}
		return n == all
	})
	if err != nil {
		o.t.Fatal(err)
	}
}

// listed returns the numbers of the packets in a set, from 0.
func (o *observer) listed(set string) map[int]bool {
	found := map[int]bool{}
	_, elements, _ := strings.Cut(o.nft("list set ip seen "+set), "elements")
	for _, text := range regexp.MustCompile(`[0-9]+`).FindAllString(elements, -1) {
		n, _ := strconv.Atoi(text)
		found[n-1] = true
	}
	return found
}

func sorts(t *testing.T, c nft.Carry) {
	sets := map[string]string{"whole": "", "untracked": "ct state untracked "}
	for _, p := range c.Peers {
		sets[fmt.Sprintf("mark%d", p.Mark)] = fmt.Sprintf("meta mark %d ", p.Mark)
	}
	o := observe(t, c, "prerouting", "-300", sets)
	packets := arrivals(c)
	o.send(packets)
	o.await(len(packets), "conveyed", "conveyed-errors")
	arrived, untracked, marked := o.listed("whole"), o.listed("untracked"), map[uint32]map[int]bool{}
	for _, p := range c.Peers {
		marked[p.Mark] = o.listed(fmt.Sprintf("mark%d", p.Mark))
	}
	wrong, kinds := 0, map[verdict]int{}
	for i, s := range packets {
		got := verdict{arrives: arrived[i], untracked: untracked[i]}
		for mark, found := range marked {
			if found[i] {
				got.mark |= mark
			}
		}
		want := s.want(c)
		if kinds[want]++; got != want && wrong < 10 {
			wrong++
			t.Errorf("%+v: %+v, want %+v", s, got, want)
		}
	}
	if len(kinds) != 3+len(c.Peers) {
		t.Errorf("verdicts %v", kinds)
	}
}
