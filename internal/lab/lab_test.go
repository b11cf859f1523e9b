package lab_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// hold is the environment variable of a second copy of this binary, which creates a lab and
// waits to be killed. Its value is the ID of the process whose namespace has the witness.
const hold = "LAB_TEST_HOLD"

func TestMain(m *testing.M) {
	if pid := os.Getenv(hold); pid != "" {
		holdLab(pid)
	}
	nstest.Main(m)
}

func newLab(t *testing.T, o lab.Options) *lab.Lab {
	t.Helper()
	l, err := lab.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func serve(t *testing.T, l *lab.Lab, ns *netns.Namespace, proto string, addr netip.Addr, port uint16) *lab.Server {
	t.Helper()
	s, err := l.Serve(ns, proto, netip.AddrPortFrom(addr, port))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// linkNames lists the links of the calling thread's namespace.
func linkNames(t *testing.T) []string {
	t.Helper()
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Name)
	}
	return names
}

// A veth whose index equals its peer's index gets its carrier up to a second late: the
// reason why labs are fast is that there is none.
func TestLinkIndexDiffersFromPeerIndex(t *testing.T) {
	l := newLab(t, lab.Options{})
	links := 0
	for name, ns := range map[string]*netns.Namespace{"client": l.Client, "far": l.Far, "router": l.Router, "node": l.Node, "outside": l.Outside} {
		h, err := l.Netlink(ns)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		list, err := h.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range list {
			a := link.Attrs()
			if a.ParentIndex == 0 { // not IFLA_LINK: loopback, bridge
				continue
			}
			links++
			if a.Index == a.ParentIndex {
				t.Errorf("link %q in %s: index %d, peer index %d, want different numbers", a.Name, name, a.Index, a.ParentIndex)
			}
		}
	}
	if links != 9 { // four veths with two ends each, one macvlan
		t.Errorf("%d links with a peer or parent, want 9", links)
	}
}

func TestNewManyAtOnce(t *testing.T) {
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			l, err := lab.New(lab.Options{})
			if err != nil {
				t.Error(err)
				return
			}
			defer l.Close()
			s, err := l.Serve(l.Node, "tcp", netip.AddrPortFrom(lab.NodeAddr, 80))
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := l.Ask(t.Context(), l.Client, "tcp", s.Addr); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

// With IPv6 the hosts reach each other in both families as without it in one, at once.
func TestIPv6Lab(t *testing.T) {
	l := newLab(t, lab.Options{IPv6: true})
	for _, test := range []struct {
		from, to *netns.Namespace
		addr     netip.Addr
		peer     netip.Addr
	}{
		{l.Client, l.Node, lab.NodeAddr6, lab.ClientAddr6},
		{l.Client, l.Far, lab.FarAddr6, lab.ClientAddr6},
		{l.Far, l.Client, lab.ClientAddr6, lab.FarAddr6},
		{l.Far, l.Router, lab.RouterAddr6, lab.FarAddr6},
		{l.Router, l.Client, lab.ClientAddr6, lab.RouterAddr6},
		{l.Node, l.Outside, lab.LANServer6, lab.NICAddr6},
		{l.Node, l.Outside, lab.Remote6[0], lab.NICAddr6},
		{l.Client, l.Node, lab.NodeAddr, lab.ClientAddr},
		{l.Node, l.Outside, lab.Remote[0], lab.NICAddr},
	} {
		for _, proto := range []string{"tcp", "udp"} {
			s := serve(t, l, test.to, proto, test.addr, 0)
			a, err := l.Ask(t.Context(), test.from, proto, s.Addr)
			if err != nil || a.Server != s.Addr || a.Peer.Addr() != test.peer {
				t.Errorf("%s %s: answer %v, error %v; want one that sees %s", proto, s.Addr, a, err, test.peer)
			}
		}
	}
}

// describe returns links with flags and addresses, routes and forwarding of a namespace.
func describe(t *testing.T, l *lab.Lab, ns *netns.Namespace) string {
	t.Helper()
	h, err := l.Netlink(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	var b strings.Builder
	links, err := h.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		a := link.Attrs()
		fmt.Fprintf(&b, "%s %s", a.Name, link.Type())
		if m, ok := link.(*netlink.Macvlan); ok && m.Mode == netlink.MACVLAN_MODE_PRIVATE {
			b.WriteString(" private")
		}
		if a.Flags&net.FlagUp == 0 {
			b.WriteString(" down")
		}
		addrs, err := h.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			t.Fatal(err)
		}
		for _, addr := range addrs {
			fmt.Fprintf(&b, " %s", addr.IPNet)
		}
		b.WriteString("\n")
	}
	routes, err := h.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		if r.Gw != nil {
			fmt.Fprintf(&b, "%s via %s\n", r.Dst, r.Gw)
		}
	}
	forward, err := l.Sysctl(ns, "net/ipv4/ip_forward")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&b, "forward %s\n", forward)
	return b.String()
}

