// Package cli is the boundary of the process: arguments, environment, signals,
// exit codes, and what is printed where.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/follow"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/rules"
)

// The exit codes.
const (
	exitOK    = 0
	exitError = 1 // what the original exits with on every error
	exitUsage = 2 // the arguments are not understood
)

// A Process is what the program has of its surroundings.
type Process struct {
	Name        string                             // by which the program was started, maybe with a path
	Args        []string                           // without the program's name
	Environment func() (config.Environment, error) // reads the variables
	Stdout      io.Writer
	Stderr      io.Writer
}

// commands are the arguments that are understood, one at a time; health may have
// more.
var commands = map[string]func(context.Context, Process) error{
	"plan":       runPlan,
	"wait":       runWait,
	"http-proxy": runHTTPProxy,
	"dns-proxy":  runDNSProxy,
	"health":     runHealth,
	"help":       runHelp,
	"-h":         runHelp,
	"--help":     runHelp,
	"version":    runVersion,
	"--version":  runVersion,
}

// Run runs the program and returns its exit code.
func Run(ctx context.Context, p Process) int {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	run := command(p)
	if run == nil {
		fmt.Fprintf(p.Stderr, "egress-router: arguments not understood: %q\n%s", p.Args, usage)
		return exitUsage
	}
	err := run(ctx, p)
	if err == nil {
		return exitOK
	}
	if !errors.Is(err, errNotReady) { // that is on stdout
		report(p.Stderr, err)
	}
	return exitError
}

// command returns what the arguments ask for, nil if they are not understood.
func command(p Process) func(context.Context, Process) error {
	switch {
	case len(p.Args) == 0:
		return byName(p.Name)
	case len(p.Args) == 1 || asksHealthJSON(p.Args):
		return commands[p.Args[0]]
	}
	return nil
}

// byName returns what the program does without an argument: under the name of a
// proxy's image, it is that proxy.
func byName(name string) func(context.Context, Process) error {
	switch filepath.Base(name) {
	case "egress-http-proxy":
		return runHTTPProxy
	case "egress-dns-proxy":
		return runDNSProxy
	}
	return runMode
}

// resolvConf is where the pod's name servers stand (resolv.conf(5)).
const resolvConf = "/etc/resolv.conf"

// parse reads and checks the environment.
func parse(p Process) (config.Config, error) {
	env, err := p.Environment()
	if err != nil {
		return config.Config{}, fmt.Errorf("reading the environment: %w", err)
	}
	return config.Parse(env, readFile)
}

// readFile reads a file, and no more of it than a destination file may have.
// Something else than a file could keep it waiting for ever.
func readFile(name string) ([]byte, error) {
	if info, err := os.Stat(name); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, config.MaxDestinationFile+1))
	if err == nil && len(data) > config.MaxDestinationFile {
		err = fmt.Errorf("it is larger than %d MiB", config.MaxDestinationFile>>20)
	}
	return data, err
}

// runMode does what EGRESS_ROUTER_MODE says.
func runMode(ctx context.Context, p Process) error {
	settle := hurry()
	hangup, stop := hangups()
	defer stop()
	env, err := p.Environment()
	if err != nil {
		return fmt.Errorf("reading the environment: %w", err)
	}
	since := follow.At(env.DestinationFile)
	c, err := config.Parse(env, readFile)
	if err != nil {
		return err
	}
	log := logger(p.Stderr, c.Log)
	for _, w := range c.Warnings {
		log.Warn(w)
	}
	log.Debug("configuration", "mode", c.Mode, "source", c.Source, "gateway", c.Gateway,
		"egress", c.Egress, "cluster", c.Cluster, "redirects", len(c.Set.Redirects), "fallback", c.Set.Fallback)
	if c.Mode == config.UnitTest {
		_, err := p.Stdout.Write(rules.UnitTest(c.Set, c.Sides()))
		return err
	}

	if c.Mode.Stays() {
		return stay(ctx, p, c, env, reloader{file: env.DestinationFile, since: since, every: c.Health.Interval, hangup: hangup, log: log}, settle)
	}
	keepNameServers(&c, log)
	return newRouter(c, log).Apply(ctx)
}

// runWait does nothing until the process is told to stop. It is the second
// container of a pod whose first one was an init run, and keeps the pod's
// namespace alive without any privilege.
func runWait(ctx context.Context, _ Process) error {
	<-ctx.Done()
	return nil
}

func logger(w io.Writer, l config.Log) *slog.Logger {
	options := &slog.HandlerOptions{Level: l.Level}
	if l.JSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// stopped reports whether an error says that the program was told to stop, and
// that nothing is left half-done.
func stopped(err error) bool { return errors.Is(err, context.Canceled) && !partly(err) }

// partly reports whether an error says that something is left half-done.
func partly(err error) bool {
	_, left := errors.AsType[*router.UndoError](err)
	return left
}

// report prints an error: hints first, since the last line is the one that
// users of the original look at.
func report(w io.Writer, err error) {
	if faults, ok := errors.AsType[config.Errors](err); ok {
		fmt.Fprintln(w, faults)
		return
	}
	if stopped(err) {
		fmt.Fprintln(w, "egress-router: told to stop before it was done: what was changed is put back")
		return
	}
	if h := hint(err); h != "" {
		fmt.Fprintf(w, "hint: %s\n", strings.ReplaceAll(h, "\n", "\n      "))
	}
	fmt.Fprintf(w, "egress-router: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
}

// hint returns what an error, or one that it wraps, says to do.
func hint(err error) string {
	var hinter interface{ Hint() string }
	if errors.As(err, &hinter) && hinter.Hint() != "" {
		return hinter.Hint()
	}
	if errors.Is(err, os.ErrPermission) {
		return "configuring a network takes privilege: securityContext.privileged: true, or root with the capabilities NET_ADMIN and NET_RAW"
	}
	return ""
}
