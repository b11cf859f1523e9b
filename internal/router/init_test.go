package router_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A run configures a fresh pod as the contract describes. The next run changes
// nothing.
func TestInitConfiguresPod(t *testing.T) {
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

// plan --kernel finds each damage and prints what the next run then does, which repairs it and
// changes nothing else.
func TestInitRepairsDamage(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Strict()
		p.OK()
		state := p.State()
		for _, damage := range p.Share(0, p.Damages()) {
			if err := p.Damage(damage); err != nil {
				p.Errorf("damage %q: %v", damage.Name, err)
				continue
			}
			damaged := p.State()
			if damaged == state {
				p.Errorf("damage %q changes nothing", damage.Name)
			}
			text := missingStepsOf(p, damaged)
			if strings.Contains(text, nothingMissing) {
				p.Errorf("damage %q: nothing is missing", damage.Name)
			}
			done := loggedSteps(p.T, p.OK().Stderr)
			for _, step := range networkSteps(text) {
				if !slices.Contains(done, step) {
					p.Errorf("damage %q: step %q was not taken, but %q", damage.Name, step, done)
				}
			}
			if text := missingStepsOf(p, state); !strings.Contains(text, nothingMissing) || p.Failed() {
				p.Fatalf("after the repair of %q:\n%s", damage.Name, text)
			}
			p.WantExample()
		}
	})
}

// Rules of other programs stay, behind ours: a masquerading rule in front would
// choose another source address.
func TestForeignRulesStay(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Iptables("-t", "nat", "-N", "CNI-HOSTPORT")
		p.Iptables("-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "80", "-j", "CNI-HOSTPORT")
		p.Iptables("-t", "nat", "-A", "CNI-HOSTPORT", "-p", "tcp", "-j", "DNAT", "--to-destination", "203.0.113.27:9000")
		p.Iptables("-t", "nat", "-A", "POSTROUTING", "-o", "macvlan0", "-j", "SNAT", "--to-source", "192.168.12.77")
		p.Iptables("-t", "nat", "-N", "EGRESS-MYLOG") // no chain of the router
		foreign := []string{
			":EGRESS-MYLOG -\n",
			"-A PREROUTING -p tcp -m tcp --dport 80 -j CNI-HOSTPORT\n",
			"-A CNI-HOSTPORT -p tcp -j DNAT --to-destination 203.0.113.27:9000\n",
			"-A POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.77\n",
		}
		p.OK()
		p.WantExample()

		// The next run repairs the order.
		p.Iptables("-t", "nat", "-I", "POSTROUTING", "-o", "macvlan0", "-j", "SNAT", "--to-source", "192.168.12.77")
		p.OK()
		p.WantExample()
		p.WantUnchanged(p.OK())
		state := p.State()
		for _, rule := range foreign {
			if !strings.Contains(state, rule) {
				p.Errorf("rule of another program deleted: %s", rule)
			}
		}
	})
}

// The next run replaces the redirects by those of a changed list.
func TestChangedDestinationsTakeEffect(t *testing.T) {
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

// EGRESS_SOURCE without a length gives the interface a /32, and all traffic uses
// the gateway.
func TestSourceWithoutLengthIsSlash32(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_SOURCE"] = "192.168.12.99"
		p.OK()
		p.WantExample()
		if state := p.State(); !strings.Contains(state, "address 192.168.12.99/32\n") {
			p.Errorf("state lacks the address with /32:\n%s", state)
		}
		p.WantUnchanged(p.OK())
	})
}

// The shortest and longest lengths of EGRESS_SOURCE work.
func TestSourceLengthsAtLimits(t *testing.T) {
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

// Without a fallback line the pod refuses ports that no line names.
func TestNoFallbackRefusesOtherPorts(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25"
		p.OK()
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
		p.WantRefused("tcp", 9000)
		p.WantRefused("udp", 80)
	})
}

// A line redirects the port of its protocol. The same port of the other protocol
// uses the fallback.
func TestUDPPortIsNotTCPPort(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "5353 udp 203.0.113.25 53\n203.0.113.27"
		p.OK()
		p.WantAnswer("udp", 5353, "203.0.113.25:53")
		p.WantAnswer("udp", 53, "203.0.113.27:53")
	})
}

// A list of comments redirects nothing, and traffic still leaves with the reserved
// address.
func TestOnlyCommentsRedirectsNothing(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	p.Env["EGRESS_DESTINATION"] = "# 80 tcp 203.0.113.25\n"
	r := p.OK()
	if !strings.Contains(r.Stderr, "nothing is redirected") {
		t.Errorf("stderr lacks a warning:\n%s", r.Stderr)
	}
	p.WantRefused("tcp", 80)
	if !strings.Contains(p.State(), "-A EGRESS-POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99\n") {
		t.Errorf("state lacks the source rule:\n%s", p.State())
	}
}

// A file can hold a list that is too large for an environment variable. Its redirects are
// loaded while the answer to the probe for the address may come, behind rules that close the
// pod.
func TestDestinationFileOf10000Lines(t *testing.T) {
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
		log := p.OK().Stderr
		if up, loaded := strings.Index(log, "set macvlan0 up"), strings.Index(log, "rules loaded"); up < 0 || loaded < up {
			p.Errorf("the redirects were not loaded behind the probe:\n%s", log)
		}
		p.WantAnswer("tcp", 10001, "203.0.113.26:443")
		p.WantAnswer("tcp", 20000, "203.0.113.26:443")
		p.WantRefused("tcp", 20001)
		p.WantUnchanged(p.OK())
	})
}

