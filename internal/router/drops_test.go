package router_test

import (
	"encoding/binary"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/rules"
)

// sendUDP sends a datagram without data (RFC 768).
func sendUDP(p *labtest.Pod, ns *netns.Namespace, from, to string, port uint16) {
	p.Helper()
	datagram := make([]byte, 8)
	binary.BigEndian.PutUint16(datagram[0:], 40000)
	binary.BigEndian.PutUint16(datagram[2:], port)
	binary.BigEndian.PutUint16(datagram[4:], 8)
	if err := sendIP(ns, "ip4:udp", from, to, datagram); err != nil {
		p.Fatal(err)
	}
}

// strayIsInvalid makes the kernel not track a segment in the middle of a connection.
func strayIsInvalid(p *labtest.Pod) {
	p.Helper()
	if err := p.Lab.SetSysctl(p.Lab.Router, "net/netfilter/nf_conntrack_tcp_loose", "0"); err != nil {
		p.Fatal(err)
	}
}

// droppedBy returns the drops that health reports.
func droppedBy(p *labtest.Pod) map[rules.Reason]int {
	p.Helper()
	_, out := p.Health()
	dropped := make(map[rules.Reason]int)
	for line := range strings.Lines(out) {
		if _, list, found := strings.Cut(line, " packets: "); found && strings.HasPrefix(line, "  drops ") {
			for _, m := range regexp.MustCompile(`(\d+) ([a-z-]+)`).FindAllStringSubmatch(list, -1) {
				dropped[rules.Reason(m[2])], _ = strconv.Atoi(m[1])
			}
		}
	}
	return dropped
}

// wantDrops waits until health reports the given drops.
func wantDrops(p *labtest.Pod, when string, want map[rules.Reason]int) {
	p.Helper()
	var got map[rules.Reason]int
	defer func() {
		if p.Failed() {
			p.Logf("%s: dropped %v, want %v", when, got, want)
		}
	}()
	p.Until("drops "+when, func() bool { got = droppedBy(p); return maps.Equal(got, want) })
}

// startWithFile starts a router that stays, with destinations from a file, and returns
// the function that replaces them.
func startWithFile(p *labtest.Pod, list string) (*labtest.Running, func(string)) {
	p.Helper()
	file := filepath.Join(p.TempDir(), "destinations")
	write := func(list string) {
		p.Helper()
		if err := os.WriteFile(file+".new", []byte(list), 0o644); err != nil { //nolint:gosec // a router without privilege over files reads it
			p.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			p.Fatal(err)
		}
	}
	write(list)
	delete(p.Env, "EGRESS_DESTINATION")
	p.Env["EGRESS_DESTINATION_FILE"], p.Env["EGRESS_HEALTH_INTERVAL"] = file, "300ms"
	r := p.Start("legacy")
	p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
	return r, write
}

// whileStopped does what the router then sees at once.
func whileStopped(r *labtest.Running, do func()) {
	r.Helper()
	for _, s := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGCONT} {
		if err := r.Cmd.Process.Signal(s); err != nil {
			r.Fatal(err)
		}
		if s == syscall.SIGSTOP {
			do()
		}
	}
}

// flushInput deletes the rules that drop packets for the pod, with their counters.
func flushInput(p *labtest.Pod) {
	p.Helper()
	if p.Backend == labtest.Nftables {
		p.NFT("flush chain ip egress-router filter-input")
	} else {
		p.Iptables("-F", "EGRESS-INPUT")
	}
}

// rulesRepaired is logged after a repair of rules.
const rulesRepaired = "msg=repaired kind=rules"

