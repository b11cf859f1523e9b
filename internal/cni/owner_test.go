package cni_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/cni"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// A runtime calls DEL also after an ADD that was refused. It leaves what is not of that
// attachment: the router of another one, the interface of another plugin, and the router of
// a container.
func TestDelLeavesOthers(t *testing.T) {
	t.Parallel()
	for _, b := range labtest.Backends {
		testDelLeavesOthers(t, b)
	}
}

// testDelLeavesOthers tests it with a backend of the container's router.
func testDelLeavesOthers(t *testing.T, b labtest.Backend) {
	for name, make := range map[string]func(p *pod){
		"router of another attachment": func(p *pod) {
			p.add()
			delete(p.Conf, "prevResult")
			p.Vars["CNI_IFNAME"] = "net2"
		},
		"interface of another plugin": func(p *pod) {
			p.addEarlier("192.168.12.99/24")
		},
		"earlier plugin's interface, with a router of a container": func(p *pod) {
			p.addEarlier("192.168.12.99/24")
			p.OK()
			p.Conf["cniVersion"], p.Conf["prevResult"] = "1.1.0", p.earlier()
		},
		"router of a container": func(p *pod) {
			p.addEarlier()
			p.OK()
			p.Vars["CNI_IFNAME"] = "net1"
		},
	} {
		if b != labtest.Nftables && !strings.Contains(name, "container") {
			continue
		}
		t.Run(name+", "+b.Name, func(t *testing.T) {
			t.Parallel()
			p := newPodWith(t, lab.Options{}, b)
			make(p)
			before := p.before()
			if r := p.call("ADD"); r.Code != cni.CodeInterface && r.Code != cni.CodeOther {
				p.Errorf("ADD: error %d %s", r.Code, r.Msg)
			}
			p.wantBefore("after ADD", before)
			for _, ifname := range []string{p.Vars["CNI_IFNAME"], "net7"} {
				p.Vars["CNI_IFNAME"] = ifname
				p.del()
				p.wantBefore("after DEL of "+ifname, before)
			}
		})
	}
}

// addEarlier makes the egress interface as an earlier plugin of a list does.
func (p *pod) addEarlier(addresses ...string) {
	p.Helper()
	p.AddMacvlan(p.Lab.Router, "macvlan0", lab.NIC, netlink.MACVLAN_MODE_PRIVATE)
	h := p.Handle(p.Lab.Router)
	l := p.Link(h, "macvlan0")
	err := h.LinkSetUp(l)
	for _, a := range addresses {
		if err == nil {
			err = h.AddrAdd(l, labtest.Addr(a))
		}
	}
	if err != nil {
		p.Fatal(err)
	}
}

// earlier returns the result of that plugin.
func (p *pod) earlier() map[string]any {
	return map[string]any{
		"cniVersion": "1.1.0",
		"interfaces": []any{map[string]any{"name": "macvlan0", "mac": p.macvlan().HardwareAddr.String(), "sandbox": p.Vars["CNI_NETNS"]}},
		"ips":        []any{map[string]any{"address": "192.168.12.99/24", "gateway": "192.168.12.1", "interface": 0}},
	}
}

