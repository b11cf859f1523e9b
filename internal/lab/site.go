package lab

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/netns"
)

// Site is a network for several routers of one reserved address, each on a node of its own:
//
//	client            pod 1                 pod 2
//	eth0              eth0      macvlan0    eth0      macvlan0
//	10.128.0.71/23    .101      :           .102      :
//	  |                 |       :  node 1     |       :  node 2
//	  +---- tun0 -------+-------:-------------+       :
//	     10.128.0.1/23          nic0                  nic0
//	          switch             |                     |
//	                             +-------- lan --------+
//	                                        |
//	                            lan0 192.168.12.1/24
//	                            wan0 198.51.100.1/30      outside, the gateway
//	                                        |
//	                            wan0 198.51.100.2/30
//	                            lo   203.0.113.25, .26, .27   server
//
// Both switches are bridges in the namespace switch. Their ports can lose frames, in each
// direction, and be set down. The server admits packets with the reserved address only.
//
// Of the embedded [Lab], Client and Outside are in use.
type Site struct {
	*Lab
	Switch, Server *netns.Namespace
	Nodes          []*SiteNode

	links *netlink.Handle // of Switch
	index int             // of the last link
}

// SiteNode is a node of a [Site], with the router's pod.
type SiteNode struct {
	Host, Pod        *netns.Namespace
	Addr             netip.Addr // eth0 of the pod
	LAN, ClusterPort string     // ports of the switches
}

// The names of the switches, which are links of Switch, and of the gateway's ports.
const (
	LANSwitch   = "lan"
	GatewayPort = "lan-gateway" // of LANSwitch
	WANLink     = "wan0"        // of gateway and server
)

// The server answers datagrams to each of these ports by the first one: a client has new
// connections without new sockets.
const (
	FirstPort = 10000
	LastPort  = 59999
)

// wan is the network between gateway and server: RFC 5737 reserves it for documentation.
var wan = [2]netip.Prefix{netip.MustParsePrefix("198.51.100.1/30"), netip.MustParsePrefix("198.51.100.2/30")}

// Loss is the share of frames that a port of a switch drops.
type Loss struct {
	Port    string
	In      bool // frames that the switch receives by the port, otherwise those that it sends
	Kind    LossKind
	Percent int // 1 to 100
}

// LossKind is what a [Loss] drops, as a condition of nft(8).
type LossKind string

// The kinds of frames.
const (
	LoseAll        LossKind = ""
	LoseARP        LossKind = "ether type arp"
	LoseDatagrams  LossKind = "meta l4proto udp"
	LosePings      LossKind = "icmp type echo-request ip daddr " + gatewayText
	LoseHeartbeats LossKind = "ip saddr @pods ip daddr @pods"
)

const gatewayText = "192.168.12.1" // GatewayAddr

// ShareNIC moves a pod's macvlan0 to the NIC of another node, as if one node ran both pods. It
// comes before captures and processes. The mode of the other pod's macvlan0 becomes the same.
func (s *Site) ShareNIC(node, with int) error {
	for _, n := range []int{with, node} {
		if err := s.MoveMacvlan(n, with, netlink.MACVLAN_MODE_BRIDGE); err != nil {
			return err
		}
	}
	s.Nodes[node].LAN = s.Nodes[with].LAN
	return nil
}

// NewSite creates a site with as many nodes, at most 9, and returns when frames pass on
// every link. On an error it removes what it created.
func NewSite(nodes int) (*Site, error) {
	s := &Site{Lab: &Lab{Options: Options{MacvlanName: "macvlan0", ClusterName: "eth0"}}, index: 100}
	if err := s.buildSite(nodes); err != nil {
		s.Close()
		return nil, fmt.Errorf("creating the site: %w", err)
	}
	return s, nil
}

// Close ends processes, servers and captures, and closes the namespaces.
func (s *Site) Close() {
	s.Lab.Close()
	if s.links != nil {
		s.links.Close()
	}
	all := []*netns.Namespace{s.Switch, s.Server}
	for _, n := range s.Nodes {
		all = append(all, n.Host, n.Pod)
	}
	for _, n := range all {
		if n != nil {
			_ = n.Close()
		}
	}
}

