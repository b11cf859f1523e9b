package faults_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/faults"
	"github.com/egress-router/egress-router/internal/spec"
)

// carrying returns the commands of routers that carry each other's connections.
func carrying(t *testing.T, backend string) func(*lab.Site, int) *exec.Cmd {
	t.Helper()
	plain := program(t)
	return func(s *lab.Site, node int) *exec.Cmd {
		cmd := plain(s, node)
		cmd.Env = append(cmd.Env, "EGRESS_STANDBY_CARRY=vxlan", "EGRESS_ROUTER_BACKEND="+backend) // the last of two counts
		return cmd
	}
}

// limit is a generous time for a take-over.
const limit = 2 * time.Minute

// An event ends that a router holds the address, and begins and ends on its node.
type event struct {
	name       string
	begin, end func(t *testing.T, r *faults.Ring, node int)
	node       bool // what enters by the node is lost, too
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func restart(t *testing.T, r *faults.Ring, node int) {
	t.Helper()
	try(t, r.Routers[node].Start())
}

var events = []event{
	{"process killed", func(t *testing.T, r *faults.Ring, node int) { try(t, r.Routers[node].Kill()) }, restart, false},
	{"planned", func(t *testing.T, r *faults.Ring, node int) { try(t, r.Routers[node].Terminate()) }, func(t *testing.T, r *faults.Ring, node int) {
		if !r.Routers[node].Running() {
			t.Error("the router has ended before its connections")
		}
		try(t, r.Routers[node].Kill())
		restart(t, r, node)
	}, false},
	{
		"process frozen", func(t *testing.T, r *faults.Ring, node int) { try(t, r.Routers[node].Signal(syscall.SIGSTOP)) },
		func(t *testing.T, r *faults.Ring, node int) { try(t, r.Routers[node].Signal(syscall.SIGCONT)) }, false,
	},
	{
		"link lost", func(t *testing.T, r *faults.Ring, node int) { try(t, r.Site.SetPort(r.Site.Nodes[node].LAN, false)) },
		func(t *testing.T, r *faults.Ring, node int) { try(t, r.Site.SetPort(r.Site.Nodes[node].LAN, true)) }, false,
	},
	{"node lost", func(t *testing.T, r *faults.Ring, node int) {
		n := r.Site.Nodes[node]
		try(t, r.Routers[node].Signal(syscall.SIGSTOP))
		try(t, r.Site.SetPort(n.LAN, false))
		try(t, r.Site.SetPort(n.ClusterPort, false))
		try(t, r.Routers[node].Kill())
	}, nil, true},
}

// Held connections live through everything that happens to the holder of the address, except the
// loss of the node by which they enter.
func TestConnectionsLive(t *testing.T) {
	for _, backend := range []string{"nftables", "iptables"} {
		t.Run(backend, func(t *testing.T) {
			ring, err := faults.Build(2, false, carrying(t, backend))
			if err != nil {
				t.Fatal(err)
			}
			defer ring.Close()
			if err := ring.AwaitTraffic(t.Context()); err != nil {
				t.Fatal(err)
			}
			ring.Judge()
			var held []*faults.Connections
			defer func() {
				for _, c := range held {
					if c != nil {
						c.Close()
					}
				}
			}()
			for node := range 2 {
				c, err := faults.Hold(ring.Site, node, 15, uint16(5000+node), faults.Pace)
				if err != nil {
					t.Fatal(err, ring.Logs())
				}
				held = append(held, c)
			}
			want := func(what string) {
				t.Helper()
				for node, c := range held {
					if c != nil {
						await(t, ring, c, fmt.Sprintf("%s: connections by router %d", what, node+1))
					}
				}
			}
			want("before")
			for _, e := range events {
				holder := ring.Holder()
				t.Logf("%s: of router %d", e.name, holder+1)
				e.begin(t, ring, holder)
				for end := time.Now().Add(limit); ring.Holder() == holder; time.Sleep(time.Millisecond) {
					for _, v := range ring.Judge() {
						t.Errorf("%s: violation: %s", e.name, v)
					}
					if time.Now().After(end) {
						t.Fatalf("%s: no router has taken over\n%s", e.name, ring.Logs())
					}
				}
				if e.node { // what enters there is lost
					held[holder].Close()
					held[holder] = nil
				}
				want(e.name)
				if e.end != nil {
					e.end(t, ring, holder)
					want("after " + e.name)
				}
			}
			for node := range 2 {
				wantUntracked(t, ring, node)
			}
			found, err := ring.Stop()
			if err != nil {
				t.Error(err)
			}
			for _, v := range found {
				t.Errorf("violation: %s", v)
			}
			if t.Failed() {
				t.Log(ring.Logs())
			}
		})
	}
}

// wantUntracked checks that the tunnel's own packets have no entries in a pod's connection table.
func wantUntracked(t *testing.T, ring *faults.Ring, node int) {
	t.Helper()
	err := ring.Site.Nodes[node].Pod.Do(func() error {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
		for _, f := range flows {
			if f.Forward.DstPort == uint16(spec.CarryPort) {
				t.Errorf("router %d tracks the tunnel: %s", node+1, f)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A router that is asked to end hands over, carries the connections that enter by it, and ends
// with the last one, or as soon as it is asked again. Until then it follows its destinations.
func TestDrain(t *testing.T) {
	carries := carrying(t, "nftables")
	file := filepath.Join(t.TempDir(), "destinations")
	write := func(lines ...string) {
		t.Helper()
		try(t, os.WriteFile(file, []byte(strings.Join(append(lines, lab.Remote[0].String()), "\n")), 0o600))
	}
	write()
	ring, err := faults.Build(2, false, func(s *lab.Site, node int) *exec.Cmd {
		cmd := carries(s, node)
		cmd.Env = append(cmd.Env, "EGRESS_AUDIT_LOG=true", "EGRESS_DESTINATION=", "EGRESS_DESTINATION_FILE="+file, "EGRESS_HEALTH_LISTEN=127.0.0.1:9465")
		return cmd
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	if err := ring.AwaitTraffic(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, again := range []bool{false, true} {
		ring.Judge()
		holder := ring.Holder()
		held, err := faults.Hold(ring.Site, holder, 200, 5000, faults.Pace)
		if err != nil {
			t.Fatal(err, ring.Logs())
		}
		await(t, ring, held, "before")
		try(t, ring.Routers[holder].Terminate())
		for end := time.Now().Add(limit); ring.Holder() == holder; time.Sleep(time.Millisecond) {
			ring.Judge()
			if time.Now().After(end) {
				t.Fatalf("no router has taken over\n%s", ring.Logs())
			}
		}
		await(t, ring, held, "handed over")
		if !ring.Routers[holder].Running() {
			t.Error("the router has ended before its connections")
		}
		logged := func(text string, times int) int {
			t.Helper()
			for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
				log := ring.Routers[holder].Log()
				_, log, _ = strings.Cut(log[strings.LastIndex(log, faults.Started):], "draining connections")
				if n := strings.Count(log, text); n >= times {
					return n
				}
				if time.Now().After(end) {
					t.Fatalf("waiting for %q\n%s", text, log)
				}
			}
		}
		const follows = "destinations changed"
		logged("connection begins", 1) // the drain has begun, and clients go on
		before := logged(follows, 0)
		write(fmt.Sprintf("%d tcp %s 80", 81+i, lab.Remote[1]))
		logged(follows, before+1)
		figures := scrape(t, ring, holder)
		for _, name := range []string{"sent_packets", "sent_bytes", "received_packets", "received_bytes"} {
			if figures["egress_router_standby_"+name+"_total"] == 0 {
				t.Errorf("%s is 0", name)
			}
		}
		if n := figures["egress_router_standby_draining_connections"]; n != 200 {
			t.Errorf("%v connections drain, want 200", n)
		}
		ended := "connections drained"
		if again {
			ended = "asked to end at once"
			try(t, ring.Routers[holder].Terminate())
			ring.Routers[holder].AwaitEnd()
			held.Close()
		} else {
			held.Close()
			ring.Routers[holder].AwaitEnd()
		}
		log := ring.Routers[holder].Log()
		_, drain, is := strings.Cut(log, "draining connections")
		if !is || !strings.Contains(drain, ended) || !again && !strings.Contains(drain, "connection begins") { // clients go on
			t.Errorf("log:\n%s", log)
		}
		restart(t, ring, holder)
	}
	found, err := ring.Stop()
	if err != nil || len(found) > 0 {
		t.Errorf("violations %v, %v", found, err)
	}
}

// Routers that are all asked to end do not wait for each other's connections, which no router carries
// any more.
func TestDrainAll(t *testing.T) {
	ring, err := faults.Build(2, false, carrying(t, "nftables"))
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	try(t, ring.AwaitTraffic(t.Context()))
	for node := range ring.Routers {
		held, err := faults.Hold(ring.Site, node, 3, uint16(5000+node), faults.Pace)
		if err != nil {
			t.Fatal(err, ring.Logs())
		}
		defer held.Close()
	}
	for _, r := range ring.Routers {
		try(t, r.Terminate())
	}
	for i, r := range ring.Routers {
		for end := time.Now().Add(limit); r.Running(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("router %d has not ended\n%s", i+1, ring.Logs())
			}
		}
		if !strings.Contains(r.Log(), "connections not drained") {
			t.Errorf("router %d:\n%s", i+1, r.Log())
		}
	}
}

// A router that has been started again, and takes the address over before it hears all others, does
// not reset the connections of those that it does not know yet.
func TestUnknownRouter(t *testing.T) {
	ring, err := faults.Build(3, false, carrying(t, "nftables"))
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	try(t, ring.AwaitTraffic(t.Context()))
	const restarted, unknown, third = 0, 1, 2
	held, err := faults.Hold(ring.Site, unknown, 9, 5000, faults.Pace)
	if err != nil {
		t.Fatal(err, ring.Logs())
	}
	defer held.Close()
	await(t, ring, held, "before")
	logged := func(what string) {
		t.Helper()
		for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
			log := ring.Routers[restarted].Log()
			if strings.Contains(log[strings.LastIndex(log, faults.Started):], what) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("waiting for %q\n%s", what, ring.Logs())
			}
		}
	}
	// Until it carries to both: what its kernel has already, it does not set up and log again.
	for _, other := range []int{unknown, third} {
		logged(ring.Site.Nodes[other].Addr.String() + " (ports ")
	}
	n := ring.Site.Nodes[unknown]
	var losses []lab.Loss
	for _, in := range []bool{false, true} {
		losses = append(losses, lab.Loss{Port: n.ClusterPort, In: in, Kind: lab.LoseHeartbeats, Percent: 100})
	}
	try(t, ring.Site.SetPort(n.LAN, false))
	try(t, ring.Site.Lose(losses...))
	try(t, ring.Routers[restarted].Kill())
	restart(t, ring, restarted)
	logged("to " + ring.Site.Nodes[third].Addr.String() + " (ports ") // the first of its routers
	try(t, ring.Routers[third].Kill())
	logged("role=active")
	// What the server sends arrives there.
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		list, out := exec.Command("nft", "list", "chain", "ip", "egress-router-carry", "spare"), new(strings.Builder)
		list.Stdout = out
		try(t, ring.Site.Run(ring.Site.Nodes[restarted].Pod, list))
		if strings.Contains(strings.ReplaceAll(out.String(), "packets 0 ", ""), "packets ") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("nothing arrives for the unknown router:\n%s\n%s", out, ring.Logs())
		}
	}
	try(t, ring.Site.Lose())
	try(t, ring.Site.SetPort(n.LAN, true))
	await(t, ring, held, "another router does not know that of the connections")
}

// scrape returns the metrics without labels of a router.
func scrape(t *testing.T, ring *faults.Ring, node int) map[string]float64 {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DialContext: func(_ context.Context, network, address string) (conn net.Conn, err error) {
		err = ring.Site.Nodes[node].Pod.Do(func() (err error) {
			conn, err = net.Dial(network, address)
			return err
		})
		return conn, err
	}}}
	defer client.CloseIdleConnections()
	var text []byte
	for begin := time.Now(); ; { // the router closes a connection whose request comes late
		response, err := client.Get("http://127.0.0.1:9465/metrics")
		if err == nil {
			text, err = io.ReadAll(response.Body)
			_ = response.Body.Close()
		}
		if err == nil {
			break
		}
		if time.Since(begin) > lab.Patience {
			t.Fatal(err)
		}
	}
	figures := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if f, err := strconv.ParseFloat(value, 64); err == nil {
			figures[name] = f
		}
	}
	return figures
}

// await checks that no connection is lost.
func await(t *testing.T, ring *faults.Ring, held *faults.Connections, what string) {
	t.Helper()
	lost, gap, why := held.Await(limit)
	t.Logf("%s: %d lost, gap %d ms", what, lost, gap.Milliseconds())
	if lost > 0 {
		t.Fatalf("%s: %d connections lost: %v\n%s", what, lost, why, ring.Logs())
	}
}
