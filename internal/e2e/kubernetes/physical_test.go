package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/e2e/who"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// A physical is the physical network that the first node has a NIC on, and others with plug:
//
//	node                     gateway                          outside
//	nic 192.168.12.10/24 --- port-NODE
//	                         lan0 192.168.12.1/24, .7
//	                         wan0 198.51.100.1/30 ----------- wan0 198.51.100.2/30
//	                                                          lo   203.0.113.25, .26, .27, .53, 10.0.0.99
//
// The ports are those of lan0, a bridge. The gateway is a firewall that lets only the reserved addresses through to the servers.
// The node has a route to them too, and translates the source of its pods on it: without
// a router, connections reach the firewall with the node's address and are refused.
// 192.168.12.7 is an intruder.
type physical struct {
	lab              *lab.Lab
	node             *netns.Namespace
	gateway, outside *netns.Namespace
	frames           *lab.Capture // on lan0
	made             bool         // newPhysical created the NIC
}

// firstPort is the port of lan0 to the first node.
const firstPort = "port-first"

var (
	reserved = netip.MustParseAddr("192.168.12.99")
	nodeAddr = netip.MustParseAddr("192.168.12.10")
	second   = netip.MustParseAddr("192.168.12.98") // of another router
	gateway  = netip.MustParseAddr("192.168.12.1")
	intruder = netip.MustParseAddr("192.168.12.7")
	servers  = []string{
		"203.0.113.25:80", "203.0.113.26:80", "203.0.113.26:443", "203.0.113.27:80", "203.0.113.27:100", "203.0.113.27:443", "203.0.113.27:9000",
	}
)

// nameServer is the name server of the site.
const nameServer = "203.0.113.53"

// names are the records of the name server.
var names = who.Names{
	"example.com.":        "203.0.113.27",
	"foobar.example.com.": "203.0.113.26",
	"www.example.org.":    "203.0.113.25",
}

// firewall is the nftables rule set of the gateway.
const firewall = `
table ip firewall {
	chain forward {
		type filter hook forward priority 0; policy drop;
		ct state established,related accept
		ip saddr { 192.168.12.98, 192.168.12.99 } accept
		ip daddr 203.0.113.53 meta l4proto { tcp, udp } th dport 53 accept
		reject with icmp admin-prohibited
	}
}
`

// masquerade is that of the node: the one of a cluster may be for other links only.
const masquerade = `
table ip egress-router-e2e
delete table ip egress-router-e2e
table ip egress-router-e2e {
	chain postrouting {
		type nat hook postrouting priority 100
		oifname "NIC" ip saddr != 192.168.12.0/24 masquerade
	}
}
`

