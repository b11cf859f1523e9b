package main

import (
	"bufio"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
)

// use gives the pod another backend.
func (p *pod) use(b backend) {
	p.Helper()
	_, path, _ := strings.Cut(p.path, ":")
	p.backend, p.path = b, iptablesPath(p.T, b.programs)+":"+path
}

// holders returns the backends of which the namespace holds rules of ours.
func (p *pod) holders() (held []string) {
	p.Helper()
	for _, b := range []backend{iptablesNFT, iptablesLegacy} {
		p.use(b)
		for _, program := range []string{"iptables-save", "ip6tables-save"} {
			if strings.Contains(p.tool(p.program(program)), "EGRESS-") {
				held = append(held, b.name+" "+program)
			}
		}
	}
	for line := range strings.Lines(p.nft("list tables")) {
		if table := strings.TrimSpace(line); strings.Contains(table, " egress-router") {
			held = append(held, "nftables "+table)
		}
	}
	slices.Sort(held)
	return held
}

// The backend changes, from each to each, with a list that changes too and one
// that does not: the rules of the old one are gone, those of others stay, open
// connections go on, and no packet leaves with another source meanwhile.
func TestBackendChanges(t *testing.T) {
	held := map[string]string{
		"iptables-nft":    "[iptables-nft ip6tables-save iptables-nft iptables-save nftables table ip egress-router-last]",
		"iptables-legacy": "[iptables-legacy ip6tables-save iptables-legacy iptables-save nftables table ip egress-router-last]",
		"nftables":        "[nftables table ip egress-router nftables table ip egress-router-last nftables table ip6 egress-router]",
	}
	for _, from := range backends {
		for _, to := range backends {
			if from == to {
				continue
			}
			t.Run(from.name+" to "+to.name, func(t *testing.T) {
				p := newPod(t, lab.Options{}, from)
				// A list that makes a tree with iptables.
				list := p.env["EGRESS_DESTINATION"]
				var more strings.Builder
				for port := range 40 {
					fmt.Fprintf(&more, "%d tcp 203.0.113.26 443\n", 20000+port)
				}
				p.env["EGRESS_DESTINATION"] = more.String() + list
				p.iptables("-t", "nat", "-A", "POSTROUTING", "-o", "lo", "-j", "ACCEPT")
				p.ok()
				p.wantExample()
				conn, err := p.lab.Dial(t.Context(), p.lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				w := p.watch(p.lab.Router, "macvlan0", "eth0")
				stop := p.traffic(conn)

				p.use(to)
				if r := p.ok(); !strings.Contains(r.stderr, "rules of an earlier run removed") {
					t.Errorf("the log does not say what was removed:\n%s", r.stderr)
				}
				p.wantUnchanged(p.ok())
				p.wantExample()
				p.wantAnswer("tcp", 20039, "203.0.113.26:443")
				if n := stop(); n == 0 {
					t.Error("no traffic meanwhile")
				}
				_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
				_, err = conn.Write([]byte("still there\n"))
				for r := bufio.NewReader(conn); err == nil; {
					var line string // also those that the traffic left
					if line, err = r.ReadString('\n'); line == "still there\n" {
						break
					}
				}
				if err != nil {
					t.Errorf("the open connection: %v", err)
				}
				w.wantSource()
				w.wantNothing("eth0", toServers)
				if got := fmt.Sprint(p.holders()); got != held[to.name] {
					t.Errorf("rules of ours are in %s, want %s", got, held[to.name])
				}
				p.use(from)
				if rules := p.tool(p.program("iptables-save")); !strings.Contains(rules, "-A POSTROUTING -o lo -j ACCEPT") {
					t.Errorf("another program's rule is gone:\n%s", rules)
				}
			})
		}
	}
}

// A failure after the backend has changed puts everything back.
func TestBackendChangeFails(t *testing.T) {
	p := newPod(t, lab.Options{}, iptablesNFT)
	p.ok()
	before := p.state()
	p.use(nftables)
	p.env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.26\n"
	// The kernel refuses to set an interface up whose hardware address another
	// macvlan of the NIC has. The rules are loaded by then.
	h := p.handle(p.lab.Router)
	if err := h.LinkSetDown(p.link(h, "macvlan0")); err != nil {
		t.Fatal(err)
	}
	damaged := p.state()
	mac := p.link(h, "macvlan0").Attrs().HardwareAddr
	twin := &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "twin", HardwareAddr: mac, ParentIndex: p.link(p.handle(p.lab.Node), lab.NIC).Attrs().Index}, Mode: netlink.MACVLAN_MODE_PRIVATE}
	node := p.handle(p.lab.Node)
	if err := node.LinkAdd(twin); err != nil {
		t.Fatal(err)
	}
	if err := node.LinkSetUp(twin); err != nil {
		t.Fatal(err)
	}
	r := p.run()
	if r.code != 1 || !strings.Contains(r.last(), "address already in use") || !strings.Contains(r.stderr, "everything is put back") {
		t.Errorf("exit code %d:\n%s", r.code, r.stderr)
	}
	p.use(iptablesNFT)
	p.wantState(damaged)
	if err := node.LinkDel(twin); err != nil {
		t.Fatal(err)
	}
	p.env = example()
	p.ok()
	p.wantState(before)
}

