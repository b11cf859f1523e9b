package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// Whatever goes wrong in its surroundings: exit code 1, a reason, what to do,
// and the namespace as it was.
func TestRefusals(t *testing.T) {
	for _, test := range []struct {
		name    string
		options lab.Options
		env     map[string]string
		command string
		last    string // part of the last line
		hint    string // part of what stands before
	}{
		{
			name: "no macvlan0", options: lab.Options{MacvlanName: "net1"},
			last: `interface "macvlan0" not found; there are: eth0, net1`,
			hint: "NAME@macvlan0",
		},
		{
			name: "no eth0", options: lab.Options{ClusterName: "net0"},
			last: `interface "eth0" not found; there are: macvlan0, net0`,
			hint: "EGRESS_CLUSTER_INTERFACE",
		},
		{
			name: "the source is the pod's", env: map[string]string{"EGRESS_SOURCE": "10.128.0.98/24"},
			last: "EGRESS_SOURCE is 10.128.0.98, which is the pod's address on the cluster network",
		},
		{
			name: "the gateway is the pod's", env: map[string]string{"EGRESS_GATEWAY": "10.128.0.98"},
			last: "EGRESS_GATEWAY is 10.128.0.98, which is an address of the pod itself",
		},
		{
			name: "no iptables", command: "without-iptables", env: map[string]string{"EGRESS_ROUTER_BACKEND": "iptables"},
			last: "looking for iptables",
			hint: `install the package "iptables"`,
		},
		{
			name: "no privilege", command: "without-privilege",
			last: "operation not permitted",
			hint: "securityContext.privileged: true",
		},
		{
			name: "forwarding off and read-only", command: "with-read-only-proc",
			last: "turning on net.ipv4.ip_forward: it is 0 and cannot be written: open /proc/sys/net/ipv4/ip_forward: read-only file system",
			hint: "net.ipv4.ip_forward=1",
		},
		{
			name: "a bad last line", env: map[string]string{"EGRESS_DESTINATION": "80 tcp 203.0.113.25\n81 tcp 203.0.113.25\n82 tpc 203.0.113.25\n"},
			last: "EGRESS_DESTINATION value '82 tpc 203.0.113.25' is invalid",
			hint: "EGRESS_DESTINATION line 3",
		},
		{
			name: "the gateway is the source", env: map[string]string{"EGRESS_GATEWAY": "192.168.12.99"},
			last: "EGRESS_GATEWAY unspecified or invalid",
			hint: "the same as EGRESS_SOURCE",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPod(t, test.options, iptablesNFT)
			before := p.state()
			maps.Copy(p.env, test.env)
			p.wantRefusal(test.command, test.last, test.hint)
			p.wantState(before)
		})
	}
}

// With /proc/sys read-only, but forwarding on already, the router works.
func TestReadOnlyProcSys(t *testing.T) {
	p := newPod(t, lab.Options{}, iptablesNFT)
	if err := p.lab.SetSysctl(p.lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	if r := p.run("with-read-only-proc"); r.code != 0 {
		t.Fatalf("exit code %d:\n%s", r.code, r.stderr)
	}
	p.wantExample()
}

// programs puts a shell script in front of each iptables program; in it,
// "$real" "$@" runs the program itself. Calls for the version pass by: who asks
// does so twice at a time.
func (p *pod) programs(script string) (path string) {
	p.Helper()
	programs, _, _ := strings.Cut(p.path, ":")
	dir := p.TempDir()
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore"} {
		text := fmt.Sprintf("#!/bin/sh\nreal=%s\ncase $* in *--version*) exec $real \"$@\"; esac\n%s", filepath.Join(programs, name), script)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil { //nolint:gosec // it has to run
			p.Fatal(err)
		}
	}
	return dir + ":" + p.path
}