// newPhysical creates the physical network. close also closes node, which the caller
// opens.
func newPhysical(node *netns.Namespace, nic string) (p *physical, err error) {
	p = &physical{lab: &lab.Lab{}, node: node}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.gateway, err = netns.New(); err != nil {
		return p, err
	}
	if p.outside, err = netns.New(); err != nil {
		return p, err
	}
	if err := p.run(node, "", "ip", "link", "show", "dev", nic); err == nil {
		return p, fmt.Errorf("link %q exists on the node: set E2E_NIC to another name", nic)
	}
	// A new namespace inherits the machine's IPv4 settings.
	configure := "sysctl -q -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0 net.ipv6.conf.all.disable_ipv6=1 net.ipv4.ip_forward="
	for _, part := range []struct {
		in       *netns.Namespace
		commands string
	}{
		{p.gateway, configure + "1"},
		{p.outside, configure + "0"},
		{node, `
			ip link add ` + nic + ` type veth peer name ` + firstPort + ` netns ` + fileOf(p.gateway) + `
			ip address add 192.168.12.10/24 dev ` + nic + `
			ip link set ` + nic + ` up
			ip route add 203.0.113.0/24 via 192.168.12.1`},
		{p.gateway, `
			ip link set lo up
			ip link add lan0 address 02:00:c0:a8:0c:01 type bridge
			ip address add 192.168.12.1/24 dev lan0
			ip address add 192.168.12.7/24 dev lan0
			ip link set lan0 up
			ip link set ` + firstPort + ` master lan0 up
			ip link add wan0 type veth peer name wan0 netns ` + fileOf(p.outside) + `
			ip address add 198.51.100.1/30 dev wan0
			ip link set wan0 up
			ip route add 203.0.113.0/24 via 198.51.100.2
			ip route add 10.0.0.99/32 via 198.51.100.2`},
		{p.outside, `
			ip link set lo up
			ip address add 198.51.100.2/30 dev wan0
			ip link set wan0 up
			ip route add default via 198.51.100.1
			ip address add 203.0.113.25/32 dev lo
			ip address add 203.0.113.26/32 dev lo
			ip address add 203.0.113.27/32 dev lo
			ip address add 10.0.0.99/32 dev lo
			ip address add ` + nameServer + `/32 dev lo`},
	} {
		for line := range strings.Lines(part.commands) {
			if words := strings.Fields(line); len(words) > 0 {
				if err := p.run(part.in, "", words...); err != nil {
					return p, err
				}
				p.made = p.made || part.in == node
			}
		}
	}
	if err := p.run(p.gateway, firewall, "nft", "-f", "-"); err != nil {
		return p, err
	}
	if err := p.run(node, strings.Replace(masquerade, "NIC", nic, 1), "nft", "-f", "-"); err != nil {
		return p, err
	}
	for _, s := range servers {
		if err := who.ServeHTTP(p.outside, s); err != nil {
			return p, err
		}
	}
	if err := who.ServeHTTPS(p.outside, "203.0.113.25:443"); err != nil {
		return p, err
	}
	for _, s := range []string{"203.0.113.27:53", "10.0.0.99:80"} {
		if err := who.ServeUDP(p.outside, s); err != nil {
			return p, err
		}
	}
	if err := who.ServeDatagrams(p.outside, nameServer+":53", names.Answer); err != nil {
		return p, err
	}
	p.frames, err = p.lab.Capture(p.gateway, "lan0")
	return p, err
}

// fileOf returns the name of a namespace's file, for programs of the machine.
func fileOf(n *netns.Namespace) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.Fd()) }

// run runs a program in a namespace.
func (p *physical) run(in *netns.Namespace, stdin string, args ...string) error {
	_, err := p.output(in, stdin, args...)
	return err
}

// output runs a program in a namespace, and returns its output.
func (p *physical) output(in *netns.Namespace, stdin string, args ...string) (string, error) {
	var out strings.Builder
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
	if err := p.lab.Run(in, cmd); err != nil {
		return "", fmt.Errorf("run %q: %w\n%s", strings.Join(args, " "), err, &out)
	}
	return out.String(), nil
}

// close deletes the NIC, and with it the node's address and route on it.
func (p *physical) close() {
	if p.made {
		_ = p.run(p.node, "", "ip", "link", "delete", nic)
	}
	_ = p.run(p.node, "", "nft", "delete", "table", "ip", "egress-router-e2e") // deleted already, or never there
	p.lab.Close()
	for _, n := range []*netns.Namespace{p.node, p.gateway, p.outside} {
		if n != nil {
			_ = n.Close()
		}
	}
}

// guard checks, when the test ends, that every packet to a server during the test had
// the reserved address as its source, or another one of the test's routers.
func guard(t *testing.T, others ...netip.Addr) {
	t.Helper()
	before := len(theNetwork.frames.Frames())
	t.Cleanup(func() {
		for _, f := range theNetwork.frames.Frames()[before:] {
			packet, ok := f.IPv4()
			if !ok || f.Outgoing || packet.Src.Addr() == reserved || slices.Contains(others, packet.Src.Addr()) {
				continue
			}
			if slices.ContainsFunc(servers, func(s string) bool { return netip.MustParseAddrPort(s).Addr() == packet.Dst.Addr() }) {
				t.Errorf("packet with another source: %s", f)
			}
		}
	})
}

