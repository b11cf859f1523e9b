package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/e2e/who"
	"github.com/egress-router/egress-router/internal/netns"
)

// images are the images of .ci/image, without localhost/.
var images = []string{"egress-router", "egress-http-proxy", "egress-dns-proxy", alone, plugin, operator}

const (
	// alone is the image that contains the program only.
	alone = "egress-router-nftables"
	// plugin is that of the CNI plugin.
	plugin = "egress-router-cni"
	// operator is the image of the operator, which contains its program only.
	operator = "egress-operator"
	// image is the router's.
	image = "localhost/egress-router"
)

// A node is the network namespace that the tests run in, as a node of a cluster:
//
//	containers                           servers in outside:
//	 eth0 10.128.0.0/23                   203.0.113.25, .26, .27
//	  |                                    |
//	podman0 - node - eth0 192.168.12.10/24 - lan0 192.168.12.1/24 - eth1 of each [host]
//	               - eth1 192.168.123.10/24 - lan1 192.168.123.1/24 - web 192.168.123.91
//
// The second physical network is from the documentation's walk-through. The node's
// default route is by eth0. Outside has no route to the containers, and the node
// masquerades them: a server sees the reserved address only if the router works.
type node struct{}

// theNode is shared by all tests.
var theNode *node

// The addresses of the servers.
var (
	web     = "192.168.123.91"
	servers = []string{
		"203.0.113.25:80", "203.0.113.26:80", "203.0.113.26:443", "203.0.113.27:9000", "203.0.113.27:100", web + ":80",
	}
)

// Files of the namespaces of [node].
const (
	outside = "/run/netns/outside"
	webNS   = "/run/netns/web"
)

// Networks of podman. The macvlan networks differ in their NIC and in the address
// that they add to macvlan0.
const (
	cluster   = "podman"
	bare      = "bare"      // eth0, no address
	addressed = "addressed" // eth0, an address
	walk      = "walk"      // eth1, no address
)

// namespaceSysctls are set in a new namespace, which inherits those of the machine.
const namespaceSysctls = "net.ipv4.ip_forward=0 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0"

func newNode() (*node, error) {
	for line := range strings.Lines(`
		sysctl -q -w ` + namespaceSysctls + `
		ip link set lo up
		ip address add ` + nameServerAddr + `/32 dev lo
		ip netns add outside
		ip netns add web
		ip netns exec outside sysctl -q -w ` + namespaceSysctls + `
		ip netns exec web sysctl -q -w ` + namespaceSysctls + `
		ip -n outside link set lo up
		ip -n web link set lo up

		ip -n outside link add lan0 address 02:00:00:00:12:01 type bridge
		ip link add eth0 type veth peer name port0 netns outside
		ip address add 192.168.12.10/24 dev eth0
		ip link set eth0 up
		ip -n outside link set port0 master lan0 up
		ip -n outside address add 192.168.12.1/24 dev lan0
		ip -n outside link set lan0 up
		ip route add default via 192.168.12.1
		ip -n outside address add 203.0.113.25/32 dev lo
		ip -n outside address add 203.0.113.26/32 dev lo
		ip -n outside address add 203.0.113.27/32 dev lo

		ip -n outside link add lan1 type bridge
		ip link add eth1 type veth peer name port1 netns outside
		ip -n outside link add port2 type veth peer name eth0 netns web
		ip address add 192.168.123.10/24 dev eth1
		ip link set eth1 up
		ip -n outside link set port1 master lan1 up
		ip -n outside link set port2 master lan1 up
		ip -n outside address add 192.168.123.1/24 dev lan1
		ip -n outside link set lan1 up
		ip -n web address add 192.168.123.91/24 dev eth0
		ip -n web link set eth0 up
		ip -n web route add default via 192.168.123.1
		ip netns exec outside sysctl -q -w net.ipv4.ip_forward=1
	`) {
		if words := strings.Fields(line); len(words) > 0 {
			if err := command(words...).run(); err != nil {
				return nil, fmt.Errorf("making the node: %w", err)
			}
		}
	}
	if err := serve(); err != nil {
		return nil, err
	}
	if err := configurePodman(); err != nil {
		return nil, err
	}
	return &node{}, nil
}