// The two interfaces can have other names.
func TestInterfacesWithOtherNames(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{MacvlanName: "net1", ClusterName: "net0"}, func(p *labtest.Pod) {
		p.Env["EGRESS_INTERFACE"], p.Env["EGRESS_CLUSTER_INTERFACE"] = "net1", "net0"
		p.OK()
		p.WantExample()
		p.WantUnchanged(p.OK())
	})
}

// A CNI plugin's own address in the same subnet does not break the reserved one.
// Neither redirected traffic nor sockets of the pod use it as their source.
func TestOtherAddressIsNoSource(t *testing.T) {
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
			capture := captureMacvlan(p)
			p.OK()
			p.WantExample()
			for _, server := range []string{"192.168.12.80:80", "203.0.113.25:80"} {
				a, err := p.Ask(p.Lab.Router, "tcp", netip.MustParseAddrPort(server))
				if err != nil {
					t.Error(err)
				} else if a.Peer.Addr() != lab.Source {
					t.Errorf("%s saw a socket of the pod as %s, want %s", server, a.Peer, lab.Source)
				}
			}
			p.WantUnchanged(p.OK())
			asked := false
			for _, f := range capture.Frames() {
				if a, ok := f.ARP(); ok && f.Outgoing && !a.Announces() && a.SenderIP != netip.IPv4Unspecified() {
					if asked = true; a.SenderIP != lab.Source {
						t.Errorf("ARP from %s, want %s: %s", a.SenderIP, lab.Source, f)
					}
				}
			}
			if !asked {
				t.Error("no ARP request or reply has left")
			}
			// The reserved address stays when the other one is deleted.
			if err := h.AddrDel(macvlan, other); err != nil {
				t.Fatal(err)
			}
			if state := p.State(); !strings.Contains(state, "address 192.168.12.99/24\n") {
				t.Errorf("state lacks the reserved address, after the other one was deleted:\n%s", state)
			}
			p.OK()
			p.WantExample()
		})
	}
}

// The router announces the address in both forms, reply first. A neighbour that has
// another node's hardware address for it learns the new one.
func TestAnnouncementUpdatesNeighbour(t *testing.T) {
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

// The init container of a proxy configures the network and drops packets from the
// physical network. It translates and forwards nothing, and does not read the
// destinations.
func TestProxyModesOnlyConfigureNetwork(t *testing.T) {
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
				// Connections are marked, packets are not.
				for _, never := range []string{"SNAT", "DNAT", "snat", "dnat", "-j MARK", "meta mark set"} {
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

// While the router starts, and clients connect without pause, no packet for a
// server leaves by another interface or with another source. Forwarding is on from
// the start, so only the order of changes prevents it.
func TestStartNeverLeaksOtherSource(t *testing.T) {
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
		for range 3 { // destinations change
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
					p.Errorf("frame on the physical network without the source %s: %s", lab.Source, f)
				}
			}
		}
		for _, f := range cluster.Frames() {
			if ip, ok := f.IPv4(); ok && f.Outgoing && remote.Contains(ip.Dst.Addr()) {
				p.Errorf("frame sent back to the cluster network: %s", f)
			}
		}
		if seen == 0 {
			p.Errorf("%d requests, none of which reached the physical network", asked.Load())
		}
	})
}

// A connection stays open when the router runs again.
func TestOpenConnectionSurvivesNextRun(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		conn, r := p.Open(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
		p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n8081 tcp 203.0.113.26 80\n"
		p.OK()
		p.WantEcho("the open connection", conn, r)
	})
}

// A destination that no external server can have is a warning with its line, and the
// other lines redirect. Connections to the reserved address end in the pod.
func TestUnreachableDestinationsAreWarnings(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = "# first\n80 tcp 127.0.0.1\n8080 tcp 203.0.113.26 80\n8081 tcp 192.168.12.99\n8082 udp 192.168.12.255\n224.0.0.1\n"
		r := p.OK()
		for _, want := range []string{
			"EGRESS_DESTINATION line 2: 127.0.0.1 is a loopback address: connections redirected to it fail",
			"EGRESS_DESTINATION line 4: 192.168.12.99 is the reserved address: connections redirected to it end in the pod",
			"EGRESS_DESTINATION line 5: 192.168.12.255 is the broadcast address of 192.168.12.0/24: connections redirected to it fail",
			"EGRESS_DESTINATION line 6: 224.0.0.1 is a multicast address: connections redirected to it fail",
		} {
			if !strings.Contains(r.Stderr, `level=WARN msg="configuration warning" warning="`+want+`"`) {
				p.Errorf("no warning %q:\n%s", want, r.Stderr)
			}
		}
		p.WantAnswer("tcp", 8080, "203.0.113.26:80")
		p.Serve(p.Lab.Router, "tcp", "192.168.12.99:8081")
		if a, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8081)); err != nil || a.Server.String() != "192.168.12.99:8081" {
			p.Errorf("%v answered, %v; want the pod itself", a, err)
		}
		p.WantUnchanged(p.OK())
	})
}