// wantRefused checks that without a router a client's connections reach the firewall
// with the node's address, and no server. It proves that guard can fail.
func wantRefused(t *testing.T) {
	t.Helper()
	before := len(theNetwork.frames.Frames())
	if a, err := ask("client", "tcp", servers[0]); err == nil {
		t.Fatalf("answer %v without a router, want a refusal", a)
	}
	if !slices.ContainsFunc(theNetwork.frames.Frames()[before:], func(f lab.Frame) bool {
		packet, ok := f.IPv4()
		return ok && packet.Src.Addr() == nodeAddr && packet.Dst.String() == servers[0]
	}) {
		t.Fatal("no packet of the node at the firewall without a router")
	}
}

// wantClosed checks that a host on the physical network reaches no port of the reserved
// address, which refuses TCP, and no pod through it.
func wantClosed(t *testing.T, ports ...string) {
	t.Helper()
	listener := pod(t, "listener").Status.PodIP
	way := []string{"ip", "route", "replace", listener + "/32", "via", reserved.String()}
	if err := theNetwork.run(theNetwork.gateway, "", way...); err != nil {
		t.Fatal(err)
	}
	defer func() {
		way[2] = "delete"
		if err := theNetwork.run(theNetwork.gateway, "", way...); err != nil {
			t.Error(err)
		}
	}()
	before := len(theNetwork.frames.Frames())
	dial := func(network, target string, local net.Addr) error {
		return theNetwork.gateway.Do(func() error {
			dialer := net.Dialer{Timeout: 500 * time.Millisecond, LocalAddr: local}
			conn, err := dialer.DialContext(context.Background(), network, target)
			if err == nil {
				_, err = conn.Write([]byte("intruder"))
				_ = conn.Close()
			}
			return err
		})
	}
	for _, port := range ports {
		target := reserved.String() + ":" + port
		if err := dial("tcp4", target, &net.TCPAddr{IP: intruder.AsSlice()}); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("connection from the physical network to %s: %v, want a refusal", target, err)
		}
	}
	if err := dial("udp4", listener+":9999", &net.UDPAddr{IP: intruder.AsSlice()}); err != nil {
		t.Error(err)
	}
	macOf(t) // fails without a neighbour entry of the reserved address

	// Only TCP is answered, by a reset.
	for _, f := range theNetwork.frames.Frames()[before:] {
		if packet, ok := f.IPv4(); ok && packet.Src.Addr() == reserved && packet.Dst.Addr() == intruder && packet.Protocol != unix.IPPROTO_TCP {
			t.Errorf("answer to the physical network: %s", f)
		}
	}
	// A later datagram of another pod arrives, so the listener has received all earlier ones.
	text := "client-" + strconv.FormatInt(time.Now().UnixNano(), 10)
	if _, err := peer("send", listener+":9999", text); err != nil {
		t.Fatal(err)
	}
	await(t, "a datagram of another pod", func() error {
		log := kubectl(t, "logs", "listener")
		if !strings.Contains(log, text+" from ") {
			return errors.New("log of the listener: " + log)
		}
		return nil
	})
	if log := kubectl(t, "logs", "listener"); strings.Contains(log, "intruder") {
		t.Errorf("a pod received a datagram from the physical network: %s", log)
	}
}

// askWhoHas broadcasts an ARP request for the reserved address every 50 ms until the
// test ends. Every host that has the address answers (RFC 826), also one that sends no
// other frames.
func askWhoHas(t *testing.T) {
	t.Helper()
	var socket int
	var lan *net.Interface
	err := theNetwork.gateway.Do(func() (err error) {
		if lan, err = net.InterfaceByName("lan0"); err != nil {
			return err
		}
		socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	question, err := arp.RequestFor(reserved, lan.HardwareAddr, gateway)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			// Sending fails if the NIC is down, and no host is reachable then.
			_ = unix.Sendto(socket, question, 0, &unix.SockaddrLinklayer{Ifindex: lan.Index})
			time.Sleep(50 * time.Millisecond)
		}
	}()
	t.Cleanup(func() { cancel(); <-done; _ = unix.Close(socket) })
}