// serve starts the servers.
func serve() error {
	var opened [3]*netns.Namespace
	for i, path := range []string{outside, webNS, "/proc/self/ns/net"} {
		ns, err := netns.Open(path)
		if err != nil {
			return err
		}
		defer ns.Close()
		opened[i] = ns
	}
	for _, s := range servers {
		ns := opened[0]
		if strings.HasPrefix(s, web) {
			ns = opened[1]
		}
		if err := who.ServeHTTP(ns, s); err != nil {
			return err
		}
	}
	if err := who.ServeHTTPS(opened[0], "203.0.113.25:443"); err != nil {
		return err
	}
	if err := who.ServeUDP(opened[0], "203.0.113.27:53"); err != nil {
		return err
	}
	return who.ServeDatagrams(opened[2], nameServerAddr+":53", names.Answer)
}

// configurePodman configures podman independently of the machine's configuration, and
// loads images and creates networks.
func configurePodman() error {
	for name, text := range map[string]string{
		// podman's default limits exceed the hard limits of a machine in a
		// container, which lacks CAP_SYS_RESOURCE.
		"CONTAINERS_CONF": `
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "/run/e2e/networks"
default_subnet = "10.128.0.0/23"
`,
		"CONTAINERS_STORAGE_CONF": `
[storage]
driver = "overlay"
graphroot = "/var/lib/containers/storage"
runroot = "/run/containers/storage"
`,
		// No image is pulled.
		"CONTAINERS_REGISTRIES_CONF": "unqualified-search-registries = []\n",
	} {
		path := "/run/e2e/" + strings.ToLower(name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
		if err := os.Setenv(name, path); err != nil {
			return err
		}
	}
	dir := os.Getenv(directory)
	for _, args := range [][]string{
		{"load", "--quiet", "--input", filepath.Join(dir, nativeImages)},
		{"load", "--quiet", "--input", filepath.Join(dir, foreignImages)},
		{"network", "create", "--driver", "macvlan", "--opt", "parent=eth0", "--ipam-driver", "none", bare},
		{"network", "create", "--driver", "macvlan", "--opt", "parent=eth0", "--subnet", "192.168.12.0/24", "--ip-range", "192.168.12.192/26", addressed},
		{"network", "create", "--driver", "macvlan", "--opt", "parent=eth1", "--ipam-driver", "none", walk},
	} {
		if err := command(append([]string{"podman"}, args...)...).run(); err != nil {
			return fmt.Errorf("preparing podman: %w", err)
		}
	}
	// The first process cannot do so if it is killed.
	return os.RemoveAll(dir)
}

// A process is a program and its output.
type process struct {
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
}

// command returns a process that is not started.
func command(args ...string) *process {
	p := &process{cmd: exec.Command(args[0], args[1:]...)}
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.WaitDelay = time.Second // a child of it may keep the streams open
	return p
}

// run starts the process and waits for its end, five minutes at most.
func (p *process) run() error {
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("starting %q: %w", strings.Join(p.cmd.Args, " "), err)
	}
	timer := time.AfterFunc(5*time.Minute, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("running %q: %w\n%s%s", strings.Join(p.cmd.Args, " "), err, &p.stdout, &p.stderr)
	}
	return nil
}

// run runs a program, which has to succeed, and returns its stdout.
func run(t *testing.T, args ...string) string {
	t.Helper()
	p := command(args...)
	if err := p.run(); err != nil {
		t.Fatal(err)
	}
	return p.stdout.String()
}

// in runs a program in the network namespace of a process, as the documentation's
// walk-through does, and returns its stdout.
func in(t *testing.T, pid string, args ...string) string {
	t.Helper()
	return run(t, append([]string{"nsenter", "-n", "-t", pid}, args...)...)
}

// pidOf returns the process of a running container.
func pidOf(t *testing.T, container string) string {
	t.Helper()
	pid := strings.TrimSpace(run(t, "podman", "inspect", "--format", "{{.State.Pid}}", container))
	if pid == "0" {
		t.Fatalf("container %s does not run:\n%s", container, logs(container))
	}
	return pid
}

