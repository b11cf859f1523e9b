package router_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A fresh pod, the same again, and the state that the contract describes.
func TestInit(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		p.WantExample()
		state := p.State()
		for _, want := range []string{
			"macvlan0 up true forwards true",
			"address 192.168.12.99/24\n",
			"route default via 192.168.12.1 dev macvlan0",
			"route 192.168.12.1 dev macvlan0 scope link",
		} {
			if !strings.Contains(state, want) {
				p.Errorf("state lacks %q:\n%s", want, state)
			}
		}
		for line := range strings.Lines(state) {
			if strings.HasPrefix(line, "route default") && !strings.Contains(line, " table ") && !strings.Contains(line, "dev macvlan0") {
				p.Errorf("another default route in the main table: %s", line)
			}
		}

		p.WantUnchanged(p.OK())
		p.WantState(state)
		p.WantExample()
	})
}

// Whatever was damaged, the next run repairs it, and nothing else.
func TestDamage(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Strict()
		p.OK()
		state := p.State()
		for _, damage := range p.Damages() {
			if err := p.Damage(damage); err != nil {
				p.Errorf("%s: doing it: %v", damage.Name, err)
				continue
			}
			if p.State() == state {
				p.Errorf("%s: the damage changed nothing", damage.Name)
			}
			p.OK()
			if got := p.State(); got != state {
				p.Errorf("%s: not repaired.\n--- want\n%s--- is\n%s", damage.Name, state, got)
			}
			p.WantExample()
		}
	})
}

// Rules of other programs stay, and do not come before ours: a masquerading
// rule would choose another source address.
func TestForeignRules(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Iptables("-t", "nat", "-N", "CNI-HOSTPORT")
		p.Iptables("-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "80", "-j", "CNI-HOSTPORT")
		p.Iptables("-t", "nat", "-A", "CNI-HOSTPORT", "-p", "tcp", "-j", "DNAT", "--to-destination", "203.0.113.27:9000")
		p.Iptables("-t", "nat", "-A", "POSTROUTING", "-o", "macvlan0", "-j", "SNAT", "--to-source", "192.168.12.77")
		p.Iptables("-t", "nat", "-N", "EGRESS-MYLOG") // not a name of ours
		foreign := []string{
			":EGRESS-MYLOG -\n",
			"-A PREROUTING -p tcp -m tcp --dport 80 -j CNI-HOSTPORT\n",
			"-A CNI-HOSTPORT -p tcp -j DNAT --to-destination 203.0.113.27:9000\n",
			"-A POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.77\n",
		}
		p.OK()
		p.WantExample()

		// And again when they get in front afterwards.
		p.Iptables("-t", "nat", "-I", "POSTROUTING", "-o", "macvlan0", "-j", "SNAT", "--to-source", "192.168.12.77")
		p.OK()
		p.WantExample()
		p.WantUnchanged(p.OK())
		state := p.State()
		for _, rule := range foreign {
			if !strings.Contains(state, rule) {
				p.Errorf("a foreign rule is gone: %s", rule)
			}
		}
	})
}

// Changed destinations take effect, in one step.
func TestChangedDestinations(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		p.Env["EGRESS_DESTINATION"] = "81 tcp 203.0.113.26 80\n"
		p.OK()
		p.WantAnswer("tcp", 81, "203.0.113.26:80")
		p.WantRefused("tcp", 8080)
		p.WantRefused("udp", 53)
	})
}

// Without a length the address is /32, and everything goes by the gateway.
func TestSourceWithoutLength(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_SOURCE"] = "192.168.12.99"
		p.OK()
		p.WantExample()
		if state := p.State(); !strings.Contains(state, "address 192.168.12.99/32\n") {
			p.Errorf("the address is not /32:\n%s", state)
		}
		p.WantUnchanged(p.OK())
	})
}

// The lengths at both ends of what is accepted.
func TestSourceLengths(t *testing.T) {
	t.Parallel()
	for _, length := range []string{"/0", "/8", "/31"} {
		t.Run(length, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
			p.Env["EGRESS_SOURCE"] = "192.168.12.99" + length
			p.OK()
			p.WantExample()
			p.WantUnchanged(p.OK())
		})
	}
}

func TestNoFallback(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25"
		p.OK()
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
		p.WantRefused("tcp", 9000)
		p.WantRefused("udp", 80)
	})
}

// The local port is one of the protocol written: the same port of the other
// protocol goes to the fallback.
func TestUDP(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "5353 udp 203.0.113.25 53\n203.0.113.27"
		p.OK()
		p.WantAnswer("udp", 5353, "203.0.113.25:53")
		p.WantAnswer("udp", 53, "203.0.113.27:53")
	})
}