// DEL leaves the addresses that an earlier plugin had given to its interface, and its alias,
// and removes the others, whatever the configuration is by then.
func TestChainedDelLeavesAddressesOfBefore(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{}, {IPv6: true}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			t.Parallel()
			p := newPod(t, o)
			p.addEarlier("192.168.12.99/24")
			h := p.Handle(p.Lab.Router)
			if err := h.LinkSetAlias(p.Link(h, "macvlan0"), "of  another"); err != nil {
				t.Fatal(err)
			}
			before := p.before()
			p.ip()["addresses"] = append(p.ip()["addresses"].([]string), "192.168.12.98/24")
			for _, change := range []func(cmd *exec.Cmd){
				func(*exec.Cmd) {},
				func(cmd *exec.Cmd) { cmd.Stdin = strings.NewReader("\x00{") },
				func(cmd *exec.Cmd) {
					p.ip()["addresses"] = []string{"192.168.12.97/24"}
					cmd.Stdin = strings.NewReader(p.stdin())
				},
			} {
				p.Conf["cniVersion"] = "1.1.0"
				p.Conf["prevResult"] = p.earlier()
				p.add()
				p.WantExample()
				p.ok("CHECK")
				cmd := p.command("DEL", p.stdin())
				change(cmd)
				if r := p.run(p.Lab.Node, cmd); r.Result.Code != 0 {
					p.Errorf("DEL: %s", r.Stderr)
				}
				p.wantBefore("after DEL", before)
				if alias := p.macvlan().Alias; alias != "of  another" {
					t.Errorf("alias %q", alias)
				}
			}
		})
	}
}

// A namespace that forwarded before ADD does so after DEL, and one that did not does not.
func TestDelLeavesForwarding(t *testing.T) {
	t.Parallel()
	const ipv4, ipv6 = "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"
	for n, test := range []struct {
		name string
		on   []string // before ADD
		o    lab.Options
	}{
		{"none", nil, lab.Options{IPv6: true}},
		{"IPv4", []string{ipv4}, lab.Options{}},
		{"IPv4 alone", []string{ipv4}, lab.Options{IPv6: true}},
		{"IPv6 alone", []string{ipv6}, lab.Options{IPv6: true}},
		{"both", []string{ipv4, ipv6}, lab.Options{IPv6: true}},
	} {
		for _, chained := range []bool{false, true} {
			if !nstest.Long() && chained != (n%2 == 1) {
				continue
			}
			t.Run(fmt.Sprintf("%s, chained %t", test.name, chained), func(t *testing.T) {
				t.Parallel()
				p := newPod(t, test.o)
				for _, name := range test.on {
					if err := p.Lab.SetSysctl(p.Lab.Router, name, "1"); err != nil {
						t.Fatal(err)
					}
				}
				if chained {
					p.addEarlier("192.168.12.99/24")
				}
				state := func() (found string) {
					for _, name := range []string{ipv4, ipv6} {
						value, err := p.Lab.Sysctl(p.Lab.Router, name)
						if err != nil {
							t.Fatal(err)
						}
						found += name + " " + value + "\n"
					}
					return found + p.before()
				}
				before := state()
				for range 2 { // the second time, the first DEL has left something to remember
					if chained {
						p.Conf["cniVersion"], p.Conf["prevResult"] = "1.1.0", p.earlier()
					}
					p.add()
					p.WantExample()
					p.ok("CHECK")
					p.del()
					if after := state(); after != before {
						t.Errorf("after DEL (-want +got):\n%s", diff(before, after))
					}
				}
			})
		}
	}
}