// Each packet that is dropped or rejected counts once, by its reason. The counters
// continue after a reload of the destinations and after a repair.
func TestDropsAreCountedByReason(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		r, replace := startWithFile(p, "53 udp 203.0.113.25\n")
		routeThroughPod(p)
		p.AddRoute(p.Lab.Outside, lab.LANLink, "10.128.0.0/23", "192.168.12.99")
		strayIsInvalid(p)
		outside := p.Handle(p.Lab.Outside)
		if err := outside.AddrAdd(p.Link(outside, "lo"), labtest.Addr("10.128.0.72/32")); err != nil {
			p.Fatal(err)
		}
		if dropped := droppedBy(p); len(dropped) > 0 {
			p.Errorf("before any packet: %v, want no line", dropped)
		}
		want := make(map[rules.Reason]int)
		send := func() {
			p.Helper()
			sendUDP(p, p.Lab.Client, "10.128.0.71", "203.0.113.26", 54) // rejected
			want[rules.NotRedirected]++
			sendACK(p, p.Lab.Client, "10.128.0.71", "203.0.113.25")
			sendACK(p, p.Lab.Client, "10.128.0.71", "10.128.0.98") // to the pod
			sendACK(p, p.Lab.Outside, "203.0.113.25", "192.168.12.99")
			want[rules.Invalid] += 3
			sendUDP(p, p.Lab.Outside, "203.0.113.25", "192.168.12.99", 7070) // to the pod
			sendUDP(p, p.Lab.Outside, "203.0.113.25", "10.128.0.71", 7070)   // through it
			// The answer, to a forged source, is dropped.
			sendICMP(p, p.Lab.Outside, "10.128.0.72", "192.168.12.99", []byte{8, 0, 0, 0, 0x12, 0x34, 0, 1})
			want[rules.PhysicalNetwork] += 3
		}
		send()
		wantDrops(p, "at first", want)

		// A redirected packet whose route leads back to the cluster.
		p.AddRoute(p.Lab.Router, "eth0", "203.0.113.25/32", lab.NodeAddr.String())
		sendUDP(p, p.Lab.Client, "10.128.0.71", "10.128.0.98", 53)
		want[rules.OtherInterface]++
		wantDrops(p, "after a packet toward another interface", want)
		r.AwaitLog(1, "add route 203.0.113.25 ") // the copy for replies
		h := p.Handle(p.Lab.Router)
		if err := h.RouteDel(&netlink.Route{Dst: labtest.IPNet("203.0.113.25/32")}); err != nil {
			p.Fatal(err)
		}
		r.AwaitLog(1, "delete route 203.0.113.25 ")

		replace("53 udp 203.0.113.25\n9 udp 203.0.113.25\n")
		r.AwaitLog(2, "rules loaded")
		send()
		wantDrops(p, "after a reload", want)

		// Without the SNAT rule the source guard drops the packet.
		whileStopped(r, func() {
			p.FlushSourceRule()
			sendUDP(p, p.Lab.Client, "10.128.0.71", "10.128.0.98", 53)
			want[rules.WrongSource]++
			p.Until("the source guard drops the packet", func() bool {
				return strings.Contains(p.NFT("list table ip egress-router-guard"), " packets 1 ")
			})
		})
		r.AwaitLog(1, rulesRepaired)
		wantDrops(p, "after a repair", want)

		// A repair of rules that count loses nothing that was read before, and no packet
		// counts twice.
		flushInput(p)
		r.AwaitLog(2, rulesRepaired)
		wantDrops(p, "after their rules were deleted", want)
		send()
		wantDrops(p, "after their rules were loaded again", want)
	})
}

