package probe_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/sysctl"
)

// run runs a command in a namespace and returns its result.
func run(p *labtest.Pod, ns *netns.Namespace, name string, args ...string) labtest.Result {
	p.Helper()
	cmd := p.Command(name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := p.Lab.Run(ns, cmd)
	if _, exit := errors.AsType[*exec.ExitError](err); err != nil && !exit {
		p.Fatal(err)
	}
	return labtest.Result{Code: cmd.ProcessState.ExitCode(), Stdout: stdout.String(), Stderr: stderr.String()}
}

// diagnosed runs a diagnosis, and checks that its exit code is that of its result, that it
// changes nothing, and that nothing leaves with another source.
func diagnosed(p *labtest.Pod, ns *netns.Namespace, name string, args ...string) diagnose.Diagnosis {
	p.Helper()
	before := p.State()
	w := p.Watch(p.Lab.Router, "macvlan0")
	r := run(p, ns, name, append([]string{"diagnose", "-o", "json"}, args...)...)
	var d diagnose.Diagnosis
	if err := json.Unmarshal([]byte(r.Stdout), &d); err != nil || r.Stderr != "" || (r.Code == 0) != d.OK || r.Code > 1 {
		p.Fatalf("exit code %d, error %v, stderr %q, stdout:\n%s", r.Code, err, r.Stderr, r.Stdout)
	}
	w.WantSource()
	p.WantState(before)
	return d
}

// fromEverywhere diagnoses from inside the pod, and from the node.
func fromEverywhere(p *labtest.Pod, check func(*labtest.Pod, diagnose.Diagnosis)) {
	p.Helper()
	check(p, diagnosed(p, p.Lab.Router, "egress-router"))
	check(p, diagnosed(p, p.Lab.Node, "egress-router", "--netns", labtest.File(p.Lab.Router)))
}

// text returns a diagnosis for the message of a test.
func text(d diagnose.Diagnosis) string {
	var b strings.Builder
	_ = d.WriteText(&b)
	return b.String()
}

// probed is in the sentence of a healthy router. A busy machine drops a frame at times.
var probed = regexp.MustCompile(`from 192\.168\.12\.99 to 203\.0\.113\.25:80, SYN sent \d times? at `)

// A healthy router has no finding: every verdict is ok.
func TestDiagnoseHealthyRouter(t *testing.T) {
	t.Parallel()
	for _, six := range []bool{false, true} {
		t.Run(fmt.Sprintf("IPv6 %v", six), func(t *testing.T) {
			t.Parallel()
			labtest.EachBackend(t, lab.Options{IPv6: six}, func(p *labtest.Pod) {
				if six {
					p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_SOURCE"], p.Env["EGRESS_GATEWAY"] = "extended", "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, 2001:db8:12::1"
					p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n81 tcp 2001:db8::25 80\n53 udp 203.0.113.27\n203.0.113.27"
					p.Serve(p.Lab.Outside, "tcp", "[2001:db8::25]:80")
				}
				p.OK()
				p.WantAnswer("tcp", 80, "203.0.113.25:80")
				fromEverywhere(p, func(p *labtest.Pod, d diagnose.Diagnosis) {
					p.Helper()
					for _, f := range d.Findings {
						if f.Verdict != diagnose.OK || f.Fault != "" {
							p.Errorf("finding %+v", f)
						}
					}
					if !d.OK || !probed.MatchString(d.Sentence) || p.Failed() {
						p.Errorf("diagnosis:\n%s", text(d))
					}
				})
			})
		})
	}
}

// filter loads an nftables rule set in a namespace.
func filter(p *labtest.Pod, ns *netns.Namespace, rules string) {
	p.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(strings.NewReplacer("{ ", "{\n", " }", "\n}", "; ", "\n").Replace(rules) + "\n")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := p.Lab.Run(ns, cmd); err != nil {
		p.Fatalf("nft: %v\n%s", err, &out)
	}
}

// atServer returns a rule set with one rule for packets to the host of the servers.
func atServer(rule string) string {
	return "table ip fault { chain input { type filter hook input priority 0; " + rule + " } }"
}

// The faults, by the one that the diagnosis has to name.
var faults = []struct {
	name  string
	fault diagnose.Fault
	before,
	after func(*labtest.Pod) // the start of the router
	says string // part of the output
}{
	{"gateway silent", diagnose.GatewaySilent, nil, func(p *labtest.Pod) {
		filter(p, p.Lab.Outside, "table arp fault { chain input { type filter hook input priority 0; policy drop } }")
	}, "does not answer 3 ARP requests from 192.168.12.99 to 192.168.12.1"},
	{"hypervisor drops frames of a foreign hardware address", diagnose.ForeignMACDropped, nil, func(p *labtest.Pod) {
		mac := p.Link(p.Handle(p.Lab.Router), "macvlan0").Attrs().HardwareAddr
		filter(p, p.Lab.Outside, "table netdev fault { chain ingress { type filter hook ingress device lan0 priority 0; ether saddr "+mac.String()+" drop } }")
		askForHosts(p)
	}, "asks for other hosts"},
	{"firewall drops", diagnose.DroppedBeyond, nil, func(p *labtest.Pod) { filter(p, p.Lab.Outside, atServer("meta l4proto tcp drop")) }, "the server answers echo: a firewall drops the port"},
	{"firewall drops everything", diagnose.DroppedBeyond, nil, func(p *labtest.Pod) {
		filter(p, p.Lab.Outside, atServer("ip daddr 203.0.113.0/24 drop"))
	}, "no answer, while the gateway answers echo"},
	{"gateway has another hardware address", diagnose.DroppedBeyond, nil, func(p *labtest.Pod) {
		h := p.Handle(p.Lab.Outside)
		if err := h.NeighSet(&netlink.Neigh{
			LinkIndex: p.Link(h, lab.LANLink).Attrs().Index, IP: lab.Source.AsSlice(), State: netlink.NUD_PERMANENT,
			HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 0x77},
		}); err != nil {
			p.Fatal(err)
		}
	}, "table has another hardware address than "},
	{"server refuses", diagnose.ServerRefuses, func(p *labtest.Pod) { p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25 81" }, nil, "a reset answered the SYN"},
	{"reset in between", diagnose.ResetBetween, nil, func(p *labtest.Pod) {
		filter(p, p.Lab.Outside, atServer("tcp flags & (syn | ack | rst) == ack reject with tcp reset"))
	}, "then reset before any data"},
	{"reset by a host in between", diagnose.ResetBetween, func(p *labtest.Pod) { p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25 81" }, func(p *labtest.Pod) {
		filter(p, p.Lab.Outside, "table ip fault { chain output { type filter hook output priority 0; icmp type echo-reply ip ttl set 60 } }")
	}, "the reset made 0 hops, the server's echo 4"},
	{"firewall forbids", diagnose.ServerUnreachable, nil, func(p *labtest.Pod) {
		filter(p, p.Lab.Outside, atServer("meta l4proto tcp reject with icmp type admin-prohibited"))
	}, "no route to host, from 203.0.113.2"},
	{"black hole", diagnose.MTUBlackHole, nil, func(p *labtest.Pod) { filter(p, p.Lab.Outside, atServer("ip length > 1400 drop")) }, "packets of 1500 bytes are lost without an ICMP error, 1400 bytes arrive"},
	{"another holder", diagnose.WrongMAC, nil, func(p *labtest.Pod) {
		h := p.Handle(p.Lab.Outside)
		if err := h.AddrAdd(p.Link(h, "lo"), labtest.Addr("192.168.12.99/32")); err != nil {
			p.Fatal(err)
		}
	}, "answers for it: the gateway may send answers there"},
	{"asymmetric return", diagnose.AsymmetricReturn, nil, func(p *labtest.Pod) {
		p.AddRoute(p.Lab.Outside, lab.LANLink, "192.168.12.99/32", lab.NICAddr.String())
		p.AddRoute(p.Lab.Node, lab.Bridge, "192.168.12.99/32", lab.RouterAddr.String())
	}, "the answer arrived by eth0"},
	{"name servers silent", diagnose.NameFailed, func(p *labtest.Pod) {
		p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_DESTINATION"] = "extended", "443 tcp db.example.com 5432\n80 tcp 203.0.113.25"
	}, nil, "lookup failed"},
	{"ports exhausted", diagnose.PortsExhausted, nil, exhaust, "64512 of 64512 in use to tcp 203.0.113.26:80"},
	{"no carrier", diagnose.NoCarrier, nil, func(p *labtest.Pod) {
		h := p.Handle(p.Lab.Node)
		if err := h.LinkSetDown(p.Link(h, lab.NIC)); err != nil {
			p.Fatal(err)
		}
		p.Until("macvlan0 has no carrier", func() bool {
			return p.Link(p.Handle(p.Lab.Router), "macvlan0").Attrs().RawFlags&unix.IFF_LOWER_UP == 0
		})
	}, "the parent NIC is down"},
	{"source rule flushed", diagnose.RulesMissing, nil, (*labtest.Pod).FlushSourceRule, "load the rules"},
	{"forwarding off", diagnose.ForwardingOff, nil, func(p *labtest.Pod) {
		if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "0"); err != nil {
			p.Fatal(err)
		}
	}, "set net.ipv4.ip_forward = 1"},
	{"route astray", diagnose.RoutesWrong, nil, func(p *labtest.Pod) {
		p.AddRoute(p.Lab.Router, "eth0", "203.0.113.25/32", lab.NodeAddr.String())
	}, "leads elsewhere"},
	{"address removed", diagnose.AddressMissing, nil, func(p *labtest.Pod) {
		h := p.Handle(p.Lab.Router)
		if err := h.AddrDel(p.Link(h, "macvlan0"), labtest.Addr("192.168.12.99/24")); err != nil {
			p.Fatal(err)
		}
	}, "not probed: the reserved address is missing"},
}

// askForHosts has the gateway ask for a host of its network all the time: the kernel
// repeats the request.
func askForHosts(p *labtest.Pod) {
	p.Helper()
	for setting, value := range map[string]string{"mcast_solicit": "1000000", "retrans_time_ms": "20"} {
		if err := p.Lab.SetSysctl(p.Lab.Outside, "net/ipv4/neigh/lan0/"+setting, value); err != nil {
			p.Fatal(err)
		}
	}
	if _, err := p.Dial(p.Lab.Outside, "udp", netip.MustParseAddrPort("192.168.12.200:9")).Write([]byte("?")); err != nil {
		p.Fatal(err)
	}
}

// exhaust adds a tracked connection for each port of the reserved address to one server.
func exhaust(p *labtest.Pod) {
	p.Helper()
	err := p.Lab.Router.Do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		defer func() { _ = unix.Close(fd) }()
		const firstPort, batch = 1024, 256
		router, server := netip.AddrPortFrom(lab.RouterAddr, 8080), netip.AddrPortFrom(lab.Remote[1], 80)
		for port := firstPort; port < 1<<16; port += batch {
			var requests []byte
			for i := range batch {
				requests = append(requests, established(
					netip.AddrPortFrom(lab.ClientAddr, uint16(port+i)), router, server, netip.AddrPortFrom(lab.Source, uint16(port+i)))...)
			}
			if err := unix.Sendto(fd, requests, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
				return os.NewSyscallError("sendto", err)
			}
		}
		n, err := sysctl.ReadInt("net.netfilter.nf_conntrack_count")
		if want := 1<<16 - firstPort; err == nil && n < want {
			err = fmt.Errorf("%d connections, want %d", n, want)
		}
		return err
	})
	if err != nil {
		p.Fatal(err)
	}
}

