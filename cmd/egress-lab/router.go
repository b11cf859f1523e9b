package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
)

// The example of the documentation, with the addresses of the lab.
const (
	exampleSource      = "192.168.12.99/24"
	exampleGateway     = "192.168.12.1"
	exampleDestination = "80   tcp 203.0.113.25\n8080 tcp 203.0.113.26 80\n8443 tcp 203.0.113.26 443\n203.0.113.27"
)

// environment returns the router's variables, NAME=VALUE, for a mode, followed by more.
func environment(mode string, more ...string) []string {
	return append([]string{
		"EGRESS_ROUTER_MODE=" + mode,
		"EGRESS_SOURCE=" + exampleSource,
		"EGRESS_GATEWAY=" + exampleGateway,
	}, more...)
}

// patience is how long one process may take. The slowest, with 10,000 rules, takes less
// than a second on an idle machine: patience only ends one that hangs.
const patience = 2 * time.Minute

// An outcome is the result of an ended process.
type outcome struct {
	stdout, stderr string
	took           time.Duration // time from start to end
}

// execute runs a program to its end in a namespace of the lab. Its environment is env and,
// unless env has one, the PATH of this process. Input may be nil. The outcome of a program
// that fails contains its output.
func execute(ctx context.Context, l *lab.Lab, ns *netns.Namespace, env []string, input *os.File, program ...string) (outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := prepare(ctx, env, program...)
	if input != nil {
		cmd.Stdin = input
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	begin := time.Now()
	err := l.Run(ns, cmd)
	o := outcome{stdout.String(), stderr.String(), time.Since(begin)}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("not ended after %s", patience)
	}
	if err != nil {
		return o, fmt.Errorf("running %q: %w", program[0], err)
	}
	return o, nil
}

// prepare returns a command for [lab.Lab.Start]. It is killed when ctx ends.
func prepare(ctx context.Context, env []string, program ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program[0], program[1:]...)
	cmd.Env = env
	if !slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, "PATH=") }) {
		cmd.Env = append(slices.Clip(env), "PATH="+os.Getenv("PATH"))
	}
	// In a PID namespace of its own it is process 1, as in a container, and when it ends
	// the kernel kills its child processes (pid_namespaces(7)).
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	return cmd
}
