package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/netns"
)

// A backend is one way for rules to get into the kernel.
type backend struct {
	name     string // of subtests
	programs string // that is all programs of iptables in PATH
	choice   string // EGRESS_ROUTER_BACKEND
}

// The backends: iptables of both kinds, and netlink. The first is chosen by
// itself, as in most pods.
var (
	iptablesNFT    = backend{"iptables-nft", "xtables-nft-multi", ""}
	iptablesLegacy = backend{"iptables-legacy", "xtables-legacy-multi", "iptables"}
	nftables       = backend{"nftables", "xtables-nft-multi", "nftables"}

	backends = []backend{iptablesNFT, iptablesLegacy, nftables}
)

// A pod is a lab with servers, and the environment of a router in it.
type pod struct {
	*testing.T
	lab *lab.Lab
	backend
	path string // PATH of the router
	env  map[string]string
}

// The documentation's example.
func example() map[string]string {
	return map[string]string{
		"EGRESS_ROUTER_MODE": "init",
		"EGRESS_SOURCE":      "192.168.12.99/24",
		"EGRESS_GATEWAY":     "192.168.12.1",
		"EGRESS_DESTINATION": "80   tcp 203.0.113.25\n8080 tcp 203.0.113.26 80\n8443 tcp 203.0.113.26 443\n203.0.113.27\n",
	}
}

// eachBackend runs a test in a fresh pod with each backend.
func eachBackend(t *testing.T, o lab.Options, test func(*pod)) {
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) { test(newPod(t, o, b)) })
	}
}

// eachFlavour runs a test in a fresh pod with each kind of iptables.
func eachFlavour(t *testing.T, o lab.Options, test func(*pod)) {
	for _, b := range []backend{iptablesNFT, iptablesLegacy} {
		t.Run(b.name, func(t *testing.T) { test(newPod(t, o, b)) })
	}
}