func TestTopology(t *testing.T) {
	const router = `lo device 127.0.0.1/8
eth0 veth 10.128.0.98/23
macvlan0 macvlan private down
0.0.0.0/0 via 10.128.0.1
forward 0
`
	for _, test := range []struct {
		name    string
		options lab.Options
		ns      func(*lab.Lab) *netns.Namespace
		want    string
	}{
		{
			name: "client",
			ns:   func(l *lab.Lab) *netns.Namespace { return l.Client },
			want: "lo device 127.0.0.1/8\neth0 veth 10.128.0.71/23\n0.0.0.0/0 via 10.128.0.1\nforward 0\n",
		},
		{
			name: "node",
			ns:   func(l *lab.Lab) *netns.Namespace { return l.Node },
			want: `lo device 127.0.0.1/8
tun0 bridge 10.128.0.1/23
port-client veth
port-far veth 10.129.0.1/24
port-router veth
nic0 veth 192.168.12.10/24
0.0.0.0/0 via 192.168.12.1
forward 1
`,
		},
		{
			name: "outside",
			ns:   func(l *lab.Lab) *netns.Namespace { return l.Outside },
			want: `lo device 127.0.0.1/8 203.0.113.25/32 203.0.113.26/32 203.0.113.27/32
lan0 veth 192.168.12.1/24 192.168.12.80/24
forward 0
`,
		},
		{
			name: "router",
			ns:   func(l *lab.Lab) *netns.Namespace { return l.Router },
			want: router,
		},
		{
			name:    "router without macvlan",
			options: lab.Options{NoMacvlan: true},
			ns:      func(l *lab.Lab) *netns.Namespace { return l.Router },
			want:    strings.Replace(router, "macvlan0 macvlan private down\n", "", 1),
		},
		{
			name:    "router with other names",
			options: lab.Options{MacvlanName: "net1", ClusterName: "ens3"},
			ns:      func(l *lab.Lab) *netns.Namespace { return l.Router },
			want:    strings.NewReplacer("macvlan0", "net1", "eth0", "ens3").Replace(router),
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := newLab(t, test.options)
			if diff := cmp.Diff(test.want, describe(t, l, test.ns(l))); diff != "" {
				t.Errorf("want -, got +:\n%s", diff)
			}
		})
	}
}

