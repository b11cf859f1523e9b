package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/faults"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/nft"
)

// several are two routers with one reserved address, each in the pod of a node.
type several struct {
	*testing.T
	site     *lab.Site
	routers  []*faults.Router
	more     [2][]string // variables of each
	commands string      // path of the program
}

func newSeveral(t *testing.T) *several {
	t.Helper()
	t.Parallel()
	path, err := exec.LookPath("egress-router")
	if err != nil {
		t.Fatal(err)
	}
	site, err := lab.NewSite(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(site.Close)
	return &several{T: t, site: site, commands: path}
}

// command returns a command of the program with a router's variables.
func (s *several) command(node int, args ...string) *exec.Cmd {
	cmd := exec.Command(s.commands, args...)
	cmd.Env = append(faults.Environment(s.site, node), "PATH="+os.Getenv("PATH"), "EGRESS_HEALTH_LISTEN=:9465",
		"EGRESS_STANDBY_INTERVAL=1s") // a router that a busy machine delays for less than 3 s keeps the address
	cmd.Env = append(cmd.Env, s.more[node]...)
	return cmd
}

func (s *several) start() {
	s.Helper()
	for node := range s.site.Nodes {
		r := faults.NewRouter(s.site, node, func(node int) *exec.Cmd { return s.command(node) })
		if err := r.Start(); err != nil {
			s.Fatal(err)
		}
		s.routers = append(s.routers, r)
		s.Cleanup(func() {
			_ = r.Kill() // an error means that it has ended
			if s.Failed() {
				s.Logf("log of router %d:\n%s", node+1, r.Log())
			}
		})
	}
}

// run runs a command in the pod of a router and returns its stdout.
func (s *several) run(node int, args ...string) string {
	s.Helper()
	cmd := s.command(node, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := s.site.Run(s.site.Nodes[node].Pod, cmd); cmd.ProcessState == nil || cmd.ProcessState.ExitCode() > 1 {
		s.Fatalf("%v: %v\n%s", args, err, &stderr)
	}
	return stdout.String()
}

// diagnosed returns a diagnosis of a router from inside its pod.
func (s *several) diagnosed(node int) (d diagnose.Diagnosis) {
	s.Helper()
	if text := s.run(node, "diagnose", "-o", "json"); json.Unmarshal([]byte(text), &d) != nil {
		s.Fatalf("diagnose: %s", text)
	}
	return d
}

// page returns the status page of a router, as a client reads it.
func (s *several) page(node int) string {
	s.Helper()
	addr := netip.AddrPortFrom(s.site.Nodes[node].Addr, 9465)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return s.site.Dial(ctx, s.site.Client, "tcp", addr)
	}}}
	var text []byte
	s.until("the page of a router", func() bool { // which closes a connection whose request comes late
		resp, err := client.Get("http://" + addr.String() + "/")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		text, err = io.ReadAll(resp.Body)
		return err == nil
	})
	return string(text)
}

// until waits until a condition holds.
func (s *several) until(what string, is func() bool) {
	s.Helper()
	if !labtest.Poll(is) {
		s.Fatalf("timeout after %v: %s", labtest.Patience, what)
	}
}

// roles waits until one router holds the address and the other one stands by for it, in the
// health of both, and returns them.
func (s *several) roles() (active, standby int) {
	s.Helper()
	s.until("one router holds the address", func() bool {
		texts := []string{s.run(0, "health"), s.run(1, "health")}
		active = slices.IndexFunc(texts, func(text string) bool { return strings.Contains(text, "active: this router holds the addresses") })
		standby = 1 - active
		return active >= 0 && strings.Contains(texts[standby], fmt.Sprintf("standby: %s holds the addresses", s.site.Nodes[active].Addr))
	})
	return active, standby
}