// With EGRESS_LOG_DROPS each reason has a log line with an example and the number of
// packets, at any log level. A flood adds no line.
func TestDropsAreLogged(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_LOG_DROPS"], p.Env["EGRESS_LOG_LEVEL"] = "true", "warn"
		r, _ := startWithFile(p, "53 udp 203.0.113.25\n")
		routeThroughPod(p)
		strayIsInvalid(p)
		whileStopped(r, func() { // so that all are in one line
			for range 100 {
				sendUDP(p, p.Lab.Client, "10.128.0.71", "203.0.113.26", 54)
			}
			p.Until("the kernel counts 100 packets", func() bool {
				if p.Backend == labtest.Nftables {
					return strings.Contains(p.NFT("list chain ip egress-router filter-forward"), " packets 100 ")
				}
				return strings.Contains(p.Tool(p.Program("iptables-save"), "-c", "-t", "filter"), "[100:")
			})
		})
		sendACK(p, p.Lab.Outside, "203.0.113.25", "192.168.12.99")
		sendUDP(p, p.Lab.Outside, "203.0.113.25", "192.168.12.99", 7070)
		p.AddRoute(p.Lab.Router, "eth0", "203.0.113.25/32", lab.NodeAddr.String())
		sendUDP(p, p.Lab.Client, "10.128.0.71", "10.128.0.98", 53)
		for _, line := range []string{
			`msg="packets dropped" reason=not-redirected packets=100 protocol=udp source=10.128.0.71:40000 destination=203.0.113.26:54 in=eth0 out=macvlan0`,
			`msg="packets dropped" reason=physical-network packets=1 protocol=udp source=203.0.113.25:40000 destination=192.168.12.99:7070 in=macvlan0`,
			`msg="packets dropped" reason=other-interface packets=1 protocol=udp source=10.128.0.71:40000 destination=203.0.113.25:53 in=eth0 out=eth0`,
		} {
			r.AwaitLog(1, line+"\n")
		}
		r.AwaitLog(1, `reason=invalid packets=1 protocol=tcp source=203.0.113.25:40000 destination=192.168.12.99:4242 in=macvlan0`)
		r.AwaitLog(1, "add route 203.0.113.25 ") // the copy for replies
		h := p.Handle(p.Lab.Router)
		if err := h.RouteDel(&netlink.Route{Dst: labtest.IPNet("203.0.113.25/32")}); err != nil {
			p.Fatal(err)
		}
		r.AwaitLog(1, "delete route 203.0.113.25 ")

		whileStopped(r, func() {
			p.FlushSourceRule()
			sendUDP(p, p.Lab.Client, "10.128.0.71", "10.128.0.98", 53)
			p.Until("the source guard drops the packet", func() bool {
				return strings.Contains(p.NFT("list table ip egress-router-guard"), " packets 1 ")
			})
		})
		r.AwaitLog(1, `reason=source-guard packets=1 protocol=udp source=10.128.0.71:40000 destination=203.0.113.25:53 `)
		if n := strings.Count(r.Logged(), "reason=not-redirected"); n != 1 {
			p.Errorf("%d lines of 100 packets, want 1", n)
		}
	})
}

// The rules of the drop log are part of what init configures, so that a monitor with
// the same variables finds no drift. It logs.
func TestMonitorLogsDrops(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_LOG_DROPS"] = "true"
		if r := p.OK(); !strings.Contains(r.Stderr, "EGRESS_LOG_DROPS=true logs nothing in mode init") {
			p.Errorf("init does not warn:\n%s", r.Stderr)
		}
		p.WantUnchanged(p.OK())
		before := p.State()
		r := p.Start("monitor")
		p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
		sendUDP(p, p.Lab.Outside, "203.0.113.25", "192.168.12.99", 7070)
		r.AwaitLog(1, "reason=physical-network")
		p.WantState(before)
		if n := r.Repaired(); n > 0 {
			p.Errorf("%d repairs, want none", n)
		}
	})
}

// A kernel without the modules of the drop log, of the MSS clamp or of both gets the other
// rules, which count.
func TestKernelWithoutParts(t *testing.T) {
	t.Parallel()
	for n, test := range []struct{ name, targets, loaded string }{
		{"drop log", "*NFLOG*", "TCPMSS"},
		{"MSS clamp", "*TCPMSS*", "NFLOG"},
		{"drop log, MSS clamp", "*NFLOG*|*TCPMSS*", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			labtest.EachFlavourInTurn(t, n, lab.Options{}, func(p *labtest.Pod) {
				p.Path = p.Programs("case $0 in */iptables-restore) in=$(cat); case $in in " + test.targets + ") echo 'Extension revision 0 not supported, missing kernel module?' >&2; exit 2; esac; printf '%s\\n' \"$in\" | $real \"$@\"; exit; esac\nexec $real \"$@\"\n")
				p.Env["EGRESS_LOG_DROPS"], p.Env["EGRESS_ROUTER_BACKEND"] = "true", "iptables"
				r, replace := startWithFile(p, "53 udp 203.0.113.25\n")
				for part := range strings.SplitSeq(test.name, ", ") {
					r.AwaitLog(1, `msg="`+part+` not loaded"`)
				}
				sendUDP(p, p.Lab.Outside, "203.0.113.25", "192.168.12.99", 7070)
				wantDrops(p, "without "+test.name, map[rules.Reason]int{rules.PhysicalNetwork: 1})
				replace("53 udp 203.0.113.25\n9 udp 203.0.113.25\n")
				r.AwaitLog(2, "rules loaded")
				wantDrops(p, "after a reload", map[rules.Reason]int{rules.PhysicalNetwork: 1})
				log, save := r.Logged(), p.Tool(p.Program("iptables-save"))
				if strings.Count(log, "not loaded") != 1+strings.Count(test.name, ",") || r.Repaired() > 0 {
					p.Errorf("want one warning for each part, the source guard, and no repair:\n%s", log)
				}
				for _, target := range []string{"NFLOG", "TCPMSS"} {
					if got, want := strings.Contains(save, "-j "+target), target == test.loaded; got != want {
						p.Errorf("rules with %s: %v, want %v", target, got, want)
					}
				}
			})
		})
	}
}

