// Package lab creates the network around an egress router from five network namespaces on
// one kernel, for tests, the demonstration and benchmarks:
//
//	client            router
//	eth0              eth0        macvlan0 (down, no address)
//	10.128.0.71/23    10.128.0.98/23 :
//	  |                 |            :  a macvlan of nic0
//	  +------ tun0 -----+            :
//	      10.128.0.1/23              :
//	          node                 nic0 192.168.12.10/24
//	                                 |
//	                               lan0 192.168.12.1/24, 192.168.12.80/24
//	                               lo   203.0.113.25, .26, .27
//	                                      outside
//
// A fifth, far, is a client in another subnet of the cluster network
// (10.129.0.71/24), which node routes: the router reaches it by its default route
// only.
//
// With [Options.IPv6] the same hosts have IPv6 addresses, too: the pods in a unique local
// range (RFC 4193), the physical network and the servers in the range for documentation
// (RFC 3849). Without it, IPv6 is off.
//
// The router is in the state in which a CNI plugin leaves a pod: the default route goes to
// the cluster, forwarding is off. Outside has no route to the cluster: a connection whose
// source was not translated gets no answer.
//
// The namespaces are created by netlink and held only by file descriptors: no name under
// /run/netns, no link in the caller's namespace. The kernel removes them when the process
// ends, even if it is killed.
//
// The kernel needs veth, bridge and macvlan; the process needs CAP_SYS_ADMIN and
// CAP_NET_ADMIN, which tests have by package nstest.
package lab

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns"
)

// The networks. An address of the lab has the prefix length of its network.
var (
	Cluster = netip.MustParsePrefix("10.128.0.0/23")   // pods, behind tun0
	LAN     = netip.MustParsePrefix("192.168.12.0/24") // the physical network, behind nic0

	FarCluster = netip.MustParsePrefix("10.129.0.0/24") // pods of another subnet, routed by node
)

// The addresses. Source is on no link at first: it is the reserved address that the
// program sets on macvlan0.
var (
	NodeAddr    = netip.MustParseAddr("10.128.0.1") // tun0, the default gateway of the pods
	ClientAddr  = netip.MustParseAddr("10.128.0.71")
	FarAddr     = netip.MustParseAddr("10.129.0.71")
	FarGateway  = netip.MustParseAddr("10.129.0.1") // node's address on far's network
	RouterAddr  = netip.MustParseAddr("10.128.0.98")
	NICAddr     = netip.MustParseAddr("192.168.12.10") // nic0; macvlan0 cannot reach its parent
	GatewayAddr = netip.MustParseAddr("192.168.12.1")  // lan0, the router's gateway
	LANServer   = netip.MustParseAddr("192.168.12.80") // lan0, reached without a gateway
	Source      = netip.MustParseAddr("192.168.12.99")
)

// Remote is the list of servers behind the gateway, on lo of outside (RFC 5737 reserves
// the range for documentation).
var Remote = [3]netip.Addr{
	netip.MustParseAddr("203.0.113.25"),
	netip.MustParseAddr("203.0.113.26"),
	netip.MustParseAddr("203.0.113.27"),
}

// The same for IPv6. The gateway answers for its link-local address, too.
var (
	Cluster6 = netip.MustParsePrefix("fd00:10:128::/64")
	LAN6     = netip.MustParsePrefix("2001:db8:12::/64")

	FarCluster6 = netip.MustParsePrefix("fd00:10:129::/64")

	NodeAddr6        = netip.MustParseAddr("fd00:10:128::1")
	ClientAddr6      = netip.MustParseAddr("fd00:10:128::71")
	FarAddr6         = netip.MustParseAddr("fd00:10:129::71")
	FarGateway6      = netip.MustParseAddr("fd00:10:129::1")
	RouterAddr6      = netip.MustParseAddr("fd00:10:128::98")
	NICAddr6         = netip.MustParseAddr("2001:db8:12::10")
	GatewayAddr6     = netip.MustParseAddr("2001:db8:12::1")
	GatewayLinkLocal = netip.MustParseAddr("fe80::1")
	LANServer6       = netip.MustParseAddr("2001:db8:12::80")
	Source6          = netip.MustParseAddr("2001:db8:12::99")
)

// Remote6 is the list of servers behind the gateway with IPv6 addresses.
var Remote6 = [3]netip.Addr{
	netip.MustParseAddr("2001:db8::25"),
	netip.MustParseAddr("2001:db8::26"),
	netip.MustParseAddr("2001:db8::27"),
}

