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
	if s.protocol == unix.IPPROTO_ICMP {
		content = make([]byte, 8+20+8)
		content[0] = s.kind
		content[8], content[8+9] = s.header, s.quoted
		binary.BigEndian.PutUint16(content[28:], s.qSource)
		binary.BigEndian.PutUint16(content[30:], s.qDest)
	}
	packet := func(offset uint16, content []byte) []byte {
		p := ip(s.from, s.to, 253, content) // without a checksum of the content, which no rule looks at
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

func sorts(t *testing.T, c nft.Carry) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	run := func(line ...string) string {
		t.Helper()
		out, err := exec.Command("nft", line...).CombinedOutput()
		if err != nil {
			t.Fatalf("nft %v: %v\n%s", line, err, out)
		}
		return string(out)
	}
	to, by := map[string]net.HardwareAddr{}, map[string]packetSocket{}
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
				to[name] = l.Attrs().HardwareAddr
				continue
			}
			s := packetSocket{t: t, index: l.Attrs().Index, mac: l.Attrs().HardwareAddr}
			if s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Close(s.fd) }()
			by[name] = s
		}
	}
	if err := c.Load(); err != nil {
		t.Fatal(err)
	}
	run("add table ip seen")
	sets := map[string]string{"whole": "", "untracked": "ct state untracked "}
	for _, p := range c.Peers {
		sets[fmt.Sprintf("mark%d", p.Mark)] = fmt.Sprintf("meta mark %d ", p.Mark)
	}
	run("add chain ip seen arrived { type filter hook prerouting priority -300 ; }")
	for name, match := range sets {
		run("add set ip seen " + name + " { typeof ip id ; flags dynamic ; size 65535 ; }")
		run("add rule ip seen arrived " + match + "update @" + name + " { ip id }")
	}
	packets := arrivals(c)
	for i, s := range packets {
		for _, f := range s.frames(uint16(i + 1)) { //nolint:gosec // fewer
			by[s.by].send(to[s.by], unix.ETH_P_IP, f)
		}
	}
	number := regexp.MustCompile(`[0-9]+`)
	listed := func(set string) map[int]bool {
		found := map[int]bool{}
		_, elements, _ := strings.Cut(run("list", "set", "ip", "seen", set), "elements")
		for _, text := range number.FindAllString(elements, -1) {
			n, _ := strconv.Atoi(text)
			found[n-1] = true
		}
		return found
	}
	dropped := regexp.MustCompile(`counter packets ([0-9]+)`)
	err = until("all packets have arrived", func() bool {
		n := len(listed("whole"))
		for _, chain := range []string{"conveyed", "conveyed-errors"} {
			for _, found := range dropped.FindAllStringSubmatch(run("list", "chain", "ip", nft.CarryTable, chain), -1) {
				count, _ := strconv.Atoi(found[1])
				n += count
			}
		}
		return n == len(packets)
	})
	if err != nil {
		t.Fatal(err)
	}
	arrived, untracked, marked := listed("whole"), listed("untracked"), map[uint32]map[int]bool{}
	for _, p := range c.Peers {
		marked[p.Mark] = listed(fmt.Sprintf("mark%d", p.Mark))
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