// The kernel refuses a link name in the middle of build.
func TestNewFailsAndLeavesNothing(t *testing.T) {
	// Only namespaces count: the garbage collector closes the handles of processes.
	held := func() (namespaces int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(to, "net:") {
				namespaces++
			}
		}
		return namespaces
	}
	before := held()
	l, err := lab.New(lab.Options{MacvlanName: "a name with spaces"})
	if err == nil || l != nil {
		t.Fatalf("New = %v, %v, want nil and an error", l, err)
	}
	if !strings.Contains(err.Error(), `creating macvlan "a name with spaces"`) {
		t.Errorf("error = %q, want the step and its object", err)
	}
	if after := held(); after != before {
		t.Errorf("%d namespaces are held, %d were before", after, before)
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	before := linkNames(t)
	l := newLab(t, lab.Options{})
	serve(t, l, l.Outside, "tcp", lab.GatewayAddr, 80)
	sleep := exec.Command("sleep", "600")
	if err := l.Start(l.Router, sleep); err != nil {
		t.Fatal(err)
	}
	witness(t, l, "self")
	l.Close()
	if err := sleep.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Errorf("process in the lab ended with %v, want to see it killed", err)
	}
	awaitNoWitness(t)
	if diff := cmp.Diff(before, linkNames(t)); diff != "" {
		t.Errorf("links before -, after +:\n%s", diff)
	}
	l.Close() // twice is harmless
}

// witness creates a veth with one end in the namespace of a process, "self" or a number,
// and the other in the lab. It disappears when the kernel removes the lab's namespace.
func witness(t testing.TB, l *lab.Lab, pid string) {
	t.Helper()
	ns, err := netns.Open("/proc/" + pid + "/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := addWitness(l, ns); err != nil {
		t.Fatal(err)
	}
}

func addWitness(l *lab.Lab, ns *netns.Namespace) error {
	h, err := l.Netlink(l.Outside)
	if err != nil {
		return err
	}
	defer h.Close()
	veth := netlink.NewVeth(netlink.LinkAttrs{Name: "hidden"})
	veth.PeerName, veth.PeerNamespace = "witness", netlink.NsFd(ns.Fd())
	return h.LinkAdd(veth)
}

func awaitNoWitness(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(lab.Patience); ; time.Sleep(time.Millisecond) {
		if _, err := net.InterfaceByName("witness"); err != nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("link \"witness\" exists %s after the lab's end: the kernel has not removed the lab's namespaces", lab.Patience)
		}
	}
}

