//go:build kernels

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// The physical network of lossy delays each packet and loses some, in both directions.
const (
	lossyDelay = 50 * time.Millisecond
	lossyShare = 10 // percent
)

// A side is a link that sends by a network.
type side struct {
	ns   *netns.Namespace
	name string
}

// disturb has the kernel delay and lose what leaves by each of the links (tc-netem(8)). The function
// that it returns has the number of packets lost so far.
func disturb(t *testing.T, l *lab.Lab, sides []side, how netlink.NetemQdiscAttrs) (lost func() uint32) {
	t.Helper()
	each := func(do func(h *netlink.Handle, link netlink.Link) error) {
		t.Helper()
		for _, s := range sides {
			h, err := l.Netlink(s.ns)
			if err != nil {
				t.Fatal(err)
			}
			link, err := h.LinkByName(s.name)
			if err == nil {
				err = do(h, link)
			}
			h.Close()
			if err != nil {
				t.Fatalf("netem of %s: %v", s.name, err)
			}
		}
	}
	each(func(h *netlink.Handle, link netlink.Link) error {
		attrs := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
		return h.QdiscReplace(netlink.NewNetem(attrs, how))
	})
	return func() (lost uint32) {
		t.Helper()
		each(func(h *netlink.Handle, link netlink.Link) error {
			qdiscs, err := h.QdiscList(link)
			for _, q := range qdiscs {
				if s := q.Attrs().Statistics; q.Type() == "netem" && s != nil && s.Queue != nil {
					lost += s.Queue.Drops
				}
			}
			return err
		})
		return lost
	}
}

// lossy makes the physical network lossy, and returns the number of packets lost so far.
func lossy(p *labtest.Pod) (lost func() uint32) {
	p.Helper()
	return disturb(p.T, p.Lab, []side{{p.Lab.Outside, lab.LANLink}, {p.Lab.Router, "macvlan0"}},
		netlink.NetemQdiscAttrs{Latency: uint32(lossyDelay.Microseconds()), Loss: lossyShare})
}

// lossyText is what a client of a lossy network sends or gets: many segments.
var lossyText = strings.Repeat("0123456789abcde\n", 4<<10)

// wantAllThrough runs some clients at a time, of which each gets all of its answer over a lossy
// network, and none earlier than such a network has it.
func wantAllThrough(p *labtest.Pod, lost func() uint32, client func(p *labtest.Pod) error) {
	p.Helper()
	const clients = 8
	before := lost()
	p.Run("clients", func(t *testing.T) {
		for n := range clients {
			t.Run(strconv.Itoa(n), func(t *testing.T) {
				t.Parallel()
				begin := time.Now()
				if err := client(p.For(t)); err != nil {
					t.Error(err)
				}
				if took := time.Since(begin); took < 2*lossyDelay {
					t.Errorf("answer after %v, want at least a round trip of %v", took, 2*lossyDelay)
				}
			})
		}
	})
	if lost() == before {
		p.Error("the network has lost no packet")
	}
}

// wantEcho has the server at the other end of a connection repeat a text of many segments.
func wantEcho(conn net.Conn, r *bufio.Reader) error {
	if err := conn.SetDeadline(time.Now().Add(labtest.Patience)); err != nil {
		return err
	}
	if a, err := lab.ReadAnswer(r); err != nil || a.Peer.Addr() != lab.Source {
		return fmt.Errorf("answer %v, want one that sees %s, %w", a, lab.Source, err)
	}
	written := make(chan error, 1)
	go func() {
		_, err := io.WriteString(conn, lossyText)
		written <- err
	}()
	text := make([]byte, len(lossyText))
	n, err := io.ReadFull(r, text)
	if err != nil || string(text) != lossyText {
		return fmt.Errorf("%d of %d bytes, or others, %w", n, len(lossyText), err)
	}
	return <-written
}

// Clients of the HTTP proxy get whole responses, and tunnels carry all bytes, over a network that
// delays and loses packets.
func TestHTTPProxyOverLossyNetwork(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, lossyText) })}
	if err := p.Lab.Outside.Do(func() error {
		l, err := net.Listen("tcp4", "203.0.113.25:8081")
		if err == nil {
			go func() { _ = server.Serve(l) }()
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	httpProxy(p, "203.0.113.0/24", proxyAddr)
	lost := lossy(p)
	wantAllThrough(p, lost, func(p *labtest.Pod) error {
		r := request(p, p.Lab.Client, proxyAddr, "GET http://203.0.113.25:8081/ HTTP/1.1\r\nHost: x\r\n\r\n")
		response, err := http.ReadResponse(r, nil)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(response.Body)
		if string(body) != lossyText {
			return fmt.Errorf("%d of %d bytes, status %d, %w", len(body), len(lossyText), response.StatusCode, err)
		}
		return err
	})
	wantAllThrough(p, lost, func(p *labtest.Pod) error {
		conn := p.Dial(p.Lab.Client, "tcp", proxyAddr)
		if _, err := io.WriteString(conn, "CONNECT 203.0.113.25:80 HTTP/1.1\r\n\r\n"); err != nil {
			return err
		}
		r := bufio.NewReader(conn)
		if response, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect}); err != nil || response.StatusCode != http.StatusOK {
			return fmt.Errorf("CONNECT: %v, %w", response, err)
		}
		return wantEcho(conn, r)
	})
}

