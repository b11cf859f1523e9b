package faults_test

import (
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/faults"
)

// flood sends heartbeats of a stranger, a pod that is no router, to all routers of a site until the
// returned function is called. Its interval is another one: routers that differ wait for the largest
// interval of all, and hand over no faster than after a loss.
func flood(t *testing.T, s *lab.Site) (stop func()) {
	t.Helper()
	var conn *net.UDPConn
	try(t, s.Client.Do(func() (err error) {
		conn, err = net.ListenUDP("udp4", nil)
		return err
	}))
	done, running := make(chan struct{}), new(sync.WaitGroup)
	running.Go(func() {
		ticker := time.NewTicker(time.Millisecond)
		defer ticker.Stop()
		for h := (election.Heartbeat{ID: 1, MAC: [6]byte{2, 1, 1, 1, 1, 1}, Interval: election.MaxInterval}); ; h.Sequence++ {
			select {
			case <-done:
				return
			case <-ticker.C:
			}
			for _, n := range s.Nodes {
				_, _ = conn.WriteToUDPAddrPort(h.Append(nil, nil), netip.AddrPortFrom(n.Addr, 9467)) // an error: the router does not listen yet
			}
		}
	})
	return func() {
		close(done)
		running.Wait()
		_ = conn.Close()
	}
}

// A stranger that sends heartbeats while routers start, each of which knows the others' addresses,
// changes nothing: the address is handed over.
func TestStranger(t *testing.T) {
	plain := program(t)
	stop := func() {}
	ring, err := faults.Build(2, false, func(s *lab.Site, node int) *exec.Cmd {
		if node == 0 {
			stop = flood(t, s)
		}
		cmd := plain(s, node)
		cmd.Env = append(cmd.Env, "EGRESS_STANDBY_INTERVAL=100ms")
		return cmd
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	defer func() { stop() }()
	// A router that is not ready yet, or slow on a busy machine, takes the address over otherwise.
	const attempts = 10
	for attempt := 0; !strings.Contains(ring.Logs(), "address handed over"); attempt++ {
		if attempt == attempts {
			t.Fatalf("the address was not handed over\n%s", ring.Logs())
		}
		try(t, ring.AwaitTraffic(t.Context()))
		ring.Judge()
		holder := ring.Holder()
		try(t, ring.Routers[holder].Terminate())
		awaitTakeover(t, ring, holder)
		ring.Routers[holder].AwaitEnd()
		restart(t, ring, holder)
	}
}