// holdLab is the main function of the process that TestKillLeavesNothing kills.
func holdLab(pid string) {
	l, err := lab.New(lab.Options{})
	if err == nil {
		var ns *netns.Namespace
		if ns, err = netns.Open("/proc/" + pid + "/ns/net"); err == nil {
			err = addWitness(l, ns)
		}
	}
	if err == nil {
		// If the child outlived this process, it would hold its namespace.
		err = l.Start(l.Outside, exec.Command("sleep", "600"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if _, err := os.Stdout.WriteString("ready\n"); err != nil {
		os.Exit(1)
	}
	select {}
}

func TestKillLeavesNothing(t *testing.T) {
	before := linkNames(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), hold+"="+strconv.Itoa(os.Getpid()))
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if line != "ready\n" {
		t.Fatalf("output of the process with a lab = %q, %v, want \"ready\\n\"", line, err)
	}
	if _, err := net.InterfaceByName("witness"); err != nil {
		t.Errorf("finding witness: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	awaitNoWitness(t)
	if diff := cmp.Diff(before, linkNames(t)); diff != "" {
		t.Errorf("links before -, after +:\n%s", diff)
	}
}

func TestAsk(t *testing.T) {
	l := newLab(t, lab.Options{})
	for _, test := range []struct {
		name       string
		from, at   *netns.Namespace
		addr, peer netip.Addr
	}{
		{"client to node", l.Client, l.Node, lab.NodeAddr, lab.ClientAddr},
		{"client to router", l.Client, l.Router, lab.RouterAddr, lab.ClientAddr},
		{"router to client", l.Router, l.Client, lab.ClientAddr, lab.RouterAddr},
		{"node to gateway", l.Node, l.Outside, lab.GatewayAddr, lab.NICAddr},
		{"node to LAN server", l.Node, l.Outside, lab.LANServer, lab.NICAddr},
		{"node to first remote", l.Node, l.Outside, lab.Remote[0], lab.NICAddr},
		{"node to second remote", l.Node, l.Outside, lab.Remote[1], lab.NICAddr},
		{"node to third remote", l.Node, l.Outside, lab.Remote[2], lab.NICAddr},
	} {
		for _, proto := range []string{"tcp", "udp"} {
			t.Run(test.name+" "+proto, func(t *testing.T) {
				s := serve(t, l, test.at, proto, test.addr, 8080)
				got, err := l.Ask(t.Context(), test.from, proto, s.Addr)
				if err != nil {
					t.Fatal(err)
				}
				if got.Server != netip.AddrPortFrom(test.addr, 8080) || got.Peer.Addr() != test.peer || got.Peer.Port() == 0 {
					t.Errorf("answer = %v, want from %s to %s", got, test.addr, test.peer)
				}
			})
		}
	}
}

// Outside has no route to the cluster.
func TestUntranslatedGetsNoAnswer(t *testing.T) {
	l := newLab(t, lab.Options{})
	c, err := l.Capture(l.Outside, lab.LANLink)
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, l, l.Outside, "tcp", lab.Remote[0], 80)
	// The request does arrive. On a busy machine the time may be over before it is sent.
	arrived := func(f lab.Frame) bool {
		p, ok := f.IPv4()
		return ok && p.Src.Addr() == lab.ClientAddr && p.Dst == s.Addr
	}
	for begin := time.Now(); !slices.ContainsFunc(c.Frames(), arrived); {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		a, err := l.Ask(ctx, l.Client, "tcp", s.Addr)
		cancel()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("Ask = %v, %v, want a deadline exceeded", a, err)
		}
		if time.Since(begin) > lab.Patience {
			t.Fatalf("no request arrived; frames:\n%s", c.Frames())
		}
	}
}

func TestAskErrors(t *testing.T) {
	l := newLab(t, lab.Options{})
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, proto := range []string{"tcp", "udp"} {
		t.Run(proto+" refused", func(t *testing.T) {
			_, err := l.Ask(t.Context(), l.Client, proto, netip.AddrPortFrom(lab.NodeAddr, 9))
			if !errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("error = %v, want ECONNREFUSED alone", err)
			}
		})
		t.Run(proto+" deadline", func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			start := time.Now()
			// No host has the address.
			_, err := l.Ask(ctx, l.Client, proto, netip.MustParseAddrPort("10.128.1.250:9"))
			if !errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("error = %v, want a deadline exceeded alone", err)
			}
			if took := time.Since(start); took >= lab.Patience {
				t.Errorf("took %s, want the context's 50 ms and not lab.Patience", took)
			}
		})
		t.Run(proto+" canceled", func(t *testing.T) {
			_, err := l.Ask(canceled, l.Client, proto, netip.AddrPortFrom(lab.NodeAddr, 9))
			if !errors.Is(err, context.Canceled) || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("error = %v, want canceled", err)
			}
		})
	}
	t.Run("silent", func(t *testing.T) {
		// A listener that never accepts: the kernel completes the connection.
		var listener net.Listener
		err := l.Node.Do(func() (err error) {
			listener, err = net.Listen("tcp4", netip.AddrPortFrom(lab.NodeAddr, 7).String())
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := l.Ask(ctx, l.Client, "tcp", netip.AddrPortFrom(lab.NodeAddr, 7)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("error = %v, want a deadline exceeded", err)
		}
	})
	t.Run("protocol", func(t *testing.T) {
		if _, err := l.Ask(t.Context(), l.Client, "icmp", netip.AddrPortFrom(lab.NodeAddr, 9)); err == nil {
			t.Error("Ask over icmp: no error")
		}
	})
}

func TestPatience(t *testing.T) {
	before := time.Now()
	ctx, cancel := lab.Patient(t.Context())
	defer cancel()
	after := time.Now()
	end, ok := ctx.Deadline()
	if !ok || end.Before(before.Add(lab.Patience)) || end.After(after.Add(lab.Patience)) {
		t.Errorf("deadline of a context without one: %s, %t, want %s from now", end, ok, lab.Patience)
	}
	want := before.Add(time.Hour)
	given, cancel := context.WithDeadline(t.Context(), want)
	defer cancel()
	ctx, cancel = lab.Patient(given)
	defer cancel()
	if end, ok := ctx.Deadline(); !ok || !end.Equal(want) {
		t.Errorf("deadline = %s, %t, want the given %s", end, ok, want)
	}
}

func TestServeErrors(t *testing.T) {
	l := newLab(t, lab.Options{})
	s := serve(t, l, l.Node, "tcp", lab.NodeAddr, 0)
	if s.Addr.Port() == 0 {
		t.Errorf("Addr = %s, want the port in use", s.Addr)
	}
	if _, err := l.Serve(l.Node, "tcp", s.Addr); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("second Serve = %v, want EADDRINUSE", err)
	}
	if _, err := l.Serve(l.Client, "tcp", s.Addr); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("Serve at another's address = %v, want EADDRNOTAVAIL", err)
	}
	if _, err := l.Serve(l.Node, "udp", netip.MustParseAddrPort("0.0.0.0:53")); err == nil {
		t.Error("Serve at 0.0.0.0: no error")
	}
}