// Only comments: nothing is redirected, whatever leaves has the address.
func TestOnlyComments(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	p.Env["EGRESS_DESTINATION"] = "# 80 tcp 203.0.113.25\n"
	r := p.OK()
	if !strings.Contains(r.Stderr, "nothing is redirected") {
		t.Errorf("no warning:\n%s", r.Stderr)
	}
	p.WantRefused("tcp", 80)
	if !strings.Contains(p.State(), "-A EGRESS-POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99\n") {
		t.Errorf("no source rule:\n%s", p.State())
	}
}

// A list from a file, larger than an environment variable can be.
func TestDestinationFile(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		var list strings.Builder
		for port := 10001; port <= 20000; port++ {
			fmt.Fprintf(&list, "%d tcp 203.0.113.26 443\n", port)
		}
		file := filepath.Join(p.TempDir(), "destinations")
		if err := os.WriteFile(file, []byte(list.String()), 0o600); err != nil {
			p.Fatal(err)
		}
		delete(p.Env, "EGRESS_DESTINATION")
		p.Env["EGRESS_DESTINATION_FILE"] = file
		p.OK()
		p.WantAnswer("tcp", 10001, "203.0.113.26:443")
		p.WantAnswer("tcp", 20000, "203.0.113.26:443")
		p.WantRefused("tcp", 20001)
		p.WantUnchanged(p.OK())
	})
}

func TestInterfaceNames(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{MacvlanName: "net1", ClusterName: "net0"}, func(p *labtest.Pod) {
		p.Env["EGRESS_INTERFACE"], p.Env["EGRESS_CLUSTER_INTERFACE"] = "net1", "net0"
		p.OK()
		p.WantExample()
		p.WantUnchanged(p.OK())
	})
}

// A CNI's own address in the same subnet neither breaks the reserved one nor is
// it a source, for redirected traffic or for sockets of the pod.
func TestOtherAddress(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, address string
		up            bool
	}{
		{"same subnet, up", "192.168.12.50/24", true},
		{"same subnet, down", "192.168.12.50/24", false},
		{"wider subnet", "192.168.12.50/16", true},
		{"single address", "192.168.12.50/32", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
			h := p.Handle(p.Lab.Router)
			macvlan := p.Link(h, "macvlan0")
			other, err := netlink.ParseAddr(test.address)
			if err != nil {
				t.Fatal(err)
			}
			if err := h.AddrAdd(macvlan, other); err != nil {
				t.Fatal(err)
			}
			if test.up {
				if err := h.LinkSetUp(macvlan); err != nil {
					t.Fatal(err)
				}
			}
			p.OK()
			p.WantExample()
			for _, server := range []string{"192.168.12.80:80", "203.0.113.25:80"} {
				a, err := p.Ask(p.Lab.Router, "tcp", netip.MustParseAddrPort(server))
				if err != nil {
					t.Error(err)
				} else if a.Peer.Addr() != lab.Source {
					t.Errorf("%s saw a socket of the pod as %s", server, a.Peer)
				}
			}
			p.WantUnchanged(p.OK())
			// The reserved address outlives the other one.
			if err := h.AddrDel(macvlan, other); err != nil {
				t.Fatal(err)
			}
			if state := p.State(); !strings.Contains(state, "address 192.168.12.99/24\n") {
				t.Errorf("the reserved address went with the other one:\n%s", state)
			}
			p.OK()
			p.WantExample()
		})
	}
}

// The network is told in both forms, reply first, and a neighbour that has the
// address at another node's hardware address learns the new one.
func TestAnnouncement(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	old := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	if err := p.Lab.SetStaleNeighbour(p.Lab.Outside, lab.LANLink, lab.Source, old); err != nil {
		t.Fatal(err)
	}
	capture, err := p.Lab.Capture(p.Lab.Outside, lab.LANLink)
	if err != nil {
		t.Fatal(err)
	}
	p.OK()
	var forms []uint16
	ctx, cancel := context.WithTimeout(t.Context(), labtest.Patience)
	defer cancel()
	if _, err := capture.Wait(ctx, func(f lab.Frame) bool {
		a, ok := f.ARP()
		return ok && a.Announces() && a.Op == 1
	}); err != nil {
		t.Errorf("waiting for the request form: %v", err)
	}
	if err := capture.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, f := range capture.Frames() {
		if a, ok := f.ARP(); ok && a.Announces() && a.SenderIP == lab.Source {
			forms = append(forms, a.Op)
		}
	}
	if fmt.Sprint(forms) != "[2 1]" {
		t.Errorf("announcements by ARP opcode: %v, want a reply (2), then a request (1)", forms)
	}

	h := p.Handle(p.Lab.Router)
	macvlan := p.Link(h, "macvlan0")
	got, err := p.Lab.Neighbour(p.Lab.Outside, lab.LANLink, lab.Source)
	if err != nil || got.String() != macvlan.Attrs().HardwareAddr.String() {
		t.Errorf("the neighbour has %s (%v), want %s", got, err, macvlan.Attrs().HardwareAddr)
	}
}

