package router_test

import (
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// The router refuses each fault of its environment with exit code 1, a reason and a
// hint, and leaves the namespace as it was.
func TestFaultsAreRefused(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		options lab.Options
		env     map[string]string
		command string
		prepare func(*labtest.Pod)
		last    string // part of the last line
		hint    string // part of the lines before
	}{
		{
			name: "no macvlan0", options: lab.Options{MacvlanName: "net1"},
			last: `interface "macvlan0" not found; interfaces: eth0, net1`,
			hint: "NAME@macvlan0",
		},
		{
			name: "no eth0", options: lab.Options{ClusterName: "net0"},
			last: `interface "eth0" not found; interfaces: macvlan0, net0`,
			hint: "EGRESS_CLUSTER_INTERFACE",
		},
		{
			name: "source of the pod", env: map[string]string{"EGRESS_SOURCE": "10.128.0.98/24"},
			last: "reserved address 10.128.0.98: expected an unused address of the physical network, found the pod's cluster address",
			hint: "hint: set EGRESS_SOURCE to an address of the physical network",
		},
		{
			name: "gateway of the pod", env: map[string]string{"EGRESS_GATEWAY": "10.128.0.98"},
			last: "gateway 10.128.0.98: expected the router of the physical network, found an address of the pod",
			hint: "hint: set EGRESS_GATEWAY to the router of the network of EGRESS_SOURCE",
		},
		{
			name: "loopback as egress interface", env: map[string]string{"EGRESS_INTERFACE": "lo"},
			last: `EGRESS_INTERFACE "lo" is the loopback interface: expected one that leads to a network`,
			hint: "hint: correct the value, or unset the variable for the default, macvlan0",
		},
		{
			name: "loopback as cluster interface", env: map[string]string{"EGRESS_CLUSTER_INTERFACE": "lo"},
			last: `EGRESS_CLUSTER_INTERFACE "lo" is the loopback interface: expected one that leads to a network`,
			hint: "hint: correct the value, or unset the variable for the default, eth0",
		},
		{
			name: "no Ethernet", env: map[string]string{"EGRESS_INTERFACE": "loopback0"},
			prepare: renameLoopback,
			last:    `check egress interface: "loopback0" is not Ethernet: announce 192.168.12.99: hardware address "": expected 6 bytes, found 0`,
			hint:    "hint: set EGRESS_INTERFACE to an Ethernet interface",
		},
		{
			name: "a boolean as NIC of the host", env: map[string]string{"EGRESS_MACVLAN_PARENT": "false"},
			last: `EGRESS_MACVLAN_PARENT "false" is not a NIC of the host`,
			hint: "hint: unset the variable if another program creates the egress interface",
		},
		{
			name: "health on an address that is not the pod's", env: map[string]string{"EGRESS_ROUTER_MODE": "legacy", "EGRESS_HEALTH_LISTEN": "192.0.2.7:9465"},
			last: "listening on health address 192.0.2.7:9465: bind: cannot assign requested address",
			hint: "hint: the pod does not have this address: set EGRESS_HEALTH_LISTEN to the port alone, such as :9465",
		},
		{
			name: "health on an address without an interface", env: map[string]string{"EGRESS_ROUTER_MODE": "legacy", "EGRESS_HEALTH_LISTEN": "[fe80::1]:9465"},
			last: "listening on health address [fe80::1]:9465: bind: ",
			hint: "hint: set EGRESS_HEALTH_LISTEN to the port alone, such as :9465",
		},
		{
			name: "gateway of the cluster side", env: map[string]string{"EGRESS_GATEWAY": "10.128.0.1"},
			last: "gateway 10.128.0.1: expected the router of the physical network, found the cluster side's gateway",
			hint: "hint: set EGRESS_GATEWAY to the router of the physical network",
		},
		{
			name: "gateway in the cluster side's network", env: map[string]string{"EGRESS_GATEWAY": "10.128.0.71", "EGRESS_SOURCE": "192.168.12.99"},
			last: "gateway 10.128.0.71: expected the router of the physical network, found an address of the cluster side's network 10.128.0.0/23",
			hint: "hint: set EGRESS_GATEWAY to the router of the physical network",
		},
		{
			name: "no iptables", command: "without-iptables", env: map[string]string{"EGRESS_ROUTER_BACKEND": "iptables"},
			last: "looking for iptables",
			hint: `install the package "iptables"`,
		},
		{
			name: "no privilege", command: "without-privilege",
			last: "check capabilities: NET_ADMIN, NET_RAW missing, operation not permitted",
			hint: "the container lacks NET_ADMIN and NET_RAW: set securityContext.privileged: true",
		},
		{
			name: "one privilege", command: "without-net-raw",
			last: "operation not permitted",
			hint: "the container lacks NET_RAW: set securityContext.privileged: true",
		},
		{
			name: "no privilege, in a container with a read-only /proc/sys", command: "without-net-admin",
			last: "check capabilities: NET_ADMIN missing, operation not permitted",
			hint: "capabilities.add: [NET_ADMIN, NET_RAW]",
		},
		{
			name: "forwarding off and read-only", command: "with-read-only-proc",
			last: "set sysctl net.ipv4.ip_forward = 1: found 0, open /proc/sys/net/ipv4/ip_forward: read-only file system",
			hint: "net.ipv4.ip_forward=1",
		},
		{
			name: "invalid last line", env: map[string]string{"EGRESS_DESTINATION": "80 tcp 203.0.113.25\n81 tcp 203.0.113.25\n82 tpc 203.0.113.25\n"},
			last: "EGRESS_DESTINATION value '82 tpc 203.0.113.25' is invalid",
			hint: "EGRESS_DESTINATION line 3",
		},
		{
			name: "gateway is source", env: map[string]string{"EGRESS_GATEWAY": "192.168.12.99"},
			last: "EGRESS_GATEWAY unspecified or invalid",
			hint: "the same as EGRESS_SOURCE",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, test.options, labtest.IptablesNFT)
			if test.prepare != nil {
				test.prepare(p)
			}
			before := p.State()
			maps.Copy(p.Env, test.env)
			p.WantRefusal(test.command, test.last, test.hint)
			p.WantState(before)
		})
	}
}