func TestDialKeepsConnection(t *testing.T) {
	l := newLab(t, lab.Options{})
	s := serve(t, l, l.Node, "tcp", lab.NodeAddr, 80)
	conn, err := l.Dial(t.Context(), l.Client, "tcp", s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := bufio.NewReader(conn)
	a, err := lab.ReadAnswer(r)
	if err != nil {
		t.Fatal(err)
	}
	if want := conn.LocalAddr().String(); a.Peer.String() != want {
		t.Errorf("server sees %s, the connection is from %s", a.Peer, want)
	}
	for _, text := range []string{"one\n", "two\n"} {
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		if got, err := r.ReadString('\n'); got != text {
			t.Errorf("echo = %q, %v, want %q", got, err, text)
		}
	}

	// Close ends connections; new ones are refused.
	s.Close()
	_ = conn.SetReadDeadline(time.Now().Add(lab.Patience))
	if _, err := r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("reading from a closed server: %v, want an end", err)
	}
	if _, err := l.Ask(t.Context(), l.Client, "tcp", s.Addr); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("asking a closed server: %v, want ECONNREFUSED", err)
	}
}

func TestRun(t *testing.T) {
	l := newLab(t, lab.Options{})
	var out bytes.Buffer
	cmd := exec.Command("cat", "/proc/self/net/dev")
	cmd.Stdout = &out
	if err := l.Run(l.Router, cmd); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "macvlan0:") {
		t.Errorf("links of a process in router:\n%s", &out)
	}
	var exit *exec.ExitError
	if err := l.Run(l.Router, exec.Command("sh", "-c", "exit 3")); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("Run = %v, want exit status 3", err)
	}
	if err := l.Run(l.Router, exec.Command("/nowhere")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Run of a missing program = %v, want ErrNotExist", err)
	}
}

func TestSysctl(t *testing.T) {
	l := newLab(t, lab.Options{})
	const key = "net/ipv4/conf/eth0/rp_filter"
	if err := l.SetSysctl(l.Router, key, "2"); err != nil {
		t.Fatal(err)
	}
	for ns, want := range map[*netns.Namespace]string{l.Router: "2", l.Client: "0"} {
		if got, err := l.Sysctl(ns, key); got != want || err != nil {
			t.Errorf("Sysctl in %s = %q, %v, want %q", ns, got, err, want)
		}
	}
	if err := l.SetSysctl(l.Router, "net/nothing", "1"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("SetSysctl of a missing one = %v, want ErrNotExist", err)
	}
}