// Each fault is named, and no other one before it, with each backend, from inside the pod and
// from the node.
func TestDiagnoseNamesFault(t *testing.T) {
	t.Parallel()
	for n, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			labtest.EachBackendInTurn(t, n, lab.Options{}, func(p *labtest.Pod) {
				if f.before != nil {
					f.before(p)
				}
				p.OK()
				if f.after != nil {
					f.after(p)
				}
				fromEverywhere(p, func(p *labtest.Pod, d diagnose.Diagnosis) {
					p.Helper()
					if d.OK || d.Fault != f.fault || !strings.Contains(text(d), f.says) {
						p.Errorf("fault %q, want %q and %q:\n%s", d.Fault, f.fault, f.says, text(d))
					}
				})
			})
		})
	}
}

// That no client connects is odd, and no fault.
func TestDiagnoseNobodyConnects(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 0, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		fromEverywhere(p, func(p *labtest.Pod, d diagnose.Diagnosis) {
			p.Helper()
			if !d.OK || !slices.ContainsFunc(d.Findings, func(f diagnose.Finding) bool {
				return f.Fault == diagnose.NobodyConnects && f.Verdict == diagnose.Warning
			}) {
				p.Errorf("diagnosis:\n%s", text(d))
			}
		})
	})
}

// A chain of another program that drops what it does not accept is named.
func TestDiagnoseForeignChain(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 1, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		filter(p, p.Lab.Router, "table inet other { chain crossing { type filter hook forward priority 10; policy drop } }")
		fromEverywhere(p, func(p *labtest.Pod, d diagnose.Diagnosis) {
			p.Helper()
			if f := found(p, d, "filters"); !d.OK || f.Verdict != diagnose.Warning || f.Fault != diagnose.ForwardingFiltered || !strings.Contains(f.Found, "chain crossing of table inet other") {
				p.Errorf("diagnosis:\n%s", text(d))
			}
		})
	})
}

