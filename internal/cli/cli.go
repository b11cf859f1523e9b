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
	// TerminationLog is the file that is told, too, why a container ended; empty: none.
	TerminationLog string
}

// A command is what the program can be asked to do.
type command struct {
	run func(context.Context, Process) error
	// mode returns what the mode's variable holds, of a command that a container
	// exists for; nil: the command is none of these.
	mode func(Process) string
}

// The commands that have modes.
var (
	routerCommand = command{runMode, func(p Process) string {
		env, _ := p.Environment() // has no mode if it cannot be read
		return env.Mode
	}}
	httpProxyCommand = command{runHTTPProxy, func(Process) string {
		env, _ := config.ReadHTTPProxy()
		return env.Mode
	}}
	dnsProxyCommand = command{runDNSProxy, func(Process) string {
		env, _ := config.ReadDNSProxy()
		return env.Mode
	}}
)

// commands are the arguments that are understood, one at a time; health may have
// more.
var commands = map[string]command{
	"plan":       {run: runPlan},
	"wait":       {run: runWait}, // has no error
	"http-proxy": httpProxyCommand,
	"dns-proxy":  dnsProxyCommand,
	"health":     {run: runHealth},
	"help":       {run: runHelp},
	"-h":         {run: runHelp},
	"--help":     {run: runHelp},
	"version":    {run: runVersion},
	"--version":  {run: runVersion},
}

// Run runs the program and returns its exit code.
func Run(ctx context.Context, p Process) int {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	c, ok := asked(p)
	if !ok {
		fmt.Fprintf(p.Stderr, "egress-router: invalid arguments: %q\n%s", p.Args, usage)
		return exitUsage
	}
	err := c.run(ctx, p)
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errNotReady) { // that is on stdout
		return exitError
	}
	text := report(err)
	_, _ = io.WriteString(p.Stderr, text)
	if endsContainer(c, p, err) {
		leave(p.TerminationLog, text)
	}
	return exitError
}

// asked returns what the arguments ask for, if they are understood.
func asked(p Process) (c command, ok bool) {
	switch {
	case len(p.Args) == 0:
		return byName(p.Name), true
	case len(p.Args) == 1 || asksHealthJSON(p.Args):
		c, ok = commands[p.Args[0]]
	}
	return c, ok
}

// byName returns what the program does without an argument: under the name of a
// proxy's image, it is that proxy.
func byName(name string) command {
	switch filepath.Base(name) {
	case "egress-http-proxy":
		return httpProxyCommand
	case "egress-dns-proxy":
		return dnsProxyCommand
	}
	return routerCommand
}

// resolvConf is where the pod's name servers stand (resolv.conf(5)).
const resolvConf = "/etc/resolv.conf"

// parse reads and checks the environment.
func parse(p Process) (config.Config, error) {
	env, err := p.Environment()
	if err != nil {
		return config.Config{}, fmt.Errorf("read environment: %w", err)
	}
	return config.Parse(env, readFile)
}

// readFile reads a file, and no more of it than a destination file may have.
// Something else than a file could keep it waiting for ever.
func readFile(name string) ([]byte, error) {
	if info, err := os.Stat(name); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, config.MaxDestinationFile+1))
	if err == nil && len(data) > config.MaxDestinationFile {
		err = fmt.Errorf("larger than %d MiB", config.MaxDestinationFile>>20)
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
		return fmt.Errorf("read environment: %w", err)
	}
	since := follow.At(env.DestinationFile)
	c, err := config.Parse(env, readFile)
	if err != nil {
		return err
	}
	log := logger(p.Stderr, c.Log)
	for _, w := range c.Warnings {
		log.Warn("configuration warning", "warning", w)
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

// report returns what is printed of an error: hints first, since the last line
// is the one that users of the original look at.
func report(err error) string {
	if faults, ok := errors.AsType[config.Errors](err); ok {
		return faults.Error() + "\n"
	}
	if stopped(err) {
		return "egress-router: interrupted, changes rolled back\n"
	}
	text := fmt.Sprintf("egress-router: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
	if h := hint(err); h != "" {
		text = fmt.Sprintf("hint: %s\n", strings.ReplaceAll(h, "\n", "\n      ")) + text
	}
	return text
}

// hint returns what an error, or one that it wraps, says to do.
func hint(err error) string {
	var hinter interface{ Hint() string }
	if errors.As(err, &hinter) && hinter.Hint() != "" {
		return hinter.Hint()
	}
	if errors.Is(err, os.ErrPermission) {
		return "network configuration requires privilege: securityContext.privileged: true, or root with the capabilities NET_ADMIN and NET_RAW"
	}
	return ""
}
