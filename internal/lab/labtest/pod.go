package labtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// A Backend is one way for rules to get into the kernel.
type Backend struct {
	Name     string // name of subtests
	Programs string // file that is each program of iptables in PATH
	Choice   string // EGRESS_ROUTER_BACKEND
}

// The backends: iptables of both kinds, and netlink. EGRESS_ROUTER_BACKEND is not
// set for the first, as in most pods.
var (
	IptablesNFT    = Backend{"iptables-nft", "xtables-nft-multi", ""}
	IptablesLegacy = Backend{"iptables-legacy", "xtables-legacy-multi", "iptables"}
	Nftables       = Backend{"nftables", "xtables-nft-multi", "nftables"}

	Backends = []Backend{IptablesNFT, IptablesLegacy, Nftables}
)

// A Pod is a lab with servers, and the environment of a router in it.
type Pod struct {
	*testing.T
	Lab     *lab.Lab
	Backend Backend
	Path    string // PATH of the router
	Env     map[string]string

	grammar string // EGRESS_GRAMMAR, if Env does not have it
	lock    string // file of the xtables lock, which pods of parallel tests must not share
}

// Patience is how long a test waits for an event, such as an answer.
const Patience = lab.Patience

// Example is the environment of the documentation's example.
func Example() map[string]string {
	return map[string]string{
		"EGRESS_ROUTER_MODE": "init",
		"EGRESS_SOURCE":      "192.168.12.99/24",
		"EGRESS_GATEWAY":     "192.168.12.1",
		"EGRESS_DESTINATION": "80   tcp 203.0.113.25\n8080 tcp 203.0.113.26 80\n8443 tcp 203.0.113.26 443\n203.0.113.27\n",
	}
}

// EachBackend runs a test in a fresh pod with each backend, in parallel. In the long variant
// it does so once more with the extended grammar, in which every list of the legacy one means
// the same; a test about one of them sets EGRESS_GRAMMAR.
func EachBackend(t *testing.T, o lab.Options, test func(*Pod)) { each(t, o, test, Backends...) }

// EachBackendInTurn is EachBackend for the n-th of tests that are alike: in the short variant it
// is one of the backends, another for the next test.
func EachBackendInTurn(t *testing.T, n int, o lab.Options, test func(*Pod)) {
	if nstest.Long() {
		EachBackend(t, o, test)
		return
	}
	each(t, o, test, Backends[n%len(Backends)])
}

// EachFlavour is EachBackend with each kind of iptables alone.
func EachFlavour(t *testing.T, o lab.Options, test func(*Pod)) {
	each(t, o, test, IptablesNFT, IptablesLegacy)
}

// EachFlavourInTurn is EachBackendInTurn with the kinds of iptables.
func EachFlavourInTurn(t *testing.T, n int, o lab.Options, test func(*Pod)) {
	if nstest.Long() {
		EachFlavour(t, o, test)
		return
	}
	each(t, o, test, []Backend{IptablesNFT, IptablesLegacy}[n%2])
}

func each(t *testing.T, o lab.Options, test func(*Pod), backends ...Backend) {
	run := func(name, grammar string, b Backend) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := New(t, o, b)
			p.grammar = grammar
			test(p)
		})
	}
	for _, b := range backends {
		run(b.Name, "", b)
		if nstest.Long() {
			run(b.Name+"-extended", "extended", b)
		}
	}
}

// New returns a fresh pod, whose environment is the documentation's example. The
// lab is closed when the test ends.
func New(t *testing.T, o lab.Options, b Backend) *Pod {
	t.Helper()
	l, err := lab.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	for _, s := range []struct{ proto, addr string }{
		{"tcp", "203.0.113.25:80"}, {"tcp", "203.0.113.26:80"}, {"tcp", "203.0.113.26:443"},
		{"tcp", "203.0.113.27:9000"}, {"udp", "203.0.113.27:53"}, {"udp", "203.0.113.25:53"}, {"tcp", "192.168.12.80:80"},
	} {
		if _, err := l.Serve(l.Outside, s.proto, netip.MustParseAddrPort(s.addr)); err != nil {
			t.Fatal(err)
		}
	}
	return &Pod{
		T: t, Lab: l, Backend: b, Path: iptablesPath(t, b.Programs) + ":" + os.Getenv("PATH"), Env: Example(),
		lock: filepath.Join(t.TempDir(), "xtables.lock"),
	}
}