func (s *Site) buildSite(nodes int) error {
	for i := range nodes {
		s.Nodes = append(s.Nodes, &SiteNode{
			Addr:        netip.AddrFrom4([4]byte{10, 128, 0, byte(101 + i)}),
			LAN:         fmt.Sprint("lan-", i+1),
			ClusterPort: fmt.Sprint("cluster-", i+1),
		})
	}
	if err := s.makeNamespaces(); err != nil {
		return err
	}
	var err error
	if s.links, err = s.Netlink(s.Switch); err != nil {
		return err
	}
	for _, name := range []string{Bridge, LANSwitch} {
		bridge := &netlink.Bridge{LinkAttrs: s.attrs(name)}
		if err := s.links.LinkAdd(bridge); err != nil {
			return fmt.Errorf("creating bridge %q: %w", name, err)
		}
		if err := setUp(s.links, name); err != nil {
			return err
		}
	}
	if err := addAddr(s.links, Bridge, netip.PrefixFrom(NodeAddr, Cluster.Bits())); err != nil {
		return err
	}
	for _, c := range s.cables() {
		if err := s.lay(c); err != nil {
			return err
		}
	}
	return s.configureSite()
}

func (s *Site) makeNamespaces() error {
	all := []**netns.Namespace{&s.Client, &s.Outside, &s.Switch, &s.Server}
	for _, n := range s.Nodes {
		all = append(all, &n.Host, &n.Pod)
	}
	for _, ns := range all {
		var err error
		if *ns, err = netns.New(); err != nil {
			return err
		}
		if err := (*ns).Do(func() error { return kernelDefaults(false) }); err != nil {
			return err
		}
		h, err := s.Netlink(*ns)
		if err != nil {
			return err
		}
		err = setUp(h, "lo")
		h.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// attrs returns the attributes of a new link, with an index that no peer has.
func (s *Site) attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	s.index++
	a.Name, a.Index = name, s.index
	return a
}

// A cable is a pair of links: a port in Switch, and a link of another namespace.
type cable struct {
	port, bridge string // without a bridge, the port goes to the namespace other
	other        *netns.Namespace
	ns           *netns.Namespace
	link         string
	addr         netip.Prefix
	via          netip.Addr // default route
}

// cables returns all of them.
func (s *Site) cables() []cable {
	all := []cable{
		{port: ClientPort, bridge: Bridge, ns: s.Client, link: ClientLink, addr: netip.PrefixFrom(ClientAddr, Cluster.Bits()), via: NodeAddr},
		{port: GatewayPort, bridge: LANSwitch, ns: s.Outside, link: LANLink, addr: netip.PrefixFrom(GatewayAddr, LAN.Bits())},
		{port: WANLink, other: s.Outside, ns: s.Server, link: WANLink, addr: wan[1], via: wan[0].Addr()},
	}
	for i, n := range s.Nodes {
		nic := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, 12, byte(11 + i)}), LAN.Bits())
		all = append(all,
			cable{port: n.ClusterPort, bridge: Bridge, ns: n.Pod, link: s.ClusterName, addr: netip.PrefixFrom(n.Addr, Cluster.Bits()), via: NodeAddr},
			cable{port: n.LAN, bridge: LANSwitch, ns: n.Host, link: NIC, addr: nic, via: GatewayAddr})
	}
	return all
}