// A proxy's init container sets up the network and keeps the physical network
// out: nothing is translated or forwarded, and the destinations are not read.
func TestProxyModes(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"http-proxy", "dns-proxy"} {
		t.Run(mode, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				p.Env["EGRESS_ROUTER_MODE"] = mode
				p.Env["EGRESS_DESTINATION"] = "not a destination"
				p.OK()
				state := p.State()
				for _, want := range []string{"macvlan0 up true forwards false", "address 192.168.12.99/24\n", "route default via 192.168.12.1 dev macvlan0"} {
					if !strings.Contains(state, want) {
						p.Errorf("state lacks %q:\n%s", want, state)
					}
				}
				for _, never := range []string{"SNAT", "DNAT", "snat", "dnat", "MARK"} {
					if strings.Contains(p.Rules(), never) {
						p.Errorf("the rules have %s:\n%s", never, p.Rules())
					}
				}
				a, err := p.Ask(p.Lab.Router, "tcp", netip.MustParseAddrPort("203.0.113.25:80"))
				if err != nil || a.Peer.Addr() != lab.Source {
					p.Errorf("a socket of the pod: answer %v, error %v; want to be seen as %s", a, err, lab.Source)
				}
				p.WantUnchanged(p.OK())
			})
		})
	}
}

// While the router starts, and clients try all the time, no packet for a server
// leaves by another interface or with another source. Forwarding is on from the
// start, so that nothing but the order of changes can hold one back.
func TestNeverAnotherSource(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
			p.Fatal(err)
		}
		outside, err := p.Lab.Capture(p.Lab.Outside, lab.LANLink)
		if err != nil {
			p.Fatal(err)
		}
		cluster, err := p.Lab.Capture(p.Lab.Router, "eth0")
		if err != nil {
			p.Fatal(err)
		}
		done, stop := context.WithCancel(p.Context())
		var asking sync.WaitGroup
		var asked atomic.Int64
		for _, port := range []uint16{80, 8080, 9000} {
			asking.Go(func() {
				for ; done.Err() == nil; asked.Add(1) {
					ctx, cancel := context.WithTimeout(done, 20*time.Millisecond)
					_, _ = p.Lab.Ask(ctx, p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, port))
					cancel()
				}
			})
		}
		more := func() {
			p.Helper()
			n := asked.Load() + 10
			p.Until("clients try", func() bool { return asked.Load() >= n })
		}
		more()
		p.OK()
		for range 3 { // and while destinations change
			p.Env["EGRESS_DESTINATION"] = "9000 tcp 203.0.113.27\n80 tcp 203.0.113.26\n"
			p.OK()
			p.Env = labtest.Example()
			p.OK()
		}
		more()
		stop()
		asking.Wait()
		for _, c := range []*lab.Capture{outside, cluster} {
			if err := c.Stop(); err != nil {
				p.Fatal(err)
			}
		}
		remote := netip.MustParsePrefix("203.0.113.0/24")
		seen := 0
		for _, f := range outside.Frames() {
			if ip, ok := f.IPv4(); ok && !f.Outgoing && remote.Contains(ip.Dst.Addr()) {
				seen++
				if ip.Src.Addr() != lab.Source {
					p.Errorf("on the physical network: %s", f)
				}
			}
		}
		for _, f := range cluster.Frames() {
			if ip, ok := f.IPv4(); ok && f.Outgoing && remote.Contains(ip.Dst.Addr()) {
				p.Errorf("back on the cluster network: %s", f)
			}
		}
		if seen == 0 {
			p.Errorf("none of %d requests reached the physical network", asked.Load())
		}
	})
}

// A connection that is open when the router runs again stays open.
func TestOpenConnectionSurvives(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		r := bufio.NewReader(conn)
		if _, err := lab.ReadAnswer(r); err != nil {
			p.Fatal(err)
		}
		p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n8081 tcp 203.0.113.26 80\n"
		p.OK()
		p.WantEcho("the open connection", conn, r)
	})
}