// Calls at the same time for the same pod come one after the other: whatever their order,
// there is one router or none, which works.
func TestCallsAtOnce(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	before := p.before()
	start := func(verb, ifname string) *exec.Cmd {
		p.Vars["CNI_IFNAME"] = ifname
		cmd := p.command(verb, p.stdin())
		if err := p.Lab.Start(p.Lab.Node, cmd); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	rounds := 2
	if nstest.Long() {
		rounds = 5
	}
	for range rounds {
		all := []*exec.Cmd{start("ADD", "macvlan0"), start("ADD", "net2"), start("ADD", "macvlan0"), start("ADD", "net3")}
		made := 0
		for _, cmd := range all {
			if cmd.Wait() == nil {
				made++
			}
		}
		if made != 1 {
			t.Errorf("%d of the calls of ADD made a router, want one", made)
		}
		p.WantExample()
		all = nil
		for range 2 {
			all = append(all, start("DEL", "macvlan0"), start("DEL", "net2"), start("DEL", "net3"))
		}
		for _, cmd := range all {
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
		}
		p.wantBefore("after DEL", before)
	}
	p.Conf["conflict"] = "refuse" // takes seconds
	h := p.Handle(p.Lab.Router)
	for range rounds {
		add := start("ADD", "macvlan0")
		p.Until("the interface is there", func() bool { _, err := h.LinkByName("macvlan0"); return err == nil })
		del := start("DEL", "macvlan0")
		_ = add.Wait()
		if err := del.Wait(); err != nil {
			t.Error(err)
		}
		p.wantBefore("after DEL during ADD", before)
	}
}

// An ADD whose result nobody reads is a failed one: a runtime that has gone does not know of
// the router.
func TestAddWithoutReader(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	before := p.before()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	defer w.Close()
	cmd := p.command("ADD", p.stdin())
	cmd.Stdout = w
	if err := p.Lab.Run(p.Lab.Node, cmd); err == nil {
		t.Error("ADD succeeds")
	}
	p.wantBefore("after ADD", before)
	if !strings.Contains(p.logged(), "write result to stdout: ") {
		t.Errorf("log:\n%s", p.logged())
	}
}

// A terminated DEL goes on: the runtime would take the half of it for the whole. A killed one
// is continued by the next.
func TestEndedDel(t *testing.T) {
	t.Parallel()
	const calls = "sendto,sendmsg,write" // those that change something
	for signal, least := range map[string]int{"SIGTERM": 4, "SIGKILL": 4} {
		t.Run(signal, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, lab.Options{})
			before := p.before()
			ended := 0
			for n := 1; ; n += 1 + n/2 {
				p.add()
				plugin := p.command("DEL", p.stdin())
				trace := filepath.Join(t.TempDir(), "trace")
				cmd := p.Command("strace", "-f", "-qq", "-o", trace, "-e", "trace="+calls, "-e", fmt.Sprintf("inject=%s:signal=%s:when=%d", calls, signal, n), plugin.Path)
				cmd.Env, cmd.Stdin = plugin.Env, plugin.Stdin
				err := p.Lab.Run(p.Lab.Node, cmd)
				text, readErr := os.ReadFile(trace)
				if readErr != nil {
					t.Fatal(readErr)
				}
				if signal == "SIGTERM" {
					if err != nil {
						t.Errorf("terminated at call %d: %v", n, err)
					}
					p.wantBefore(fmt.Sprintf("terminated at call %d", n), before)
				}
				p.del()
				p.wantBefore(fmt.Sprintf("ended at call %d, after another DEL", n), before)
				if !strings.Contains(string(text), signal) {
					break // it had fewer calls
				}
				ended++
			}
			if ended < least {
				t.Errorf("ended %d times, want at least %d", ended, least)
			}
		})
	}
}

// Of pods that get the same address at the same time, and shall refuse one in use, at most
// one takes it.
func TestSameAddressAtOnce(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	p.Conf["conflict"] = "refuse"
	var running []*exec.Cmd
	answers := make([]strings.Builder, 3)
	for i := range answers {
		q := *p
		q.Vars = map[string]string{"CNI_CONTAINERID": fmt.Sprintf("c%d", i), "CNI_NETNS": labtest.File(p.newNamespace(i)), "CNI_IFNAME": "net1"}
		cmd := q.command("ADD", q.stdin())
		cmd.Stdout = &answers[i]
		if err := p.Lab.Start(p.Lab.Node, cmd); err != nil {
			t.Fatal(err)
		}
		running = append(running, cmd)
	}
	made := 0
	for i, cmd := range running {
		if cmd.Wait() == nil {
			made++
		} else if !strings.Contains(answers[i].String(), fmt.Sprintf(`"code": %d`, cni.CodeConflict)) {
			t.Errorf("ADD: %s", &answers[i])
		}
	}
	if made > 1 {
		t.Errorf("%d pods have the address", made)
	}
}