// want waits until a diagnosis of a router has a fault, and checks what a person reads of it.
func (s *several) want(node int, fault diagnose.Fault, found, remedy string) {
	s.Helper()
	var f diagnose.Finding
	s.until("the fault "+string(fault), func() bool {
		d := s.diagnosed(node)
		i := slices.IndexFunc(d.Findings, func(f diagnose.Finding) bool { return f.Fault == fault })
		if i >= 0 {
			f = d.Findings[i]
		}
		return i >= 0
	})
	if !strings.Contains(f.Found, "expected ") || !strings.Contains(f.Found, found) || !strings.Contains(f.Remedy, remedy) {
		s.Errorf("expected %q with the remedy %q, found %+v", found, remedy, f)
	}
}

// wantReported is want for a fault that the running router notices itself.
func (s *several) wantReported(node int, fault diagnose.Fault, found, remedy string) {
	s.Helper()
	s.want(node, fault, found, remedy)
	s.until("health has the fault "+string(fault), func() bool { return strings.Contains(s.run(node, "health"), "fault: "+string(fault)+"\n") })
	s.until("the page has the remedy "+remedy, func() bool { return strings.Contains(s.page(node), remedy) })
}

// Health and the page name the holder, the roles, the age of the permit, and the last take-over
// with its gap. A diagnosis of the standby finds no fault, and names the holder.
func TestStandbySeenByPerson(t *testing.T) {
	s := newSeveral(t)
	s.start()
	active, standby := s.roles()
	holder := s.site.Nodes[active].Addr.String()
	d := s.diagnosed(standby)
	text := fmt.Sprint(d.Findings)
	if mac, err := s.site.MAC(active); err != nil || !d.OK || !strings.Contains(text, holder+" holds the addresses, and this router stands by") || !strings.Contains(text, mac+" answers for it, a router with the same addresses") {
		t.Errorf("%v, diagnosis of the standby: %+v", err, d)
	}
	if d := s.diagnosed(active); slices.ContainsFunc(d.Findings, func(f diagnose.Finding) bool { return diagnose.Remedy(f.Fault, nil) != "" }) {
		t.Errorf("diagnosis of the active router: %+v", d)
	}
	text = s.page(standby)
	for _, want := range []string{holder + " holds the addresses.", "<td role=\"cell\" data-column=\"Role\">active</td>", "<td role=\"cell\" data-column=\"Role\">standby</td>"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page lacks %q:\n%s", want, text)
		}
	}
	if err := s.routers[active].Kill(); err != nil {
		t.Fatal(err)
	}
	s.until("the other router names its take-over", func() bool {
		text := s.run(standby, "health")
		_, after, taken := strings.Cut(text, "active: this router holds the addresses, permit ")
		return taken && strings.Contains(after, " old, gate open for ") && strings.Contains(after, "; last take-over ") && strings.Contains(after, " after the last sign of the holder")
	})
	s.wantReported(standby, diagnose.PeersSilent, "expected heartbeats of "+holder+" by UDP port 9467, found none", "that EGRESS_STANDBY_PEERS names it")
}