// Where iptables lacks the MSS clamp and the kernel has nf_tables, automatic choice takes
// nftables, with the clamp.
func TestAutomaticChoiceKeepsClamp(t *testing.T) {
	t.Parallel()
	labtest.EachFlavour(t, lab.Options{}, func(p *labtest.Pod) {
		p.Path = p.Programs("case $0 in */iptables-restore) in=$(cat); case $in in *TCPMSS*) echo 'Extension TCPMSS revision 0 not supported, missing kernel module?' >&2; exit 2; esac; printf '%s\\n' \"$in\" | $real \"$@\"; exit; esac\nexec $real \"$@\"\n")
		p.Env["EGRESS_ROUTER_BACKEND"] = "auto"
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		if log := r.Logged(); !strings.Contains(log, "iptables load failed, using nftables") || strings.Contains(log, "not loaded") {
			p.Errorf("log:\n%s", log)
		}
		if table := p.NFT("list table ip egress-router"); !strings.Contains(table, "maxseg size set rt mtu") {
			p.Errorf("no clamp:\n%s", table)
		}
		p.WantExample()
	})
}

// Rules that no part is to blame for are loaded three times, and leave nothing behind.
func TestHopelessLoadIsBounded(t *testing.T) {
	t.Parallel()
	labtest.EachFlavourInTurn(t, 1, lab.Options{}, func(p *labtest.Pod) {
		loads := filepath.Join(t.TempDir(), "loads")
		p.Path = p.Programs("case $0 in */iptables-restore) in=$(cat); case $in in *EGRESS-FORWARD*) echo >>" + loads + "; echo 'iptables-restore: line 5 failed' >&2; exit 1; esac; printf '%s\\n' \"$in\" | $real \"$@\"; exit; esac\nexec $real \"$@\"\n")
		p.Env["EGRESS_LOG_DROPS"], p.Env["EGRESS_ROUTER_BACKEND"] = "true", "iptables"
		before := p.State()
		p.WantRefusal("", "loading rules", "")
		p.WantState(before)
		if n, err := os.ReadFile(loads); err != nil || len(n) != 3 {
			p.Errorf("%d loads (%v), want 3", len(n), err)
		}
	})
}

// A load that fails once leaves no part of the rules out.
func TestPassingFailureLeavesOutNothing(t *testing.T) {
	t.Parallel()
	labtest.EachFlavourInTurn(t, 0, lab.Options{}, func(p *labtest.Pod) {
		failed := filepath.Join(t.TempDir(), "failed")
		p.Path = p.Programs("case $0 in */iptables-restore) in=$(cat); case $in in *EGRESS-FORWARD*) if mkdir " + failed + "; then echo 'iptables-restore: line 5 failed' >&2; exit 1; fi; esac; printf '%s\\n' \"$in\" | $real \"$@\"; exit; esac\nexec $real \"$@\"\n")
		p.Env["EGRESS_LOG_DROPS"], p.Env["EGRESS_ROUTER_BACKEND"] = "true", "iptables"
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		if log := r.Logged(); strings.Contains(log, "not loaded") {
			p.Errorf("log:\n%s", log)
		}
		if _, err := os.Stat(failed); err != nil {
			p.Error("no load failed")
		}
		save := p.Tool(p.Program("iptables-save"))
		for _, target := range []string{"NFLOG", "TCPMSS"} {
			if !strings.Contains(save, "-j "+target) {
				p.Errorf("no rules with %s:\n%s", target, save)
			}
		}
	})
}