// Every call of an iptables program fails once, before or after it has done its
// work, in a fresh pod and in one that is half damaged; each time everything is
// put back, and the next run succeeds. A restore that fails and yet has changed
// the rules is no failure: the kernel is asked.
func TestIptablesFails(t *testing.T) {
	for _, test := range []struct {
		name, does string
		restores   int // of one family that can fail, at least
	}{
		{"at once", "", 1},
		{"having done its work", `"$real" "$@";`, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachFlavour(t, lab.Options{}, func(p *pod) { testIptablesFails(p, test.does, test.restores) })
		})
	}
}

func testIptablesFails(p *pod, does string, restores int) {
	// A backend that takes the place of the failing one is another test.
	p.env["EGRESS_ROUTER_BACKEND"] = "iptables"
	// Each program counts its calls, and the one whose turn it is fails: those
	// of the two families run at the same time.
	calls, turn := p.TempDir(), filepath.Join(p.TempDir(), "turn")
	real, broken := p.path, p.programs(fmt.Sprintf("name=${0##*/}; echo call >>%[1]s/$name\n"+
		"if [ $name.$(wc -l <%[1]s/$name) = $(cat %[2]s) ]; then %[3]s echo 'injected failure' >&2; exit 4; fi\n"+
		"exec $real \"$@\"\n", calls, turn, does))
	failing := func(program string, call int) result {
		if err := os.WriteFile(turn, fmt.Appendf(nil, "%s.%d", program, call), 0o600); err != nil {
			p.Fatal(err)
		}
		if err := os.RemoveAll(calls); err != nil {
			p.Fatal(err)
		}
		if err := os.Mkdir(calls, 0o700); err != nil {
			p.Fatal(err)
		}
		p.path = broken
		defer func() { p.path = real }()
		return p.run()
	}
	for _, start := range []struct {
		name string
		make func()
	}{
		{"fresh", func() {}},
		{"damaged", func() {
			p.iptables("-t", "nat", "-D", "EGRESS-PREROUTING", "1")
			p.iptables("-t", "nat", "-D", "PREROUTING", "-j", "EGRESS-PREROUTING")
			p.iptables("-t", "nat", "-A", "POSTROUTING", "-j", "EGRESS-POSTROUTING")
			p.iptables("-t", "nat", "-N", "EGRESS-INPUT")
			p.iptables("-t", "nat", "-A", "EGRESS-INPUT", "-p", "tcp", "-m", "tcp", "--dport", "7", "-j", "ACCEPT")
			p.iptables("-t", "nat", "-A", "INPUT", "-j", "EGRESS-INPUT")
			p.iptables("-t", "nat", "-I", "POSTROUTING", "-o", "lo", "-j", "ACCEPT")
			p.tool(p.program("ip6tables"), "-F", "EGRESS-INPUT")
			p.env["EGRESS_DESTINATION"] = "8080 tcp 203.0.113.26 80\n"
		}},
	} {
		for _, program := range []string{"iptables-save", "ip6tables-save", "iptables-restore", "ip6tables-restore"} {
			if start.name == "damaged" {
				p.env["EGRESS_DESTINATION"] = example()["EGRESS_DESTINATION"]
				p.ok()
			}
			start.make()
			before := p.state()
			call := 1
			for ; ; call++ {
				r := failing(program, call)
				if r.code == 0 {
					break
				}
				if call > 50 {
					p.Fatalf("%s, %s: it never succeeds:\n%s", start.name, program, r.stderr)
				}
				if r.code != 1 || !strings.Contains(r.last(), "injected failure") {
					p.Errorf("%s, %s %d: exit code %d:\n%s", start.name, program, call, r.code, r.stderr)
				}
				if got := p.state(); got != before {
					p.Fatalf("%s, %s %d: not put back.\n--- was\n%s--- is\n%s\nstderr:\n%s", start.name, program, call, before, got, r.stderr)
				}
			}
			want := 1
			if strings.HasSuffix(program, "restore") {
				want = restores
			}
			if call-1 < want {
				p.Errorf("%s: %d calls of %s could fail, want %d", start.name, call-1, program, want)
			}
			p.wantAnswer("tcp", 8080, "203.0.113.26:80")
			if start.name == "fresh" {
				p.clear()
			}
		}
	}
}