// The names of links that [Options] does not change.
const (
	Bridge     = "tun0"        // node; the name of the bridge in OpenShift's SDN
	NIC        = "nic0"        // node, the parent of macvlan0
	LANLink    = "lan0"        // outside
	ClientLink = "eth0"        // client and far
	ClientPort = "port-client" // node, the port of Bridge to client
	FarPort    = "port-far"    // node, the link to far, a network of its own
	RouterPort = "port-router" // node, the port of Bridge to router
)

// Options change the router's namespace, for tests of faulty pods, and the families of all.
// The zero value is a pod without faults.
type Options struct {
	IPv6        bool   // addresses of both families
	NoMacvlan   bool   // no macvlan0, as without the pod's annotation
	MacvlanName string // instead of macvlan0
	ClusterName string // instead of eth0 in router
}

// Lab is one such network. Any number can exist at once. Several goroutines may call its
// methods, except Close.
type Lab struct {
	Options // as given, with the names filled in

	Client, Far, Router, Node, Outside *netns.Namespace

	mu        sync.Mutex
	servers   []*Server
	captures  []*Capture
	processes []*os.Process
}

// New creates a lab and returns when frames pass on every link. On an error it removes
// what it created.
func New(o Options) (*Lab, error) {
	if o.MacvlanName == "" {
		o.MacvlanName = "macvlan0"
	}
	if o.ClusterName == "" {
		o.ClusterName = "eth0"
	}
	l := &Lab{Options: o}
	if err := l.build(); err != nil {
		l.Close()
		return nil, fmt.Errorf("creating the lab: %w", err)
	}
	return l, nil
}

// Close ends servers, captures and processes and closes the namespaces. The kernel removes
// them, with their links, shortly after.
func (l *Lab) Close() {
	l.mu.Lock()
	servers, captures, processes := l.servers, l.captures, l.processes
	l.servers, l.captures, l.processes = nil, nil, nil
	l.mu.Unlock()

	for _, p := range processes {
		_ = p.Kill() // an error means that it has ended
	}
	for _, s := range servers {
		s.Close()
	}
	for _, c := range captures {
		_ = c.Stop() // a test that needs the error calls Stop before
	}
	for _, n := range []*netns.Namespace{l.Client, l.Far, l.Router, l.Node, l.Outside} {
		if n != nil {
			_ = n.Close()
		}
	}
}

// Netlink opens a route netlink handle in ns, for use in any goroutine. The caller closes
// it.
//
// netlink.NewHandleAt unlocks its thread even if the thread could not return to its
// namespace.
func (l *Lab) Netlink(ns *netns.Namespace) (*netlink.Handle, error) {
	var h *netlink.Handle
	err := ns.Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("opening netlink handle in %q: %w", ns, err)
	}
	return h, nil
}

// SetSysctl sets a sysctl of a namespace, such as "net/ipv4/conf/eth0/rp_filter": a path,
// because link names may contain dots.
func (l *Lab) SetSysctl(ns *netns.Namespace, key, value string) error {
	return ns.Do(func() error { return setSysctl(key, value) })
}

// Sysctl reads a sysctl of a namespace, without the newline.
func (l *Lab) Sysctl(ns *netns.Namespace, key string) (string, error) {
	var text []byte
	err := ns.Do(func() (err error) {
		text, err = os.ReadFile("/proc/sys/" + key)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("reading sysctl %q: %w", key, err)
	}
	if n := len(text); n > 0 && text[n-1] == '\n' {
		text = text[:n-1]
	}
	return string(text), nil
}

// ForgetConnections flushes the conntrack table of ns, including entries of ended
// connections, which would stay until their timeout.
func (l *Lab) ForgetConnections(ns *netns.Namespace) error {
	if err := ns.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
		return fmt.Errorf("flushing the conntrack table: %w", err)
	}
	return nil
}

// Start starts cmd in ns; the caller calls cmd.Wait. The process is killed when the lab is
// closed or this process ends, so that it cannot keep the namespace alive
// (cmd.SysProcAttr.Pdeathsig, unless set already).
//
// The process shares the other namespaces with the caller: files, and with them the lock
// of iptables.
func (l *Lab) Start(ns *netns.Namespace, cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	if cmd.SysProcAttr.Pdeathsig == 0 {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	// A child is in the namespaces of the thread that forks (clone(2)).
	if err := ns.Do(cmd.Start); err != nil {
		return fmt.Errorf("starting %q in %q: %w", cmd.Path, ns, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.processes = append(l.processes, cmd.Process)
	return nil
}

// Run starts cmd in ns, like [Lab.Start], and waits for it. The error of a process that
// fails is an *exec.ExitError, as with exec.Cmd.Run.
func (l *Lab) Run(ns *netns.Namespace, cmd *exec.Cmd) error {
	if err := l.Start(ns, cmd); err != nil {
		return err
	}
	return cmd.Wait()
}