func newPod(t *testing.T, o lab.Options, b backend) *pod {
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
	return &pod{t, l, b, iptablesPath(t, b.programs) + ":" + os.Getenv("PATH"), example()}
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

// command returns the program, or another under whose name it runs, ready to
// start in the router's namespace.
func (p *pod) command(name string, args ...string) *exec.Cmd {
	p.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		p.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = []string{"PATH=" + p.path, "EGRESS_ROUTER_BACKEND=" + p.choice}
	for name, value := range p.env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	return cmd
}

// A result is what a finished process left.
type result struct {
	code           int
	stdout, stderr string
}

// last returns the last line of stderr.
func (r result) last() string {
	lines := strings.Split(strings.TrimSuffix(r.stderr, "\n"), "\n")
	return lines[len(lines)-1]
}

// run runs the router, or another command, to its end.
func (p *pod) run(name ...string) result {
	p.Helper()
	if len(name) == 0 {
		name = []string{"egress-router"}
	}
	cmd := p.command(name[0], name[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := p.lab.Run(p.lab.Router, cmd)
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		p.Fatal(err)
	} else if ok && exit.ExitCode() < 0 {
		p.Fatalf("%s: %v", name, err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// ok runs the router and expects it to succeed.
func (p *pod) ok() result {
	p.Helper()
	r := p.run()
	if r.code != 0 {
		p.Fatalf("exit code %d:\n%s", r.code, r.stderr)
	}
	return r
}

// wantRefusal runs the router, or another command under whose name it runs, and
// expects exit code 1, nothing on stdout, a last line with the reason, and what
// to do before it.
func (p *pod) wantRefusal(command, last, hint string) {
	p.Helper()
	if command == "" {
		command = "egress-router"
	}
	r := p.run(command)
	if r.code != 1 || r.stdout != "" {
		p.Errorf("exit code %d, stdout %q; want 1 and nothing", r.code, r.stdout)
	}
	if !strings.Contains(r.last(), last) {
		p.Errorf("last line:\n got %s\nwant %s", r.last(), last)
	}
	if !strings.Contains(r.stderr, hint) {
		p.Errorf("stderr lacks %q:\n%s", hint, r.stderr)
	}
}

// iptables runs iptables in the router's namespace.
func (p *pod) iptables(args ...string) {
	p.Helper()
	p.tool(p.program("iptables"), args...)
}

// program returns the path of a program of iptables.
func (p *pod) program(name string) string {
	dir, _, _ := strings.Cut(p.path, ":")
	return filepath.Join(dir, name)
}

// nft runs one line of nft(8) in the router's namespace.
func (p *pod) nft(line string) string {
	p.Helper()
	return p.tool("nft", line)
}

// flushSourceRule deletes the rule that sets the source, behind the router's
// back.
func (p *pod) flushSourceRule() {
	p.Helper()
	if p.backend == nftables {
		p.nft("flush chain ip egress-router nat-postrouting")
	} else {
		p.iptables("-t", "nat", "-F", "EGRESS-POSTROUTING")
	}
}

func (p *pod) tool(name string, args ...string) string {
	p.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := p.lab.Run(p.lab.Router, cmd); err != nil {
		p.Fatalf("%s: %v\n%s", cmd, err, &out)
	}
	return out.String()
}

// source is the address that every server shall see.
var source = netip.MustParseAddr("192.168.12.99")

// ask waits longer than an answer that comes can take on a busy machine.
func (p *pod) ask(from *netns.Namespace, proto string, addr netip.AddrPort) (lab.Answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return p.lab.Ask(ctx, from, proto, addr)
}

// wantAnswer asks the pod from the client and checks who answered, and whom
// that server saw.
func (p *pod) wantAnswer(proto string, port uint16, server string) {
	p.Helper()
	a, err := p.ask(p.lab.Client, proto, netip.AddrPortFrom(lab.RouterAddr, port))
	if err != nil {
		p.Errorf("%s port %d: %v", proto, port, err)
	} else if a.Server != netip.MustParseAddrPort(server) || a.Peer.Addr() != source {
		p.Errorf("%s port %d: %s answered and saw %s; want %s, which sees %s", proto, port, a.Server, a.Peer.Addr(), server, source)
	}
}

// wantExample checks everything that the documentation's example promises.
func (p *pod) wantExample() {
	p.Helper()
	p.wantAnswer("tcp", 80, "203.0.113.25:80")
	p.wantAnswer("tcp", 8080, "203.0.113.26:80")
	p.wantAnswer("tcp", 8443, "203.0.113.26:443")
	p.wantAnswer("tcp", 9000, "203.0.113.27:9000")
	p.wantAnswer("udp", 53, "203.0.113.27:53")
}

// wantRefused checks that nothing answers at a port of the pod, and says so at
// once.
func (p *pod) wantRefused(proto string, port uint16) {
	p.Helper()
	a, err := p.lab.Ask(context.Background(), p.lab.Client, proto, netip.AddrPortFrom(lab.RouterAddr, port))
	if !errors.Is(err, syscall.ECONNREFUSED) {
		p.Errorf("%s port %d: answer %v, error %v; want a refusal", proto, port, a, err)
	}
}

// state describes everything in the router's namespace that a router could
// change, for comparing. Routes and chains are sorted, since where they stand
// depends on when they were made; rules are not.
func (p *pod) state() string {
	p.Helper()
	var lines, routes []string
	err := p.lab.Router.Do(func() error {
		kernel, err := link.Open()
		if err != nil {
			return err
		}
		defer kernel.Close()
		s, err := kernel.Observe(link.Want{
			Interface: p.lab.MacvlanName,
			Cluster:   link.ClusterSide{Interface: p.lab.ClusterName, Table: config.DefaultReplyTable},
		})
		if err != nil {
			return err
		}
		lines = append(lines, fmt.Sprintf("%s up %v forwards %v promotes %v forwarding %v", p.lab.MacvlanName, s.Up, s.Forwards, s.Promotes, s.Forwarding))
		for _, a := range s.Addresses {
			lines = append(lines, "address "+a.String())
		}
		for _, r := range s.Cluster.Rules {
			routes = append(routes, "rule "+r.String())
		}
		lines = append(lines, "rp_filter "+s.Cluster.Filter)
		for _, r := range slices.Concat(s.Routes, s.Cluster.Table) {
			routes = append(routes, "route "+r.String())
		}
		return nil
	})
	if err != nil {
		p.Fatal(err)
	}
	slices.Sort(routes)
	return strings.Join(append(lines, routes...), "\n") + "\n" + p.rules()
}

// clear takes all rules and what else init did away again, but for what does
// not matter to a next run.
func (p *pod) clear() {
	p.Helper()
	p.nft("flush ruleset")
	if p.backend == iptablesLegacy {
		for _, table := range []string{"nat", "mangle", "filter"} {
			for _, program := range []string{"iptables", "ip6tables"} {
				if program == "ip6tables" && table != "filter" {
					continue
				}
				p.tool(p.program(program), "-t", table, "-F")
				p.tool(p.program(program), "-t", table, "-X")
			}
		}
	}
}

// rules describes the rules of every backend.
func (p *pod) rules() string {
	p.Helper()
	var lines []string
	for _, tables := range []struct {
		save  string
		names []string
	}{{"iptables-save", []string{"nat", "filter", "mangle"}}, {"ip6tables-save", []string{"filter"}}} {
		for _, table := range tables.names {
			var chains, rules []string
			for line := range strings.Lines(p.tool(p.program(tables.save), "-t", table)) {
				line = strings.TrimSpace(line)
				switch line[0] {
				case ':':
					chain, _, _ := strings.Cut(line, " [") // counters
					chains = append(chains, chain)
				case '-':
					rules = append(rules, line)
				}
			}
			slices.Sort(chains)
			lines = append(append(append(lines, tables.save+" table "+table), chains...), rules...)
		}
	}
	tables := strings.Split(p.nft("list tables"), "\n")
	slices.Sort(tables)
	for _, name := range tables {
		if strings.Contains(name, " egress-router") {
			// The order of chains is that in which they were made.
			blocks := strings.Split(strings.TrimSuffix(strings.TrimSpace(p.nft("list "+name)), "}"), "\n\n")
			slices.Sort(blocks[1:])
			lines = append(lines, strings.Join(blocks, "\n"))
		}
	}
	return strings.Join(lines, "\n") + "\n"
}

// wantState checks that the state is as it was.
func (p *pod) wantState(want string) {
	p.Helper()
	if got := p.state(); got != want {
		p.Errorf("the namespace is not as it was.\n--- was\n%s--- is\n%s", want, got)
	}
}

// wantUnchanged checks that a run had nothing to change.
func (p *pod) wantUnchanged(r result) {
	p.Helper()
	for _, word := range []string{"network changed", "rules loaded"} {
		if strings.Contains(r.stderr, word) {
			p.Errorf("a run with nothing to do says %q:\n%s", word, r.stderr)
		}
	}
}

// handle returns a netlink handle in a namespace, until the test ends.
func (p *pod) handle(ns *netns.Namespace) *netlink.Handle {
	p.Helper()
	h, err := p.lab.Netlink(ns)
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(h.Close)
	return h
}

// link returns a link of a namespace.
func (p *pod) link(h *netlink.Handle, name string) netlink.Link {
	p.Helper()
	l, err := h.LinkByName(name)
	if err != nil {
		p.Fatal(err)
	}
	return l
}
