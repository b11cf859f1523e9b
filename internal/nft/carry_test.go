package nft_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/nft"
)

// While the gate is shut, what arrives on the cluster side is marked, and not while it is open.
func TestGateSteers(t *testing.T) {
	eachSteering(t, long, func(g *gated) {
		for range 2 {
			g.wantMarked("shut", true)
			g.unlock()
			g.wantMarked("open", false)
			g.inRouter(g.Shut)
		}
		g.wantMarked("after Shut", true)
	})
}

// The kernel marks by itself as the permit ends.
func TestGateSteersAsPermitEnds(t *testing.T) {
	eachSteering(t, 100*time.Millisecond, func(g *gated) {
		g.inRouter(func() error { return g.Arm(long) })
		g.number++
		g.ping(g.number)
		g.reply(g.witness(), g.Sources[0], g.number)
		g.awaitReplies()
		g.until("the permit ends", func() bool { return g.left() == 0 })
		g.wantMarked("after the end of the permit", true)
	})
}

// eachSteering runs a test with each gate, which marks what arrives by eth0.
func eachSteering(t *testing.T, permit time.Duration, test func(*gated)) {
	const steer = 0x0f000000
	for name, gate := range gates(long, permit) {
		gate.Steers, gate.SteerMark, gate.SteerMask = "eth0", steer, steer
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGated(t, gate)
			if differs := g.differs(); len(differs) > 0 {
				t.Fatalf("after load: %v", differs)
			}
			test(g)
		})
	}
}

// wantMarked checks whether a packet that arrives by eth0 is marked.
func (g *gated) wantMarked(when string, want bool) {
	g.Helper()
	g.nft("add table ip seen")
	g.nft("delete table ip seen")
	g.nft("add table ip seen")
	g.nft("add chain ip seen prerouting { type filter hook prerouting priority -300 ; }")
	g.nft("add rule ip seen prerouting iifname eth0 udp dport 7 meta mark 0x0f000000 counter comment marked")
	g.nft("add rule ip seen prerouting iifname eth0 udp dport 7 meta mark 0 counter comment plain")
	h := g.handle(g.Router)
	defer h.Close()
	g.open(g.Client, lab.ClientLink, 0).send(g.link(h, "eth0").Attrs().HardwareAddr, etherTypeOf(lab.ClientAddr),
		ip(lab.ClientAddr, lab.RouterAddr, 17, []byte{0, 9, 0, 7, 0, 8, 0, 0}))
	g.until("a packet arrives", func() bool {
		for line := range strings.Lines(g.nft("list chain ip seen prerouting")) {
			if !strings.Contains(line, "counter") || strings.Contains(line, "packets 0 ") {
				continue
			}
			if marked := strings.Contains(line, `"marked"`); marked != want {
				g.Errorf("%s: marked %v, want %v", when, marked, want)
			}
			return true
		}
		return false
	})
}

// differs returns the differences of the gate.
func (g *gated) differs() (found []string) {
	g.Helper()
	g.inRouter(func() (err error) { found, err = g.Differs(); return err })
	return found
}

func aCarry() nft.Carry {
	return nft.Carry{
		Interface: "tunnel0", Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{lab.Source, netip.MustParseAddr("192.168.12.100")},
		UDP: 9468, First: 1024, Last: 22000, MSS: 1410, Mask: 0x0f000000,
		Peers: []nft.CarryPeer{
			{Address: netip.MustParseAddr("10.128.0.102"), First: 22001, Last: 40000, Mark: 0x01000000},
			{Address: netip.MustParseAddr("10.128.0.103"), First: 40001, Last: 65535, Mark: 0x02000000},
		},
	}
}

// The kernel lists what was loaded; damage and other peers are found.
func TestCarryLoads(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		c := aCarry()
		want := func(when string, is bool) {
			t.Helper()
			found, err := c.Differs()
			if err != nil || (len(found) == 0) != is {
				t.Errorf("%s: differences %v, %v", when, found, err)
			}
		}
		want("before", false)
		for range 2 {
			if err := c.Load(); err != nil {
				t.Fatal(err)
			}
			want("loaded", true)
		}
		c.Peers = c.Peers[:1]
		want("with another peer", false)
		if err := c.Load(); err != nil {
			t.Fatal(err)
		}
		want("with one peer", true)
		for range 2 {
			if err := nft.RemoveCarry(); err != nil {
				t.Fatal(err)
			}
		}
		if there, err := nft.CarryLoaded(); err != nil || there {
			t.Errorf("after removal: loaded %v, %v", there, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Ranges with a common port are refused: the holder would not know whose a reply is.
func TestCarryRefused(t *testing.T) {
	for name, change := range map[string]func(*nft.Carry){
		"no source":      func(c *nft.Carry) { c.Sources = nil },
		"IPv6":           func(c *nft.Carry) { c.Sources = []netip.Addr{lab.Source6} },
		"no range":       func(c *nft.Carry) { c.First, c.Last = 0, 0 },
		"own range":      func(c *nft.Carry) { c.Last = 22001 },
		"two of a range": func(c *nft.Carry) { c.Peers[1].First = 40000 },
		"two of a mark":  func(c *nft.Carry) { c.Peers[1].Mark = c.Peers[0].Mark },
		"twice":          func(c *nft.Carry) { c.Peers = append(slices.Clone(c.Peers), c.Peers[0]) },
		"another bit":    func(c *nft.Carry) { c.Peers[0].Mark = 0x10 },
	} {
		c := aCarry()
		change(&c)
		if err := c.Validate(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := aCarry().Validate(); err != nil {
		t.Error(err)
	}
}