// logs returns the output of a container.
func logs(container string) string {
	p := command("podman", "logs", container)
	if err := p.run(); err != nil {
		return err.Error()
	}
	return p.stdout.String() + p.stderr.String()
}

// start starts a container that stays and returns its ID. args are options of podman
// run, then after "--" the arguments of the image's program.
func start(t *testing.T, args ...string) string {
	t.Helper()
	return startImage(t, image, args...)
}

// startImage is start with another image.
func startImage(t *testing.T, image string, args ...string) string {
	t.Helper()
	options, arguments := args, []string(nil)
	for i, a := range args {
		if a == "--" {
			options, arguments = args[:i], args[i+1:]
		}
	}
	line := append([]string{"podman", "run", "--detach"}, options...)
	line = append(append(line, image), arguments...)
	id := strings.TrimSpace(run(t, line...))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", strings.Join(line, " "), logs(id))
		}
		if err := command("podman", "rm", "--force", "--time", "2", id).run(); err != nil {
			t.Error(err)
		}
	})
	return id
}

// A client is the file of a network namespace from which a test connects.
type client string

// newClient starts a container on the cluster network.
func newClient(t *testing.T) client {
	t.Helper()
	return client("/proc/" + pidOf(t, start(t, "--network", cluster, "--", "wait")) + "/ns/net")
}

// clusterAddress returns the address of eth0 in the namespace of a process.
func clusterAddress(t *testing.T, pid string) netip.Addr {
	t.Helper()
	// 2: eth0    inet 10.128.0.2/23 brd 10.128.1.255 scope global eth0 ...
	words := strings.Fields(in(t, pid, "ip", "-4", "-oneline", "address", "show", "dev", "eth0"))
	if len(words) < 4 {
		t.Fatal("eth0 has no address")
	}
	return netip.MustParsePrefix(words[3]).Addr()
}

// reserved is the source of the documentation's redirect pod.
var reserved = netip.MustParseAddr("192.168.12.99")

// patience is the limit of a wait, which only ends a test that hangs.
const patience = 10 * time.Minute

// ask sends one request and returns the answer.
func (c client) ask(proto, addr string) (who.Answer, error) {
	conn, err := c.dial(proto, addr)
	if err != nil {
		return who.Answer{}, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return who.Answer{}, err
	}
	return who.Ask(conn, bufio.NewReader(conn))
}

// dial opens a connection from the client.
func (c client) dial(proto, addr string) (net.Conn, error) {
	ns, err := netns.Open(string(c))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	var conn net.Conn
	err = ns.Do(func() (err error) {
		dialer := net.Dialer{Timeout: patience}
		conn, err = dialer.Dial(proto+"4", addr)
		return err
	})
	return conn, err
}

// want checks which server answers at an address, and which source it sees.
func (c client) want(t *testing.T, proto, addr, server string, peer netip.Addr) {
	t.Helper()
	a, err := c.ask(proto, addr)
	if err != nil {
		t.Errorf("%s %s: %v", proto, addr, err)
	} else if a != (who.Answer{Server: netip.MustParseAddrPort(server), Peer: peer}) {
		t.Errorf("%s %s: %s answered and saw %s, want %s, which sees %s", proto, addr, a.Server, a.Peer, server, peer)
	}
}

// wantExample checks all redirects of the documentation's example.
func (c client) wantExample(t *testing.T, router netip.Addr) {
	t.Helper()
	for _, w := range []struct{ proto, port, server string }{
		{"tcp", "80", "203.0.113.25:80"},
		{"tcp", "8080", "203.0.113.26:80"},
		{"tcp", "8443", "203.0.113.26:443"},
		{"tcp", "9000", "203.0.113.27:9000"},
		{"udp", "53", "203.0.113.27:53"},
	} {
		c.want(t, w.proto, router.String()+":"+w.port, w.server, reserved)
	}
}

// await waits until a condition is true.
func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timeout waiting for %s", what)
		}
	}
}
