package iptables_test

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// holders returns the backends in which the namespace has rules of the router.
func holders(p *labtest.Pod) (held []string) {
	p.Helper()
	for _, b := range []labtest.Backend{labtest.IptablesNFT, labtest.IptablesLegacy} {
		p.Use(b)
		for _, program := range []string{"iptables-save", "ip6tables-save"} {
			if strings.Contains(p.Tool(p.Program(program)), "EGRESS-") {
				held = append(held, b.Name+" "+program)
			}
		}
	}
	for line := range strings.Lines(p.NFT("list tables")) {
		if table := strings.TrimSpace(line); strings.Contains(table, " egress-router") {
			held = append(held, "nftables "+table)
		}
	}
	slices.Sort(held)
	return held
}

// A run with another backend removes the rules of the former one and keeps those of
// other programs. Open connections continue, and no packet leaves with another source.
func TestBackendChangeRemovesOldRules(t *testing.T) {
	t.Parallel()
	held := map[string]string{
		"iptables-nft":    "[iptables-nft ip6tables-save iptables-nft iptables-save nftables table ip egress-router-guard]",
		"iptables-legacy": "[iptables-legacy ip6tables-save iptables-legacy iptables-save nftables table ip egress-router-guard]",
		"nftables":        "[nftables table ip egress-router nftables table ip egress-router-guard nftables table ip6 egress-router]",
	}
	for _, from := range labtest.Backends {
		for _, to := range labtest.Backends {
			if from == to {
				continue
			}
			t.Run(from.Name+" to "+to.Name, func(t *testing.T) {
				t.Parallel()
				p := labtest.New(t, lab.Options{}, from)
				// The list is long enough for a tree of chains.
				list := p.Env["EGRESS_DESTINATION"]
				var more strings.Builder
				for port := range 40 {
					fmt.Fprintf(&more, "%d tcp 203.0.113.26 443\n", 20000+port)
				}
				p.Env["EGRESS_DESTINATION"] = more.String() + list
				p.Iptables("-t", "nat", "-A", "POSTROUTING", "-o", "lo", "-j", "ACCEPT")
				p.OK()
				p.WantExample()
				conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
				w := p.Watch(p.Lab.Router, "macvlan0", "eth0")
				traffic := p.Traffic(conn)

				traffic.Await(5)
				p.Use(to)
				if r := p.OK(); !strings.Contains(r.Stderr, "stale rules removed") {
					t.Errorf("stderr lacks the removal of stale rules:\n%s", r.Stderr)
				}
				p.WantUnchanged(p.OK())
				p.WantExample()
				p.WantAnswer("tcp", 20039, "203.0.113.26:443")
				traffic.Await(5)
				traffic.Stop()
				p.WantEcho("the open connection", conn, bufio.NewReader(conn))
				w.WantSource()
				w.WantNothing("eth0", labtest.ToServers)
				if got := fmt.Sprint(holders(p)); got != held[to.Name] {
					t.Errorf("backends with rules: %s, want %s", got, held[to.Name])
				}
				p.Use(from)
				if rules := p.Tool(p.Program("iptables-save")); !strings.Contains(rules, "-A POSTROUTING -o lo -j ACCEPT") {
					t.Errorf("rule of another program deleted:\n%s", rules)
				}
			})
		}
	}
}

// A failure after the backend has changed restores the rules of the former one.
func TestFailedBackendChangeRollsBack(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	p.OK()
	before := p.State()
	p.Use(labtest.Nftables)
	p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.26\n"
	// The kernel refuses to set an interface up whose hardware address another
	// macvlan of the NIC has. The rules are loaded by then.
	h := p.Handle(p.Lab.Router)
	if err := h.LinkSetDown(p.Link(h, "macvlan0")); err != nil {
		t.Fatal(err)
	}
	damaged := p.State()
	mac := p.Link(h, "macvlan0").Attrs().HardwareAddr
	twin := &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "twin", HardwareAddr: mac, ParentIndex: p.Link(p.Handle(p.Lab.Node), lab.NIC).Attrs().Index}, Mode: netlink.MACVLAN_MODE_PRIVATE}
	node := p.Handle(p.Lab.Node)
	if err := node.LinkAdd(twin); err != nil {
		t.Fatal(err)
	}
	if err := node.LinkSetUp(twin); err != nil {
		t.Fatal(err)
	}
	r := p.Exec()
	if r.Code != 1 || !strings.Contains(r.Last(), "address already in use") || !strings.Contains(r.Stderr, "changes rolled back") {
		t.Errorf("exit code %d:\n%s", r.Code, r.Stderr)
	}
	p.Use(labtest.IptablesNFT)
	p.WantState(damaged)
	if err := node.LinkDel(twin); err != nil {
		t.Fatal(err)
	}
	p.Env = labtest.Example()
	p.OK()
	p.WantState(before)
}

