// Package faults injects faults into the routers of a [lab.Site], which stand for one
// reserved address together, measures how long clients wait, and judges by the captures of
// the switch whether two of them ever sent at the same time.
package faults

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

// A Router is the program of one pod of a site, which can end and be started again.
type Router struct {
	site *lab.Site
	node int
	make func(node int) *exec.Cmd

	cmd    *exec.Cmd
	exited chan struct{} // closed when cmd has ended
	asked  chan struct{} // exited of the program that was asked to end last

	mu  sync.Mutex
	log []byte // the end of its output
}

// NewRouter returns the router of a node, which makes its command anew for each start.
func NewRouter(s *lab.Site, node int, command func(node int) *exec.Cmd) *Router {
	return &Router{site: s, node: node, make: command}
}

// Start starts the program, unless it runs.
func (r *Router) Start() error {
	if r.Running() {
		return nil
	}
	r.cmd, r.exited = r.make(r.node), make(chan struct{})
	r.cmd.Stdout, r.cmd.Stderr = r, r
	r.mu.Lock()
	r.log = append(r.log, Started...)
	r.mu.Unlock()
	if err := r.site.Start(r.site.Nodes[r.node].Pod, r.cmd); err != nil {
		return err
	}
	go func(cmd *exec.Cmd, exited chan struct{}) {
		defer close(exited)
		_ = cmd.Wait() // most end by a signal
	}(r.cmd, r.exited)
	return nil
}

// Running reports whether the program has been started and has not ended.
func (r *Router) Running() bool {
	if r.cmd == nil {
		return false
	}
	select {
	case <-r.exited:
		return false
	default:
		return true
	}
}

// Signal sends a signal to the program and its child processes.
func (r *Router) Signal(s syscall.Signal) error {
	if !r.Running() {
		return nil
	}
	pids := tree(r.cmd.Process.Pid) // keepalived does its work in a child process
	if s == syscall.SIGTERM {
		pids = pids[:1] // the program ends them itself
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, s); err != nil && !errors.Is(err, syscall.ESRCH) { // it has just ended
			return fmt.Errorf("sending %s to process %d: %w", s, pid, err)
		}
	}
	return nil
}

// Terminate asks the program to end.
func (r *Router) Terminate() error {
	r.asked = r.exited
	return r.Signal(syscall.SIGTERM)
}

// AwaitEnd waits until the program that was asked to end has ended.
func (r *Router) AwaitEnd() { <-r.asked }

// Kill ends the program and waits until it has ended.
func (r *Router) Kill() error {
	if !r.Running() {
		return nil
	}
	if err := r.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-r.exited
	return nil
}

// Proc returns the path of a file of the program's directory in /proc.
func (r *Router) Proc(name string) string { return fmt.Sprintf("/proc/%d/%s", r.cmd.Process.Pid, name) }

// Processor returns the processor time of the program and its child processes.
func (r *Router) Processor() (time.Duration, error) {
	var sum time.Duration
	for _, pid := range tree(r.cmd.Process.Pid) {
		// The clock of a process, in nanoseconds (clock_getcpuclockid(3), CPUCLOCK_SCHED in
		// include/linux/posix-timers.h).
		const sched = 2
		var t unix.Timespec
		if err := unix.ClockGettime(int32(^pid<<3|sched), &t); err != nil {
			return 0, fmt.Errorf("reading the processor time of process %d: %w", pid, err)
		}
		sum += time.Duration(t.Nano())
	}
	return sum, nil
}

// tree returns a process and those that it has started.
func tree(pid int) []int {
	all := []int{pid}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return all
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		for child := range strings.FieldsSeq(string(text)) {
			if n, err := strconv.Atoi(child); err == nil {
				all = append(all, tree(n)...)
			}
		}
	}
	return all
}

// Started is the line of a Router's log before those of each start.
const Started = "--- start\n"

// logged is the size of a log's end that a Router keeps, in bytes.
const logged = 4 << 20

// Write appends to the router's log.
func (r *Router) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, b...)
	if cut := len(r.log) - logged; cut > 0 {
		r.log = bytes.Clone(r.log[cut:])
	}
	return len(b), nil
}

// Environment returns the variables, NAME=VALUE, of a router that stands by for another one
// of the site.
func Environment(s *lab.Site, node int) []string {
	var peers []string
	for _, n := range s.Nodes {
		peers = append(peers, n.Addr.String())
	}
	return []string{
		"EGRESS_ROUTER_MODE=legacy",
		"EGRESS_SOURCE=" + netip.PrefixFrom(lab.Source, lab.LAN.Bits()).String(),
		"EGRESS_GATEWAY=" + lab.GatewayAddr.String(),
		"EGRESS_DESTINATION=" + lab.Remote[0].String(),
		"EGRESS_ROUTER_BACKEND=nftables",
		"EGRESS_STANDBY=true",
		"EGRESS_STANDBY_PEERS=" + strings.Join(peers, ","),
		"EGRESS_STANDBY_REFERENCE=" + reference.String(),
		"EGRESS_STANDBY_PRIORITY=" + strconv.Itoa(100+node),
	}
}

// reference is the server on the cluster side that takes connections while it works.
var reference = netip.AddrPortFrom(lab.NodeAddr, 443)

// Log returns the end of what the router has written.
func (r *Router) Log() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return string(r.log)
}