// Faults of IPv6 are named while IPv4 is healthy.
func TestDiagnoseNamesFaultOfIPv6(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]struct {
		fault diagnose.Fault
		rules string // at the host of the servers
		says  string
	}{
		"server refuses":   {diagnose.ServerRefuses, "", "a reset answered the SYN"},
		"firewall forbids": {diagnose.ServerUnreachable, "table ip6 fault { chain input { type filter hook input priority 0; meta l4proto tcp reject with icmpv6 type admin-prohibited } }", ", from 2001:db8::25"},
		"firewall drops":   {diagnose.DroppedBeyond, "table ip6 fault { chain input { type filter hook input priority 0; meta l4proto tcp drop } }", "the server answers echo: a firewall drops the port"},
		"black hole":       {diagnose.MTUBlackHole, "table ip6 fault { chain input { type filter hook input priority 0; meta length > 1400 drop } }", "1400 bytes arrive"},
		"gateway silent":   {diagnose.GatewaySilent, "table ip6 fault { chain input { type filter hook input priority 0; icmpv6 type nd-neighbor-solicit drop } }", "does not answer 3 NDP requests from 2001:db8:12::99 to 2001:db8:12::1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{IPv6: true}, labtest.Nftables)
			p.Env["EGRESS_GRAMMAR"], p.Env["EGRESS_SOURCE"], p.Env["EGRESS_GATEWAY"] = "extended", "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, 2001:db8:12::1"
			p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n81 tcp 2001:db8::25 80"
			if f.rules != "" {
				p.Serve(p.Lab.Outside, "tcp", "[2001:db8::25]:80")
			}
			p.OK()
			filter(p, p.Lab.Outside, f.rules)
			if d := diagnosed(p, p.Lab.Router, "egress-router"); d.Fault != f.fault || !strings.Contains(text(d), f.says) {
				t.Errorf("fault %q, want %q and %q:\n%s", d.Fault, f.fault, f.says, text(d))
			}
		})
	}
}

// Without its egress interface, a router has one fault, and what cannot be observed then is
// unknown.
func TestDiagnoseMissingInterface(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{NoMacvlan: true}, func(p *labtest.Pod) {
		r := p.Exec("egress-router", "diagnose", "-o", "json")
		var d diagnose.Diagnosis
		if err := json.Unmarshal([]byte(r.Stdout), &d); err != nil || r.Code != 1 || d.Fault != diagnose.InterfaceMissing {
			p.Errorf("%v, %+v", err, r)
		}
	})
}