// renameLoopback gives the loopback interface another name than lo.
func renameLoopback(p *labtest.Pod) {
	p.Helper()
	h := p.Handle(p.Lab.Router)
	lo := p.Link(h, "lo")
	for _, err := range []error{h.LinkSetDown(lo), h.LinkSetName(lo, "loopback0"), h.LinkSetUp(lo)} {
		if err != nil {
			p.Fatal(err)
		}
	}
}

// The router works with a read-only /proc/sys if forwarding is on already. One warning
// lists the sysctls that it cannot set, also of a router that stays.
func TestReadOnlyProcSysWithForwarding(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"init", "legacy"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
			if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
				t.Fatal(err)
			}
			p.Env["EGRESS_ROUTER_MODE"] = mode
			var log string
			if mode == "init" {
				r := p.Exec("with-read-only-proc")
				if r.Code != 0 {
					t.Fatalf("exit code %d:\n%s", r.Code, r.Stderr)
				}
				log = r.Stderr
			} else {
				r := p.StartCommand("with-read-only-proc")
				r.AwaitLog(1, "msg=ready")
				h := p.Handle(p.Lab.Router)
				for n := range 3 { // comparisons
					if err := h.LinkSetDown(p.Link(h, "macvlan0")); err != nil {
						t.Fatal(err)
					}
					r.AwaitLog(n+1, labtest.RepairLogged)
				}
				log = r.Logged()
			}
			p.WantExample()
			if n := strings.Count(log, `msg="sysctls not set"`); n != 1 {
				t.Errorf("%d warnings of sysctls, want 1:\n%s", n, labtest.Tail(log))
			}
			for _, want := range []string{"net/ipv4/conf/eth0/arp_ignore = 1, ", "read-only file system", "silent TCP connections end early"} {
				if !strings.Contains(log, want) {
					t.Errorf("the log lacks %q:\n%s", want, labtest.Tail(log))
				}
			}
		})
	}
}

// A run that fails and cannot roll back its changes reports that, also after
// SIGTERM.
func TestFailedRollbackIsReported(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"init", "legacy"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
			if err := p.Lab.SetSysctl(p.Lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
				t.Fatal(err)
			}
			p.Env["EGRESS_ROUTER_MODE"] = mode
			once, real := filepath.Join(p.TempDir(), "once"), p.Path
			// The first restore succeeds and stops the router, the others fail.
			p.Path = p.Programs("case $0 in */iptables-restore)\n" +
				"if [ -e " + once + " ]; then echo 'injected failure' >&2; exit 4; fi\n" +
				"touch " + once + "; \"$real\" \"$@\"; kill -TERM $PPID; sleep 1; exit 0;; esac\nexec $real \"$@\"\n")
			r := p.Exec()
			p.Path = real
			if r.Code != 1 || !strings.Contains(r.Last(), "roll back changes: ") || !strings.Contains(r.Stderr, "hint: the pod is partly configured") {
				t.Errorf("exit code %d:\n%s", r.Code, r.Stderr)
			}
			p.Env["EGRESS_ROUTER_MODE"] = "init"
			p.OK()
			p.WantExample()
		})
	}
}

// In legacy mode the program stays until a signal, and ends with exit code 0, also
// as the first process of a container.
func TestLegacyStaysUntilSignal(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"legacy", ""} {
		for _, pid1 := range []bool{false, true} {
			for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
				t.Run(fmt.Sprintf("mode %q, %v, pid 1 %v", mode, signal, pid1), func(t *testing.T) {
					t.Parallel()
					p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
					p.Env["EGRESS_ROUTER_MODE"] = mode
					cmd := p.Command("egress-router")
					cmd.SysProcAttr = &syscall.SysProcAttr{}
					if pid1 {
						cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
					}
					log := &ready{seen: make(chan struct{})}
					cmd.Stderr = log
					if err := p.Lab.Start(p.Lab.Router, cmd); err != nil {
						t.Fatal(err)
					}
					ended := make(chan error, 1)
					go func() { ended <- cmd.Wait() }()
					select {
					case <-log.seen:
					case err := <-ended:
						t.Fatalf("the router ended: %v, want it to stay", err)
					}
					p.WantExample()
					if err := cmd.Process.Signal(signal); err != nil {
						t.Fatal(err)
					}
					select {
					case err := <-ended:
						if err != nil {
							t.Errorf("ended with %v, want exit code 0", err)
						}
					case <-time.After(labtest.Patience):
						t.Errorf("still running %v after %v", labtest.Patience, signal)
					}
					p.WantExample() // the configuration stays, as with the original
				})
			}
		}
	}
}

// A ready watches a log for the line of a router that is ready.
type ready struct {
	text strings.Builder
	seen chan struct{}
	done bool
}

func (r *ready) Write(b []byte) (int, error) {
	r.text.Write(b)
	if !r.done && strings.Contains(r.text.String(), "msg=ready") {
		r.done = true
		close(r.seen)
	}
	return len(b), nil
}