// What auto chooses.
func TestAuto(t *testing.T) {
	for _, test := range []struct {
		name    string
		command string
		prepare func(p *pod)
		backend string // as the log names it
		log     string
	}{
		{name: "iptables is there", backend: `backend="iptables v`},
		{name: "no iptables", command: "without-iptables", backend: "backend=nftables"},
		{
			name: "iptables without the programs for IPv6", backend: "backend=nftables",
			prepare: func(p *pod) {
				p.path = p.programs("exec $real \"$@\"\n")
				p.tool("rm", p.program("ip6tables-save"))
			},
		},
		{
			name: "iptables cannot read", backend: "backend=nftables", log: "iptables does not work here",
			prepare: func(p *pod) {
				p.path = p.programs("case $0 in *-save) echo 'Table does not exist' >&2; exit 3; esac\nexec $real \"$@\"\n")
			},
		},
		{
			name: "iptables cannot load", backend: "backend=nftables", log: "iptables cannot load the rules",
			prepare: func(p *pod) {
				p.path = p.programs("case $0 in *-restore) echo 'No chain/target/match by that name.' >&2; exit 1; esac\nexec $real \"$@\"\n")
			},
		},
		{
			name: "ip6tables cannot load", backend: "backend=nftables", log: "iptables cannot load the rules",
			prepare: func(p *pod) {
				p.path = p.programs("case $0 in */ip6tables-restore) echo 'No chain/target/match by that name.' >&2; exit 1; esac\nexec $real \"$@\"\n")
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPod(t, lab.Options{}, iptablesNFT)
			p.env["EGRESS_ROUTER_BACKEND"] = "auto"
			real := p.path
			if test.prepare != nil {
				test.prepare(p)
			}
			command := test.command
			if command == "" {
				command = "egress-router"
			}
			r := p.run(command)
			if r.code != 0 || !strings.Contains(r.stderr, test.log) {
				t.Errorf("exit code %d, want the log to have %q:\n%s", r.code, test.log, r.stderr)
			}
			for line := range strings.Lines(r.stderr) {
				if strings.Contains(line, "msg=ready") && !strings.Contains(line, test.backend) {
					t.Errorf("the backend is not %s: %s", test.backend, line)
				}
			}
			p.wantExample()
			again := p.run(command)
			if again.code != 0 {
				t.Errorf("the second run: exit code %d\n%s", again.code, again.stderr)
			}
			p.wantUnchanged(again)
			p.path = real
			if held := p.holders(); len(held) != 3 {
				t.Errorf("rules of ours are in %v", held)
			}
		})
	}
}

// Without a privilege over the network the reason is that, not another backend.
func TestBackendWithoutPrivilege(t *testing.T) {
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			p := newPod(t, lab.Options{}, b)
			p.wantRefusal("without-privilege", "operation not permitted", "NET_ADMIN")
		})
	}
}

// Lists that change while connections come in all the time: none is refused,
// since the rules change from the one list to the other at once.
func TestNoRefusalMeanwhile(t *testing.T) {
	eachBackend(t, lab.Options{}, func(p *pod) {
		p.ok()
		done, failed := make(chan struct{}), make(chan error)
		go func() {
			var err error
			for {
				select {
				case <-done:
					failed <- err
					return
				default:
				}
				if _, askErr := p.ask(p.lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80)); askErr != nil {
					err = askErr
				}
			}
		}()
		for range 5 {
			p.env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n81 tcp 203.0.113.26 80\n"
			p.ok()
			p.env = example()
			p.ok()
		}
		time.Sleep(20 * time.Millisecond)
		close(done)
		if err := <-failed; err != nil {
			p.Errorf("a connection that both lists redirect: %v", err)
		}
	})
}