// Connections by the DNS proxy carry all bytes over a network that delays and loses packets.
func TestDNSProxyOverLossyNetwork(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	x := startDNSProxy(p, map[string]string{"EGRESS_DNS_PROXY_DESTINATION": "8080 203.0.113.25 80\n"})
	x.await(8080, "203.0.113.25:80")
	wantAllThrough(p, lossy(p), func(p *labtest.Pod) error {
		conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
		return wantEcho(conn, bufio.NewReader(conn))
	})
}

// The probes of destinations over a network that delays and loses packets take a round trip at least,
// find those that answer, and find them silent while the network loses all.
func TestProbesOverLossyNetwork(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	lost := lossy(p)
	p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n"
	p.Env["EGRESS_HEALTH_LISTEN"], p.Env["EGRESS_PROBE"], p.Env["EGRESS_PROBE_INTERVAL"] = ":9465", "tcp", "100ms"
	p.Start("legacy").AwaitLog(1, "msg=ready")
	const up, times = `egress_router_destination_up{destination="203.0.113.25:80",port="80",protocol="tcp"}`, "egress_router_probe_connect_seconds_"
	p.Until("probes cross the network, and it loses some", func() bool {
		return strings.Contains(p.Metrics(), up+" 1\n") && p.Metric(times+"count") >= 10 && lost() > 0
	})
	// The sum is read later, and without its fraction.
	if n, sum := p.Metric(times+"count"), p.Metric(times+"sum"); float64(sum+1) < float64(n)*(2*lossyDelay).Seconds() {
		p.Errorf("%d probes took %d s, want at least a round trip of %v each", n, sum, 2*lossyDelay)
	}
	disturb(t, p.Lab, []side{{p.Lab.Outside, lab.LANLink}}, netlink.NetemQdiscAttrs{Loss: 100})
	p.Until("the probes find nothing", func() bool {
		return strings.Contains(p.Metrics(), up+" 0\n") && p.Metric(`egress_router_probe_failures_total{destination="203.0.113.25:80",protocol="tcp",reason="silent"}`) > 0
	})
	disturb(t, p.Lab, []side{{p.Lab.Outside, lab.LANLink}}, netlink.NetemQdiscAttrs{})
	p.Until("the destination is up again", func() bool { return strings.Contains(p.Metrics(), up+" 1\n") })
}

// Two routers agree on a holder while both their networks delay, lose, repeat and reorder packets, and
// the other one takes over when the holder is killed.
func TestStandbyOverLossyNetwork(t *testing.T) {
	s := newSeveral(t)
	s.start()
	s.roles()
	var sides []side
	for _, n := range s.site.Nodes {
		sides = append(sides, side{n.Pod, "eth0"}, side{n.Pod, "macvlan0"})
	}
	lost := disturb(t, s.site.Lab, sides, netlink.NetemQdiscAttrs{
		Latency: uint32(lossyDelay.Microseconds()), Jitter: uint32(lossyDelay.Microseconds()) / 2, Loss: lossyShare, Duplicate: lossyShare, ReorderProb: lossyShare, Gap: 3,
	})
	s.until("the networks lose packets", func() bool { return lost() >= 20 })
	active, standby := s.roles()
	if err := s.routers[active].Kill(); err != nil {
		t.Fatal(err)
	}
	s.until("the other router takes over", func() bool {
		return strings.Contains(s.run(standby, "health"), "active: this router holds the addresses")
	})
	// A client gets an answer by it, with the reserved address.
	ctx, cancel := context.WithTimeout(t.Context(), labtest.Patience)
	defer cancel()
	if _, err := s.site.Serve(s.site.Server, "tcp", netip.AddrPortFrom(lab.Remote[0], 7000)); err != nil {
		t.Fatal(err)
	}
	a, err := s.site.Ask(ctx, s.site.Client, "tcp", netip.AddrPortFrom(s.site.Nodes[standby].Addr, 7000))
	if err != nil || a.Peer.Addr() != lab.Source {
		t.Errorf("answer %v, error %v; want one that sees %s", a, err, lab.Source)
	}
}