// A kernel without the egress hook of netdev fences IP packets alone: the log of the start, the
// health and the page name that, one router holds the address all the same, and
// EGRESS_STANDBY_FENCE=require refuses. With the hook there is no word of it.
func TestStandbyFence(t *testing.T) {
	var has bool
	s := newSeveral(t)
	if err := s.site.Nodes[0].Pod.Do(func() (err error) {
		has, err = nft.HasEgressHook()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if want, known := labtest.HasNetdevEgress(t); known && has != want {
		t.Fatalf("egress hook found: %v, want %v on this kernel", has, want)
	}
	s.start()
	active, standby := s.roles()
	const effect = "the kernel has no netdev egress hook (Linux 5.16): ARP requests and waiting packets of a router that has just lost the addresses are not held back, and the gateway may take it for the holder for some seconds"
	for _, node := range []int{active, standby} {
		for what, text := range map[string]string{"log": s.routers[node].Log(), "health": s.run(node, "health"), "page": s.page(node), "diagnosis": s.run(node, "diagnose")} {
			if strings.Contains(text, effect) == has {
				t.Errorf("egress hook: %v; %s of router %d:\n%s", has, what, node+1, text)
			}
		}
	}
	if err := s.routers[active].Kill(); err != nil {
		t.Fatal(err)
	}
	s.until("the other router takes over", func() bool {
		return strings.Contains(s.run(standby, "health"), "active: this router holds the addresses")
	})

	s.more[active] = []string{"EGRESS_STANDBY_FENCE=require"}
	if has {
		if err := s.routers[active].Start(); err != nil {
			t.Fatal(err)
		}
		s.until("the router that requires a fence stands by", func() bool {
			return strings.Contains(s.run(active, "health"), "standby: "+s.site.Nodes[standby].Addr.String()+" holds the addresses")
		})
		return
	}
	cmd := s.command(active)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := s.site.Run(s.site.Nodes[active].Pod, cmd)
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 1 || !strings.HasSuffix(stderr.String(), "EGRESS_STANDBY_FENCE=require: "+effect+"\n") {
		t.Errorf("%v, want exit code 1 and the reason; stderr:\n%s", err, &stderr)
	}
}

// A connection by each of two routers that carry lives while the process of the holder is killed,
// also that by its own pod, whose packets the other one then sends. The server sees the reserved
// address.
func TestStandbyCarries(t *testing.T) { carries(t, "tcp") }

func carries(t *testing.T, proto string) {
	s := newSeveral(t)
	for node := range s.site.Nodes {
		s.more[node] = []string{"EGRESS_STANDBY_CARRY=vxlan"}
	}
	server := netip.AddrPortFrom(lab.Remote[0], 7000)
	if _, err := s.site.Serve(s.site.Server, proto, server); err != nil {
		t.Fatal(err)
	}
	s.start()
	active, standby := s.roles()
	conns, readers := make([]net.Conn, 2), make([]*bufio.Reader, 2)
	want := func(what string) {
		t.Helper()
		for node, conn := range conns {
			const line = "still there\n"
			if _, err := io.WriteString(conn, line); err != nil {
				t.Fatalf("%s: connection by router %d: %v", what, node+1, err)
			}
			if got, err := readers[node].ReadString('\n'); err != nil || got != line {
				t.Fatalf("%s: connection by router %d: echo %q, %v", what, node+1, got, err)
			}
		}
	}
	for node := range s.site.Nodes {
		s.until("the routers exchange packets", func() bool {
			_, ports, carries := strings.Cut(s.run(node, "health"), "own ports ")
			return carries && strings.Contains(ports, " of "+s.site.Nodes[1-node].Addr.String())
		})
	}
	for node, n := range s.site.Nodes {
		conn, err := s.site.Dial(t.Context(), s.site.Client, proto, netip.AddrPortFrom(n.Addr, server.Port()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(labtest.Patience)); err != nil {
			t.Fatal(err)
		}
		conns[node], readers[node] = conn, bufio.NewReader(conn)
		if a, err := lab.ReadAnswer(readers[node]); err != nil || a.Server != server || a.Peer.Addr() != lab.Source {
			t.Fatalf("by router %d: answer %v, %v; want %s, which sees %s", node+1, a, err, server, lab.Source)
		}
	}
	want("before")
	if err := s.routers[active].Kill(); err != nil {
		t.Fatal(err)
	}
	s.until("the other router takes over", func() bool {
		return strings.Contains(s.run(standby, "health"), "active: this router holds the addresses")
	})
	want("after the take-over")
}

// Routers without heartbeats of each other report it, on both sides.
func TestStandbyPeersSilent(t *testing.T) {
	s := newSeveral(t)
	s.start()
	s.roles()
	var losses []lab.Loss
	for _, n := range s.site.Nodes {
		losses = append(losses, lab.Loss{Port: n.ClusterPort, In: true, Kind: lab.LoseHeartbeats, Percent: 100})
	}
	if err := s.site.Lose(losses...); err != nil {
		t.Fatal(err)
	}
	for node := range s.site.Nodes {
		s.wantReported(node, diagnose.PeersSilent, fmt.Sprintf("heartbeats of %s by UDP port 9467, found none", s.site.Nodes[1-node].Addr), "that EGRESS_STANDBY_PEERS names it")
	}
}

// A gateway that answers ARP and no pings keeps every router from the address.
func TestStandbyWitnessSilent(t *testing.T) {
	s := newSeveral(t)
	if err := s.site.Script(s.site.Outside, `table ip silent {
	chain input {
		type filter hook input priority 0
		icmp type echo-request drop
	}
}
`); err != nil {
		t.Fatal(err)
	}
	s.start()
	for node := range s.site.Nodes {
		s.wantReported(node, diagnose.WitnessSilent, "no router holds the addresses: expected 192.168.12.1 to answer pings, found ", "set EGRESS_STANDBY_WITNESS to an address behind it that does")
	}
}

// A router reports the address of another one with a different key or without any.
func TestStandbyKeysDiffer(t *testing.T) {
	for name, test := range map[string]struct {
		second  string // key of the second router
		finds   string // finding of the first one
		expects string // key that the second one expects
	}{
		"two keys": {"fedcba9876543210", "of another key", "of the key of EGRESS_STANDBY_KEY_FILE, found those of 10.128.0.101 of another key"},
		"one key":  {"", "without a key", "without a key, since EGRESS_STANDBY_KEY_FILE is not set, found those of 10.128.0.101 with a key"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSeveral(t)
			for node, key := range []string{"0123456789abcdef", test.second} {
				if key == "" {
					continue
				}
				file := filepath.Join(t.TempDir(), "key")
				if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
					t.Fatal(err)
				}
				s.more[node] = []string{"EGRESS_STANDBY_KEY_FILE=" + file}
			}
			s.start()
			const remedy = "ive all routers the same EGRESS_STANDBY_KEY_FILE"
			s.wantReported(0, diagnose.KeysDiffer, "expected heartbeats of the key of EGRESS_STANDBY_KEY_FILE, found those of 10.128.0.102 "+test.finds, remedy)
			s.wantReported(1, diagnose.KeysDiffer, "expected heartbeats "+test.expects, remedy)
		})
	}
}

// Two routers with one hardware address name it.
func TestStandbySameMAC(t *testing.T) {
	s := newSeveral(t)
	mac, err := s.site.MAC(0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.site.SetMAC(1, mac); err != nil {
		t.Fatal(err)
	}
	s.start()
	for node := range s.site.Nodes {
		s.wantReported(node, diagnose.SameMAC, fmt.Sprintf("found %s of this router for %s too", mac, s.site.Nodes[1-node].Addr), "a hardware address of its own: leave it out")
	}
}

// Macvlans in mode private on one NIC do not reach each other, which a diagnosis of the standby
// names; in mode bridge they do.
func TestStandbyPrivateMacvlans(t *testing.T) {
	for name, mode := range map[string]netlink.MacvlanMode{"private": netlink.MACVLAN_MODE_PRIVATE, "bridge": netlink.MACVLAN_MODE_BRIDGE} {
		t.Run(name, func(t *testing.T) {
			s := newSeveral(t)
			for node := range s.site.Nodes {
				if err := s.site.MoveMacvlan(node, 0, mode); err != nil {
					t.Fatal(err)
				}
			}
			s.start()
			active, standby := s.roles()
			if mode == netlink.MACVLAN_MODE_PRIVATE {
				s.want(standby, diagnose.RoutersApart, fmt.Sprintf("expected an answer of %s, which holds it by its heartbeats", s.site.Nodes[active].Addr), "make their macvlans in mode bridge")
				return
			}
			if d := s.diagnosed(standby); !d.OK || d.Fault != "" {
				t.Errorf("in mode bridge: %+v", d)
			}
		})
	}
}