// lay makes a cable.
func (s *Site) lay(c cable) error {
	a := s.attrs(c.port)
	ports := s.links
	if c.other != nil {
		a.Namespace = netlink.NsFd(c.other.Fd())
		h, err := s.Netlink(c.other)
		if err != nil {
			return err
		}
		defer h.Close()
		ports = h
	}
	veth := netlink.NewVeth(a)
	veth.PeerName, veth.PeerNamespace = c.link, netlink.NsFd(c.ns.Fd())
	if err := s.links.LinkAdd(veth); err != nil {
		return fmt.Errorf("creating veth %q with peer %q: %w", c.port, c.link, err)
	}
	if c.bridge != "" {
		bridge, err := s.links.LinkByName(c.bridge)
		if err == nil {
			err = s.links.LinkSetMaster(veth, bridge)
		}
		if err != nil {
			return fmt.Errorf("adding %q to bridge %q: %w", c.port, c.bridge, err)
		}
	}
	h, err := s.Netlink(c.ns)
	if err != nil {
		return err
	}
	defer h.Close()
	for _, step := range []func() error{
		func() error { return setUp(ports, c.port) },
		func() error { return setUp(h, c.link) },
		func() error { return addAddr(h, c.link, c.addr) },
		func() error { return awaitUp(ports, c.port) },
		func() error { return awaitUp(h, c.link) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	if !c.via.IsValid() {
		return nil
	}
	return addDefault(h, c.link, c.via)
}

// configureSite adds the macvlan links, the servers, and what the server admits.
func (s *Site) configureSite() error {
	for _, n := range s.Nodes {
		if err := s.addMacvlan(n, n.Host, netlink.MACVLAN_MODE_PRIVATE); err != nil {
			return err
		}
	}
	server, err := s.Netlink(s.Server)
	if err != nil {
		return err
	}
	defer server.Close()
	for _, r := range Remote {
		if err := addAddr(server, "lo", netip.PrefixFrom(r, 32)); err != nil {
			return err
		}
	}
	gateway, err := s.Netlink(s.Outside)
	if err != nil {
		return err
	}
	defer gateway.Close()
	if err := addAddr(gateway, WANLink, wan[0]); err != nil {
		return err
	}
	for _, r := range Remote {
		if err := s.addRoute(s.Outside, WANLink, r, wan[1].Addr()); err != nil {
			return err
		}
	}
	if err := s.SetSysctl(s.Outside, "net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	return s.Script(s.Server, fmt.Sprintf(`table ip admit {
	chain input {
		type filter hook input priority 0
		iifname %[1]q ip saddr != %[2]s drop
	}
	chain prerouting {
		type nat hook prerouting priority -100
		ip daddr %[5]s udp dport %[3]d-%[4]d dnat to %[5]s:%[3]d
	}
}
`, WANLink, Source, FirstPort, LastPort, Remote[0]))
}

func (s *Site) addMacvlan(n *SiteNode, host *netns.Namespace, mode netlink.MacvlanMode) error {
	h, err := s.Netlink(host)
	if err != nil {
		return err
	}
	defer h.Close()
	parent, err := h.LinkByName(NIC)
	if err != nil {
		return fmt.Errorf("finding link %q: %w", NIC, err)
	}
	a := s.attrs(s.MacvlanName)
	a.ParentIndex, a.MTU, a.Namespace = parent.Attrs().Index, parent.Attrs().MTU, netlink.NsFd(n.Pod.Fd())
	if err := h.LinkAdd(&netlink.Macvlan{LinkAttrs: a, Mode: mode}); err != nil {
		return fmt.Errorf("creating macvlan %q on %q: %w", s.MacvlanName, NIC, err)
	}
	return nil
}

// MoveMacvlan replaces a pod's macvlan0 by one on the NIC of another node, where its pod would
// be if the other node ran it.
func (s *Site) MoveMacvlan(node, to int, mode netlink.MacvlanMode) error {
	h, err := s.Netlink(s.Nodes[node].Pod)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(s.MacvlanName)
	if err == nil {
		err = h.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("deleting link %q: %w", s.MacvlanName, err)
	}
	return s.addMacvlan(s.Nodes[node], s.Nodes[to].Host, mode)
}

// SetMAC gives a pod's macvlan0 a hardware address.
func (s *Site) SetMAC(node int, mac string) error {
	hardware, err := net.ParseMAC(mac)
	if err != nil {
		return fmt.Errorf("parsing a hardware address: %w", err)
	}
	h, err := s.Netlink(s.Nodes[node].Pod)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(s.MacvlanName)
	if err == nil {
		err = h.LinkSetHardwareAddr(link, hardware)
	}
	if err != nil {
		return fmt.Errorf("setting the hardware address of link %q: %w", s.MacvlanName, err)
	}
	return nil
}

// MAC returns the hardware address of a router's macvlan0.
func (s *Site) MAC(node int) (string, error) {
	h, err := s.Netlink(s.Nodes[node].Pod)
	if err != nil {
		return "", err
	}
	defer h.Close()
	link, err := h.LinkByName(s.MacvlanName)
	if err != nil {
		return "", fmt.Errorf("finding link %q: %w", s.MacvlanName, err)
	}
	return link.Attrs().HardwareAddr.String(), nil
}

// SetPort sets a port of a switch up or down: the node's link then has no carrier.
func (s *Site) SetPort(port string, up bool) error {
	link, err := s.links.LinkByName(port)
	if err != nil {
		return fmt.Errorf("finding link %q: %w", port, err)
	}
	if up {
		err = s.links.LinkSetUp(link)
	} else {
		err = s.links.LinkSetDown(link)
	}
	if err != nil {
		return fmt.Errorf("setting link %q up or down: %w", port, err)
	}
	return nil
}

// Lose makes the switches drop frames, instead of those of the call before, in one
// transaction. Captures of a port contain the frames that the switch then drops.
func (s *Site) Lose(losses ...Loss) error {
	pods := make([]string, len(s.Nodes))
	for i, n := range s.Nodes {
		pods[i] = n.Addr.String()
	}
	var in, out []string
	for _, l := range losses {
		chain, match := &out, "oifname"
		if l.In {
			chain, match = &in, "iifname"
		}
		share := ""
		if l.Percent < 100 {
			share = fmt.Sprintf("numgen random mod 100 < %d ", l.Percent)
		}
		*chain = append(*chain, fmt.Sprintf("\t\t%s %q %s %sdrop\n", match, l.Port, l.Kind, share))
	}
	return s.Script(s.Switch, fmt.Sprintf(`table bridge loss
delete table bridge loss
table bridge loss {
	set pods {
		type ipv4_addr
		elements = { %s }
	}
	chain in {
		type filter hook prerouting priority 0
%s	}
	chain out {
		type filter hook postrouting priority 0
%s	}
}
`, strings.Join(pods, ", "), strings.Join(in, ""), strings.Join(out, "")))
}

// ForgetNeighbours deletes the gateway's entry of the reserved address.
func (s *Site) ForgetNeighbours() error {
	h, err := s.Netlink(s.Outside)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(LANLink)
	if err != nil {
		return fmt.Errorf("finding link %q: %w", LANLink, err)
	}
	list, err := neighbours(h, link.Attrs().Index, Source)
	if err != nil {
		return fmt.Errorf("listing neighbours of %q: %w", LANLink, err)
	}
	for _, n := range list {
		if !n.IP.Equal(Source.AsSlice()) {
			continue
		}
		if err := h.NeighDel(&n); err != nil {
			return fmt.Errorf("deleting neighbour %q: %w", n.IP, err)
		}
	}
	return nil
}

// Script runs a script of nft(8) in a namespace.
func (s *Site) Script(ns *netns.Namespace, script string) error {
	run, err := s.StartScript(ns)
	if err != nil {
		return err
	}
	return run(script)
}

// StartScript starts nft(8) in a namespace, and returns the function that runs a script in it,
// within a millisecond or so once the program waits for it.
func (s *Site) StartScript(ns *netns.Namespace) (run func(script string) error, err error) {
	path, err := exec.LookPath("nft")
	if err != nil {
		path = "/usr/sbin/nft" // the PATH of some users lacks the directory
	}
	cmd := exec.Command(path, "-f", "-")
	input, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("making a pipe for nft: %w", err)
	}
	var output strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := s.Start(ns, cmd); err != nil {
		return nil, err
	}
	return func(script string) error {
		_, err := io.WriteString(input, script)
		err = errors.Join(err, input.Close(), cmd.Wait())
		// The process has ended: thousands of them must not stay in the list.
		s.mu.Lock()
		s.processes = slices.DeleteFunc(s.processes, func(p *os.Process) bool { return p == cmd.Process })
		s.mu.Unlock()
		if err != nil {
			return errors.Join(fmt.Errorf("running nft: %w", err), errors.New(output.String()))
		}
		return nil
	}, nil
}

// RouteUnfenced makes a node's pod a router for the reserved address with the rules that an
// administrator would write: what its clients send goes to the first server, with the
// reserved address as its source. Nothing keeps two of them from doing so at once. The pod
// has an address of its own on macvlan0; whether it has the reserved address, too, is up to
// the caller.
func (s *Site) RouteUnfenced(node int) error {
	n := s.Nodes[node]
	h, err := s.Netlink(n.Pod)
	if err != nil {
		return err
	}
	defer h.Close()
	own := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, 12, byte(101 + node)}), LAN.Bits())
	if err := addAddr(h, s.MacvlanName, own); err != nil {
		return err
	}
	if err := setUp(h, s.MacvlanName); err != nil {
		return err
	}
	if err := awaitUp(h, s.MacvlanName); err != nil {
		return err
	}
	if err := s.addRoute(n.Pod, s.MacvlanName, Remote[0], GatewayAddr); err != nil {
		return err
	}
	if err := s.SetSysctl(n.Pod, "net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	return s.Script(n.Pod, fmt.Sprintf(`table ip unfenced {
	chain prerouting {
		type nat hook prerouting priority -100
		iifname %q dnat to %s
	}
	chain postrouting {
		type nat hook postrouting priority 100
		iifname %[1]q oifname %[3]q snat to %[4]s
	}
}
`, s.ClusterName, Remote[0], s.MacvlanName, Source))
}

// AddSource adds the reserved address to a node's macvlan0.
func (s *Site) AddSource(node int) error {
	h, err := s.Netlink(s.Nodes[node].Pod)
	if err != nil {
		return err
	}
	defer h.Close()
	return addAddr(h, s.MacvlanName, netip.PrefixFrom(Source, LAN.Bits()))
}