// For returns the pod for a subtest.
func (p *Pod) For(t *testing.T) *Pod {
	q := *p
	q.T = t
	return &q
}

// iptablesPath returns a directory in which iptables is of the given kind.
func iptablesPath(t *testing.T, programs string) string {
	t.Helper()
	multi := filepath.Join("/usr/sbin", programs)
	if _, err := os.Stat(multi); err != nil {
		t.Fatalf("both kinds of iptables are needed (package iptables): %v", err)
	}
	dir := t.TempDir()
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		if err := os.Symlink(multi, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// lockVariable sets the file of the xtables lock (iptables(8)).
const lockVariable = "XTABLES_LOCKFILE="

// Command returns the program, or another under whose name it runs, ready to
// start in the router's namespace.
func (p *Pod) Command(name string, args ...string) *exec.Cmd {
	p.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		p.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(nstest.Environment(), "PATH="+p.Path, "EGRESS_ROUTER_BACKEND="+p.Backend.Choice, lockVariable+p.lock)
	if p.grammar != "" {
		cmd.Env = append(cmd.Env, "EGRESS_GRAMMAR="+p.grammar)
	}
	for name, value := range p.Env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	return cmd
}

// A Result is the exit code and output of a finished process.
type Result struct {
	Code           int
	Stdout, Stderr string
}

// Last returns the last line of stderr.
func (r Result) Last() string {
	lines := strings.Split(strings.TrimSuffix(r.Stderr, "\n"), "\n")
	return lines[len(lines)-1]
}

// Exec runs the router, or another command, to its end.
func (p *Pod) Exec(name ...string) Result {
	p.Helper()
	if len(name) == 0 {
		name = []string{"egress-router"}
	}
	cmd := p.Command(name[0], name[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := p.Lab.Run(p.Lab.Router, cmd)
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		p.Fatal(err)
	} else if ok && exit.ExitCode() < 0 {
		p.Fatalf("%s: %v", name, err)
	}
	return Result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// OK runs the router and expects it to succeed.
func (p *Pod) OK() Result {
	p.Helper()
	r := p.Exec()
	if r.Code != 0 {
		p.Fatalf("exit code %d, want 0; stderr:\n%s", r.Code, Tail(r.Stderr))
	}
	return r
}

// WantRefusal runs the router, or another of its commands, and expects exit code 1,
// nothing on stdout, a last line with the reason, and a hint before it.
func (p *Pod) WantRefusal(command, last, hint string) {
	p.Helper()
	if command == "" {
		command = "egress-router"
	}
	r := p.Exec(command)
	if r.Code != 1 || r.Stdout != "" {
		p.Errorf("exit code %d, stdout %q; want 1 and nothing", r.Code, r.Stdout)
	}
	if !strings.Contains(r.Last(), last) {
		p.Errorf("last line:\n got %s\nwant %s", r.Last(), last)
	}
	if !strings.Contains(r.Stderr, hint) {
		p.Errorf("stderr lacks %q:\n%s", hint, Tail(r.Stderr))
	}
}

// Iptables runs iptables in the router's namespace.
func (p *Pod) Iptables(args ...string) {
	p.Helper()
	p.Tool(p.Program("iptables"), args...)
}

// Program returns the path of a program of iptables.
func (p *Pod) Program(name string) string {
	dir, _, _ := strings.Cut(p.Path, ":")
	return filepath.Join(dir, name)
}

// NFT runs one line of nft(8) in the router's namespace.
func (p *Pod) NFT(line string) string {
	p.Helper()
	return p.Tool("nft", line)
}

// FlushSourceRule deletes the rule that sets the source.
func (p *Pod) FlushSourceRule() {
	p.Helper()
	if p.Backend == Nftables {
		p.NFT("flush chain ip egress-router nat-postrouting")
	} else {
		p.Iptables("-t", "nat", "-F", "EGRESS-POSTROUTING")
	}
}

// Tool runs a program in the router's namespace and returns its output.
func (p *Pod) Tool(name string, args ...string) string {
	p.Helper()
	out, err := p.tool(name, args...)
	if err != nil {
		p.Fatal(err)
	}
	return out
}

// TryTool runs a program of the machine in the pod, which may fail.
func (p *Pod) TryTool(name string, args ...string) (string, error) { return p.tool(name, args...) }

func (p *Pod) tool(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), lockVariable+p.lock)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := p.Lab.Run(p.Lab.Router, cmd); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", cmd, err, &out)
	}
	return out.String(), nil
}

// Ask asks a server from a namespace, as [lab.Lab.Ask] does, with Patience.
func (p *Pod) Ask(from *netns.Namespace, proto string, addr netip.AddrPort) (lab.Answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	return p.Lab.Ask(ctx, from, proto, addr)
}

// Dial opens a connection, which is closed when the test ends.
func (p *Pod) Dial(from *netns.Namespace, proto string, addr netip.AddrPort) net.Conn {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.Context(), Patience)
	defer cancel()
	conn, err := p.Lab.Dial(ctx, from, proto, addr)
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = conn.Close() })
	return conn
}