// A program that outlives the router that started it does not undo what the
// next router does, which waits for it.
func TestKilledInTheMiddle(t *testing.T) {
	eachFlavour(t, lab.Options{}, func(p *pod) {
		started, real := filepath.Join(p.TempDir(), "started"), p.path
		p.path = p.programs("case $0 in *-restore) touch " + started + "; sleep 0.5; esac\nexec $real \"$@\"\n")
		cmd := p.command("egress-router")
		p.path = real
		if err := p.lab.Start(p.lab.Router, cmd); err != nil {
			p.Fatal(err)
		}
		for {
			if _, err := os.Stat(started); err == nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		if err := cmd.Process.Kill(); err != nil {
			p.Fatal(err)
		}
		_ = cmd.Wait()
		begin := time.Now()
		p.ok()
		if took := time.Since(begin); took < 200*time.Millisecond {
			p.Errorf("the next router was done after %v, before the program of the first", took)
		}
		time.Sleep(700 * time.Millisecond)
		p.wantUnchanged(p.ok())
		p.wantExample()
	})
}

// A run that fails and cannot put back what it changed says so, also when it
// was told to stop.
func TestNotPutBack(t *testing.T) {
	for _, mode := range []string{"init", "legacy"} {
		t.Run(mode, func(t *testing.T) {
			p := newPod(t, lab.Options{}, iptablesNFT)
			if err := p.lab.SetSysctl(p.lab.Router, "net/ipv4/ip_forward", "1"); err != nil {
				t.Fatal(err)
			}
			p.env["EGRESS_ROUTER_MODE"] = mode
			once, real := filepath.Join(p.TempDir(), "once"), p.path
			// The first restore succeeds and has the router stopped, the others fail.
			p.path = p.programs("case $0 in */iptables-restore)\n" +
				"if [ -e " + once + " ]; then echo 'injected failure' >&2; exit 4; fi\n" +
				"touch " + once + "; \"$real\" \"$@\"; kill -TERM $PPID; sleep 0.2; exit 0;; esac\nexec $real \"$@\"\n")
			r := p.run()
			p.path = real
			if r.code != 1 || !strings.Contains(r.last(), "putting back what was there: ") || !strings.Contains(r.stderr, "hint: the pod is configured in part") {
				t.Errorf("exit code %d:\n%s", r.code, r.stderr)
			}
			p.env["EGRESS_ROUTER_MODE"] = "init"
			p.ok()
			p.wantExample()
		})
	}
}

// In legacy mode the program stays, repeats nothing, and ends at once with 0
// when it is told to: also as the first process of a container.
func TestLegacyStaysAndEnds(t *testing.T) {
	for _, mode := range []string{"legacy", ""} {
		for _, pid1 := range []bool{false, true} {
			for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
				t.Run(fmt.Sprintf("mode %q, %v, pid 1 %v", mode, signal, pid1), func(t *testing.T) {
					p := newPod(t, lab.Options{}, iptablesNFT)
					p.env["EGRESS_ROUTER_MODE"] = mode
					cmd := p.command("egress-router")
					cmd.SysProcAttr = &syscall.SysProcAttr{}
					if pid1 {
						cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
					}
					log := &ready{seen: make(chan struct{})}
					cmd.Stderr = log
					if err := p.lab.Start(p.lab.Router, cmd); err != nil {
						t.Fatal(err)
					}
					ended := make(chan error, 1)
					go func() { ended <- cmd.Wait() }()
					select {
					case <-log.seen:
					case err := <-ended:
						t.Fatalf("it did not stay: %v", err)
					}
					p.wantExample()
					if err := cmd.Process.Signal(signal); err != nil {
						t.Fatal(err)
					}
					begin := time.Now()
					select {
					case err := <-ended:
						if err != nil {
							t.Errorf("ended with %v, want exit code 0", err)
						}
					case <-time.After(5 * time.Second):
						t.Errorf("still there %v after %v", time.Since(begin), signal)
					}
					p.wantExample() // what is configured stays, as with the original
				})
			}
		}
	}
}

// ready watches a log for the line that says that the router is.
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