func TestRoutePlainly(t *testing.T) {
	l := newLab(t, lab.Options{})
	if err := l.RoutePlainly(); err != nil {
		t.Fatal(err)
	}
	for _, proto := range []string{"tcp", "udp"} {
		for _, remote := range lab.Remote {
			s := serve(t, l, l.Outside, proto, remote, 80)
			a, err := l.Ask(t.Context(), l.Client, proto, s.Addr)
			if err != nil {
				t.Fatal(err)
			}
			if a.Server != s.Addr || a.Peer.Addr() != lab.ClientAddr {
				t.Errorf("%s: %s answers %s, want %s and %s", proto, a.Server, a.Peer.Addr(), s.Addr, lab.ClientAddr)
			}
		}
	}
	if err := l.RoutePlainly(); !errors.Is(err, os.ErrExist) {
		t.Errorf("a second time: error %v, want that it exists", err)
	}
}

func TestForgetConnections(t *testing.T) {
	l := newLab(t, lab.Options{})
	// The kernel tracks connections if a rule matches their state.
	if err := l.Run(l.Router, exec.Command("iptables", "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW")); err != nil {
		t.Fatal(err)
	}
	// A flow of UDP: no packet follows the answer. A TCP connection's last packets may
	// pass after Ask has returned, and the kernel would track them as a new connection
	// (nf_conntrack_tcp_loose).
	s := serve(t, l, l.Router, "udp", lab.RouterAddr, 80)
	if _, err := l.Ask(t.Context(), l.Client, "udp", s.Addr); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1", "0"} {
		if got, err := l.Sysctl(l.Router, "net/netfilter/nf_conntrack_count"); got != want || err != nil {
			t.Errorf("nf_conntrack_count = %s, %v, want %s", got, err, want)
		}
		if err := l.ForgetConnections(l.Router); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNeighbour(t *testing.T) {
	l := newLab(t, lab.Options{})
	if mac, err := l.Neighbour(l.Node, lab.NIC, lab.GatewayAddr); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("Neighbour before any traffic = %s, %v, want ErrNotExist", mac, err)
	}
	wrong := net.HardwareAddr{2, 0, 0, 0, 0, 0x99}
	if err := l.SetStaleNeighbour(l.Node, lab.NIC, lab.GatewayAddr, wrong); err != nil {
		t.Fatal(err)
	}
	if mac, err := l.Neighbour(l.Node, lab.NIC, lab.GatewayAddr); err != nil || mac.String() != wrong.String() {
		t.Errorf("Neighbour = %s, %v, want %s", mac, err, wrong)
	}
	// The kernel uses the wrong entry.
	s := serve(t, l, l.Outside, "tcp", lab.GatewayAddr, 80)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := l.Ask(ctx, l.Node, "tcp", s.Addr); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Ask with a wrong neighbour = %v, want a deadline exceeded", err)
	}
}

func TestCapture(t *testing.T) {
	l := newLab(t, lab.Options{})
	c, err := l.Capture(l.Client, lab.ClientLink)
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, l, l.Node, "udp", lab.NodeAddr, 53)
	a, err := l.Ask(t.Context(), l.Client, "udp", s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	frames := c.Frames()
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}

	type seen struct {
		Outgoing bool
		Packet   lab.Packet
		ARP      uint16
		Asked    netip.Addr
	}
	got := map[seen]bool{}
	for _, f := range frames {
		p, _ := f.IPv4()
		arp, _ := f.ARP()
		got[seen{f.Outgoing, p, arp.Op, arp.TargetIP}] = true
	}
	for _, want := range []seen{
		{Outgoing: true, ARP: 1, Asked: lab.NodeAddr},
		{Outgoing: false, ARP: 2, Asked: lab.ClientAddr},
		{Outgoing: true, Packet: lab.Packet{Protocol: unix.IPPROTO_UDP, Src: a.Peer, Dst: s.Addr}},
		{Outgoing: false, Packet: lab.Packet{Protocol: unix.IPPROTO_UDP, Src: s.Addr, Dst: a.Peer}},
	} {
		if !got[want] {
			t.Errorf("no frame %+v among\n%s", want, frames)
		}
	}
	if after := c.Frames(); len(after) < len(frames) {
		t.Errorf("%d frames after Stop, %d before", len(after), len(frames))
	}
}