// Open opens a connection to a server of the lab and reads its answer: the connection is
// quiet from here on. A server that sends later, under rules that do not have the
// connection, opens a tracked connection of its own (nf_conntrack_tcp_loose).
func (p *Pod) Open(from *netns.Namespace, proto string, addr netip.AddrPort) (net.Conn, *bufio.Reader) {
	p.Helper()
	conn := p.Dial(from, proto, addr)
	_ = conn.SetReadDeadline(time.Now().Add(Patience))
	r := bufio.NewReader(conn)
	if _, err := lab.ReadAnswer(r); err != nil {
		p.Fatalf("the answer of %s: %v", addr, err)
	}
	_ = conn.SetReadDeadline(time.Time{})
	return conn, r
}

// Serve starts a server of the lab. If the address was in use before, the former
// listener may last a little longer: a process that another test starts has a copy
// until execve(2).
func (p *Pod) Serve(ns *netns.Namespace, proto, addr string) *lab.Server {
	p.Helper()
	var s *lab.Server
	p.Until("serving at "+addr, func() bool {
		var err error
		s, err = p.Lab.Serve(ns, proto, netip.MustParseAddrPort(addr))
		if err != nil && !errors.Is(err, syscall.EADDRINUSE) {
			p.Fatal(err)
		}
		return err == nil
	})
	return s
}

// Until waits for a condition.
func (p *Pod) Until(what string, holds func() bool) {
	p.Helper()
	if !Poll(holds) {
		p.Fatalf("timeout after %v: %s", Patience, what)
	}
}

// Poll asks until an answer is true, and returns false after Patience. The pauses grow with
// the wait, so that it ends at most a quarter late, and the questions, of which some start
// processes, take no processor from what they ask about.
func Poll(holds func() bool) bool {
	const shortest, longest = time.Millisecond, 250 * time.Millisecond
	for begin := time.Now(); ; {
		asked := time.Now()
		if holds() {
			return true
		}
		now := time.Now()
		if now.Sub(begin) > Patience {
			return false
		}
		time.Sleep(min(max(now.Sub(begin)/4, now.Sub(asked), shortest), longest))
	}
}