// EGRESS_ROUTER_BACKEND=auto uses nftables if iptables is missing or does not work.
func TestAutoChoosesBackend(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		command string
		prepare func(p *labtest.Pod)
		backend string // part of the log
		log     string
	}{
		{name: "iptables works", backend: `backend="iptables v`},
		{name: "no iptables", command: "without-iptables", backend: "backend=nftables"},
		{
			name: "no ip6tables-save", backend: "backend=nftables",
			prepare: func(p *labtest.Pod) {
				p.Path = p.Programs("exec $real \"$@\"\n")
				p.Tool("rm", p.Program("ip6tables-save"))
			},
		},
		{
			name: "iptables cannot read", backend: "backend=nftables", log: "iptables failed, using nftables",
			prepare: func(p *labtest.Pod) {
				p.Path = p.Programs("case $0 in *-save) echo 'Table does not exist' >&2; exit 3; esac\nexec $real \"$@\"\n")
			},
		},
		{
			name: "iptables cannot load", backend: "backend=nftables", log: "iptables load failed, using nftables",
			prepare: func(p *labtest.Pod) {
				p.Path = p.Programs("case $0 in *-restore) echo 'No chain/target/match by that name.' >&2; exit 1; esac\nexec $real \"$@\"\n")
			},
		},
		{
			name: "ip6tables cannot load", backend: "backend=nftables", log: "iptables load failed, using nftables",
			prepare: func(p *labtest.Pod) {
				p.Path = p.Programs("case $0 in */ip6tables-restore) echo 'No chain/target/match by that name.' >&2; exit 1; esac\nexec $real \"$@\"\n")
			},
		},
		{
			// The pod forwards before the start, so that the redirects are loaded last.
			name: "iptables cannot load redirects", backend: "backend=nftables", log: "iptables load failed, using nftables",
			prepare: func(p *labtest.Pod) {
				p.Path = p.Programs("case $0 in *-restore) in=$(cat); case $in in *'-j DNAT'*) echo 'No chain/target/match by that name.' >&2; exit 1; esac; printf '%s\\n' \"$in\" | $real \"$@\"; exit; esac\nexec $real \"$@\"\n")
				if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
					p.Fatal(err)
				}
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
			p.Env["EGRESS_ROUTER_BACKEND"] = "auto"
			real := p.Path
			if test.prepare != nil {
				test.prepare(p)
			}
			command := test.command
			if command == "" {
				command = "egress-router"
			}
			r := p.Exec(command)
			if r.Code != 0 || !strings.Contains(r.Stderr, test.log) {
				t.Errorf("exit code %d, want 0, and %q in stderr:\n%s", r.Code, test.log, r.Stderr)
			}
			for line := range strings.Lines(r.Stderr) {
				if strings.Contains(line, "msg=ready") && !strings.Contains(line, test.backend) {
					t.Errorf("the backend is not %s: %s", test.backend, line)
				}
			}
			p.WantExample()
			again := p.Exec(command)
			if again.Code != 0 {
				t.Errorf("the second run: exit code %d\n%s", again.Code, again.Stderr)
			}
			p.WantUnchanged(again)
			p.Path = real
			if held := holders(p); len(held) != 3 {
				t.Errorf("backends with rules: %v, want one with three tables", held)
			}
		})
	}
}

// Without the privilege the error names the privilege, with every backend.
func TestMissingPrivilegeIsNoBackendFault(t *testing.T) {
	t.Parallel()
	for _, b := range labtest.Backends {
		t.Run(b.Name, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, b)
			p.WantRefusal("without-privilege", "operation not permitted", "NET_ADMIN")
		})
	}
}

// No connection is refused while lists change: the rules change in one transaction.
func TestReloadRefusesNoConnection(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		done, stop := context.WithCancel(p.Context())
		var asking sync.WaitGroup
		var asked atomic.Int64
		asking.Go(func() {
			for ; done.Err() == nil; asked.Add(1) {
				if _, err := p.Ask(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80)); err != nil {
					p.Errorf("a connection that both lists redirect: %v", err)
				}
			}
		})
		for range 5 {
			p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n81 tcp 203.0.113.26 80\n"
			p.OK()
			p.Env = labtest.Example()
			p.OK()
		}
		n := asked.Load() + 10
		p.Until("clients connect", func() bool { return asked.Load() >= n })
		stop()
		asking.Wait()
	})
}