// macvlan0 is down when the program starts, and when its parent goes down: a capture has to
// continue.
func TestCaptureContinuesAfterLinkDown(t *testing.T) {
	l := newLab(t, lab.Options{})
	c, err := l.Capture(l.Router, "macvlan0")
	if err != nil {
		t.Fatal(err)
	}
	h, err := l.Netlink(l.Router)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	link, err := h.LinkByName("macvlan0")
	if err != nil {
		t.Fatal(err)
	}
	source := &netlink.Addr{IPNet: &net.IPNet{IP: lab.Source.AsSlice(), Mask: net.CIDRMask(24, 32)}}
	if err := h.AddrAdd(link, source); err != nil {
		t.Fatal(err)
	}
	s := serve(t, l, l.Outside, "udp", lab.LANServer, 53)
	for round := range 2 {
		if err := h.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
		a, err := l.Ask(t.Context(), l.Router, "udp", s.Addr)
		if err != nil {
			t.Fatal(err)
		}
		if a.Peer.Addr() != lab.Source {
			t.Errorf("server sees %s, want %s", a.Peer, lab.Source)
		}
		_, err = c.Wait(t.Context(), func(f lab.Frame) bool {
			p, _ := f.IPv4()
			return f.Outgoing && p.Src == a.Peer && p.Dst == s.Addr
		})
		if err != nil {
			t.Errorf("round %d: %v; frames:\n%s", round, err, c.Frames())
		}
		if err := h.LinkSetDown(link); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCaptureAnnouncement(t *testing.T) {
	l := newLab(t, lab.Options{})
	c, err := l.Capture(l.Outside, lab.LANLink)
	if err != nil {
		t.Fatal(err)
	}
	// With arp_notify the kernel announces a link's addresses when its hardware address
	// changes.
	if err := l.SetSysctl(l.Node, "net/ipv4/conf/nic0/arp_notify", "1"); err != nil {
		t.Fatal(err)
	}
	h, err := l.Netlink(l.Node)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	link, err := h.LinkByName(lab.NIC)
	if err != nil {
		t.Fatal(err)
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 0x10}
	if err := h.LinkSetHardwareAddr(link, mac); err != nil {
		t.Fatal(err)
	}
	_, err = c.Wait(t.Context(), func(f lab.Frame) bool {
		a, ok := f.ARP()
		return ok && a.Announces() && a.SenderIP == lab.NICAddr && a.SenderMAC.String() == mac.String() && !f.Outgoing
	})
	if err != nil {
		t.Errorf("%v; frames:\n%s", err, c.Frames())
	}
}

func TestCaptureErrors(t *testing.T) {
	l := newLab(t, lab.Options{})
	if _, err := l.Capture(l.Client, "nic0"); err == nil || !strings.Contains(err.Error(), `capturing on "nic0"`) {
		t.Errorf("Capture of a missing link = %v", err)
	}
	c, err := l.Capture(l.Client, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = c.Wait(ctx, func(lab.Frame) bool { return false })
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait = %v, want a deadline exceeded", err)
	}
	for range 2 {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	}
}

func BenchmarkNew(b *testing.B) {
	for b.Loop() {
		l, err := lab.New(lab.Options{})
		if err != nil {
			b.Fatal(err)
		}
		l.Close()
	}
}

func BenchmarkAsk(b *testing.B) {
	l, err := lab.New(lab.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	for _, proto := range []string{"tcp", "udp"} {
		s, err := l.Serve(l.Node, proto, netip.AddrPortFrom(lab.NodeAddr, 80))
		if err != nil {
			b.Fatal(err)
		}
		b.Run(proto, func(b *testing.B) {
			for b.Loop() {
				if _, err := l.Ask(b.Context(), l.Client, proto, s.Addr); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