// Tail returns the last lines of a log, for a message that first states the expected
// and found values.
func Tail(log string) string {
	const most = 100
	lines := strings.SplitAfter(log, "\n")
	if len(lines) <= most {
		return log
	}
	return fmt.Sprintf("(%d lines before)\n", len(lines)-most) + strings.Join(lines[len(lines)-most:], "")
}

// diff shows lines that differ.
func diff(want, got string) string {
	return cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n"))
}

// WantAnswer asks the pod from the client. It checks that the server answers and
// sees the reserved address.
func (p *Pod) WantAnswer(proto string, port uint16, server string) {
	p.Helper()
	a, err := p.Ask(p.Lab.Client, proto, netip.AddrPortFrom(lab.RouterAddr, port))
	if err != nil {
		p.Errorf("%s port %d: %v", proto, port, err)
	} else if a.Server != netip.MustParseAddrPort(server) || a.Peer.Addr() != lab.Source {
		p.Errorf("%s port %d: %s answered and saw %s; want %s, which sees %s", proto, port, a.Server, a.Peer.Addr(), server, lab.Source)
	}
}

// WantExample checks every destination of the documentation's example.
func (p *Pod) WantExample() {
	p.Helper()
	p.WantAnswer("tcp", 80, "203.0.113.25:80")
	p.WantAnswer("tcp", 8080, "203.0.113.26:80")
	p.WantAnswer("tcp", 8443, "203.0.113.26:443")
	p.WantAnswer("tcp", 9000, "203.0.113.27:9000")
	p.WantAnswer("udp", 53, "203.0.113.27:53")
}

// WantRefused checks that a port of the pod refuses the client.
func (p *Pod) WantRefused(proto string, port uint16) {
	p.Helper()
	a, err := p.Ask(p.Lab.Client, proto, netip.AddrPortFrom(lab.RouterAddr, port))
	if !errors.Is(err, syscall.ECONNREFUSED) {
		p.Errorf("%s port %d: answer %v, error %v; want a refusal", proto, port, a, err)
	}
}

// Handle returns a netlink handle in a namespace, until the test ends.
func (p *Pod) Handle(ns *netns.Namespace) *netlink.Handle {
	p.Helper()
	h, err := p.Lab.Netlink(ns)
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(h.Close)
	return h
}

// Link returns a link of a namespace.
func (p *Pod) Link(h *netlink.Handle, name string) netlink.Link {
	p.Helper()
	l, err := h.LinkByName(name)
	if err != nil {
		p.Fatal(err)
	}
	return l
}

// Programs returns a PATH in which a shell script replaces each iptables program. In
// the script, "$real" "$@" runs the program. Calls for the version do not run the
// script: there are two at a time.
func (p *Pod) Programs(script string) (path string) {
	p.Helper()
	programs, _, _ := strings.Cut(p.Path, ":")
	dir := p.TempDir()
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		text := fmt.Sprintf("#!/bin/sh\nreal=%s\ncase $* in *--version*) exec $real \"$@\"; esac\n%s", filepath.Join(programs, name), script)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil { //nolint:gosec // it has to run
			p.Fatal(err)
		}
	}
	return dir + ":" + p.Path
}

// Use sets another backend.
func (p *Pod) Use(b Backend) {
	p.Helper()
	_, path, _ := strings.Cut(p.Path, ":")
	p.Backend, p.Path = b, iptablesPath(p.T, b.Programs)+":"+path
}

// WantEcho checks that a connection to a server of the lab, read by r, carries data
// both ways. Lines that come before are skipped.
func (p *Pod) WantEcho(what string, conn net.Conn, r *bufio.Reader) {
	p.Helper()
	const line = "still there\n"
	err := conn.SetDeadline(time.Now().Add(Patience))
	if err == nil {
		_, err = conn.Write([]byte(line))
	}
	for got := ""; err == nil && got != line; {
		got, err = r.ReadString('\n')
	}
	if err != nil {
		p.Errorf("%s: %v, want an echo", what, err)
	}
}
