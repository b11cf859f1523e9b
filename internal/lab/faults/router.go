// Package faults injects faults into the routers of a [lab.Site], which stand for one
// reserved address together, measures how long clients wait, and judges by the captures of
// the switch whether two of them ever sent at the same time.
package faults

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"

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
	return signalTree(r.cmd.Process.Pid, s)
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

// Pid returns the number of the process.
func (r *Router) Pid() int { return r.cmd.Process.Pid }

// signalTree signals a process and those that it has started: keepalived does its work in
// one of them.
func signalTree(pid int, s syscall.Signal) error {
	if err := syscall.Kill(pid, s); err != nil {
		return fmt.Errorf("sending %s to process %d: %w", s, pid, err)
	}
	if s == syscall.SIGTERM {
		return nil // the program ends them itself
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	if err != nil {
		return nil //nolint:nilerr // it has ended, or is a program without threads of its own
	}
	for child := range strings.FieldsSeq(string(text)) {
		if n, err := strconv.Atoi(child); err == nil {
			_ = signalTree(n, s) // it may have ended
		}
	}
	return nil
}

// logged is the size of a log's end that a Router keeps, in bytes.
const logged = 64 << 10

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

// Log returns the end of what the router has written.
func (r *Router) Log() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return string(r.log)
}
