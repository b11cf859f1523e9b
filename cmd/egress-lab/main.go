// Egress-lab runs a built egress-router in a network of its own, made of
// namespaces on this machine (see package lab):
//
//	egress-lab demo PROGRAM [BACKEND]                       shows the answers that a client of the router gets
//	egress-lab bench [-readme FILE] PROGRAM [PART]          measures the router, as ratios
//	egress-lab bench-proxies [-readme FILE] PROGRAM [PART]  measures the proxies, as ratios to other proxies
//	egress-lab faults PROGRAM [COUNT [SEED]]                injects faults into routers that stand by for each other
//
// BACKEND is nftables or iptables: the router's rules, instead of those that it chooses.
//
// The parts of bench, without PART all of them, are
//
//	load          start to exit, to the bare tool with the same rules; sizes
//	connections   new connections with long lists, to those with one destination
//	throughput    bytes and datagrams, to plain routing
//	standby       outages of a router with another one that stands by, beside keepalived
//
// and those of bench-proxies
//
//	http          the HTTP proxy, to squid
//	dns           the DNS proxy, to haproxy
//
// The tables of all measured parts replace those in FILE, between two comments for each part.
//
// PROGRAM is the egress-router to run, bin/egress-router after make build. It cannot be
// below /run: egress-lab has a /run of its own.
//
// But for FILE, the program changes nothing outside that network and leaves nothing behind, even if it is
// killed: the kernel removes namespaces, files and processes with it. It needs root or, if
// the kernel allows user namespaces, no privilege.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// The exit codes.
const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2 // invalid arguments
)

const usage = `usage: egress-lab demo PROGRAM [BACKEND]                       show the answers that a client of the router gets
       egress-lab bench [-readme FILE] PROGRAM [PART]          measure the router, as ratios
       egress-lab bench-proxies [-readme FILE] PROGRAM [PART]  measure the proxies, as ratios to other proxies
       egress-lab faults PROGRAM [COUNT [SEED]]                inject faults into routers that stand by for each other
PROGRAM is an egress-router: make build creates bin/egress-router
BACKEND is nftables or iptables; without it the router chooses
PART is load, connections, throughput or standby for bench, http or dns for bench-proxies;
without it all parts are measured
FILE is a README in which the tables of the measured parts are replaced
COUNT is a number of rounds, 20 without it; the same SEED chooses the same faults
`

// backends are those of demo: values of the router's variable.
var backends = []string{"nftables", "iptables"}

// peers are the processes that bench-proxies starts, in the namespaces of the lab.
var peers = map[string]func(args []string, stdin io.Reader, stdout io.Writer) error{
	"origin": runOrigin,
	"drive":  runDrive,
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run runs the command in args and returns the exit code. The command runs in a second
// process, in namespaces of its own; the first process only waits.
func run(args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && peers[args[0]] != nil {
		if err := peers[args[0]](args[1:], os.Stdin, stdout); err != nil {
			fmt.Fprintf(stderr, "%s: %v\n", args[0], err)
			return exitError
		}
		return exitOK
	}
	c := command{stdout: stdout, stderr: stderr}
	readme := ""
	if len(args) > 2 && strings.HasPrefix(args[0], "bench") && args[1] == "-readme" {
		readme = args[2]
		args = slices.Delete(slices.Clone(args), 1, 3)
	}
	switch {
	case len(args) == 2 && args[0] == "demo", len(args) == 3 && args[0] == "demo" && slices.Contains(backends, args[2]):
		c.run = demo(args[2:])
	case len(args) == 2 && args[0] == "bench":
		c.run = bench(parts, readme)
	case len(args) == 3 && args[0] == "bench" && slices.Contains(parts, args[2]):
		c.run = bench(args[2:], readme)
	case len(args) == 2 && args[0] == "bench-proxies":
		c.run = benchProxies(proxyParts, readme)
	case len(args) == 3 && args[0] == "bench-proxies" && slices.Contains(proxyParts, args[2]):
		c.run = benchProxies(args[2:], readme)
	case len(args) >= 2 && args[0] == "faults":
		c.run = injectFaults(args[2:])
	}
	if c.run == nil {
		fmt.Fprintf(stderr, "egress-lab: invalid arguments: %q\n%s", args, usage)
		return exitUsage
	}
	c.name, c.program = args[0], args[1]
	return nstest.M{Tests: c}.Run()
}

// A command is the work of the second process.
type command struct {
	name           string
	run            func(ctx context.Context, program string, stdout io.Writer) error
	program        string // path of the router, as in the arguments
	stdout, stderr io.Writer
}

// Run runs the command and returns its exit code.
func (c command) Run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	program, err := executable(c.program)
	if err == nil {
		err = c.run(ctx, program, c.stdout)
	}
	switch {
	case err == nil:
		return exitOK
	case ctx.Err() != nil:
		fmt.Fprintf(c.stderr, "%s: interrupted\n", c.name)
		return exitError
	}
	if h := hint(err); h != "" {
		fmt.Fprintf(c.stderr, "hint: %s\n", h)
	}
	fmt.Fprintf(c.stderr, "%s: %v\n", c.name, err)
	return exitError
}

// A hintedError is an error with a known remedy.
type hintedError struct {
	error
	hint string
}

// Unwrap returns the error without the hint.
func (e *hintedError) Unwrap() error { return e.error }

// hint returns the remedy of an error, "" if none is known.
func hint(err error) string {
	if hinted, ok := errors.AsType[*hintedError](err); ok {
		return hinted.hint
	}
	switch {
	case errors.Is(err, syscall.EOPNOTSUPP):
		return "the lab needs a kernel with veth, bridge and macvlan: as root, modprobe -a veth bridge macvlan"
	case errors.Is(err, os.ErrPermission):
		return "the lab needs CAP_SYS_ADMIN and CAP_NET_ADMIN in its namespaces and a writable /proc/sys/net: run it outside a container, or in a privileged one"
	}
	return ""
}

// executable returns the absolute path of the router. Processes of a lab are started by
// path.
func executable(name string) (string, error) {
	path, err := filepath.Abs(name)
	if err != nil {
		return "", fmt.Errorf("finding the router: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", &hintedError{fmt.Errorf("finding the router: %w", err), "make build creates bin/egress-router"}
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0 {
		return "", &hintedError{fmt.Errorf("finding the router: %q is not an executable file", path), "make build creates bin/egress-router"}
	}
	return path, nil
}
