// Package cli is the boundary of the process: arguments, environment, signals, exit
// codes, and output.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/follow"
	"github.com/egress-router/egress-router/internal/logqueue"
	"github.com/egress-router/egress-router/internal/page"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// The exit codes.
const (
	exitOK    = 0
	exitError = 1 // every error, as in the original
	exitUsage = 2 // invalid arguments
)

// A Process is the environment of the program.
type Process struct {
	Name        string                             // name of the program, maybe with a path
	Args        []string                           // arguments without the program's name
	Environment func() (config.Environment, error) // reads the variables
	Stdout      io.Writer
	Stderr      io.Writer
	// TerminationLog is the file for a container's last error; empty: none.
	TerminationLog string

	logs   *logqueue.Writer // Stderr, after Run has begun
	again  <-chan struct{}  // closed at the second SIGTERM or SIGINT; nil: before Run
	events *page.Events     // last lines of the log, for the page; nil: there is none
}

// A command is one of the program's commands.
type command struct {
	run func(context.Context, Process) error
	// mode returns the value of the mode's variable, for a command that is a
	// container's main program; nil: the command is not.
	mode func(Process) string
}

// The commands that have modes.
var (
	routerCommand = command{runMode, func(p Process) string {
		env, _ := p.Environment() // the mode is empty after an error
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

// commands are the commands by their argument. Only health, plan, diagnose and
// connections accept others, besides those that ask for help.
var commands = map[string]command{
	"plan":        {run: runPlan},
	"diagnose":    {run: runDiagnose},
	"connections": {run: runConnections},
	"remove":      {run: runRemove},
	"wait":        {run: runWait}, // has no error
	"http-proxy":  httpProxyCommand,
	"dns-proxy":   dnsProxyCommand,
	"health":      {run: runHealth},
	"help":        {run: runHelp},
	"-h":          {run: runHelp},
	"--help":      {run: runHelp},
	"version":     {run: runVersion},
	"--version":   {run: runVersion},
}

// Run runs the program and returns its exit code.
func Run(ctx context.Context, p Process) int {
	ctx, again, stop := untilSignal(ctx)
	defer stop()
	p.again = again

	c, ok := commandOf(p)
	if !ok {
		_, _ = io.WriteString(p.Stderr, argumentError(p.Args))
		return exitUsage
	}
	if c.mode != nil {
		defer surviveBrokenPipes()()
	}
	p.logs = logqueue.New(p.Stderr)
	p.Stderr = p.logs
	defer p.logs.Flush()
	err := c.run(ctx, p)
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errNotReady) || errors.Is(err, errFault) { // stdout has the reasons
		return exitError
	}
	text := report(err)
	p.logs.Flush() // makes room
	_, _ = io.WriteString(p.Stderr, text)
	if endsContainer(c, p, err) {
		writeTermination(p.TerminationLog, text)
	}
	return exitError
}

// surviveBrokenPipes makes a write to a log whose reader has ended return an error,
// until the returned function is called. Otherwise SIGPIPE would end the program, maybe
// in the midst of a change. Programs that it starts have the default action, which an
// ignored signal would take from them (execve(2)).
func surviveBrokenPipes() (stop func()) {
	pipes := make(chan os.Signal, 1) // never read
	signal.Notify(pipes, syscall.SIGPIPE)
	return func() { signal.Stop(pipes) }
}

// commandOf returns the command for the arguments, if they are valid.
func commandOf(p Process) (c command, ok bool) {
	switch name, help := asksHelp(p.Args); {
	case len(p.Args) == 0:
		return byName(p.Name), true
	case help:
		return helpOf(name), true
	case len(p.Args) == 1 || asksHealthJSON(p.Args) || asksKernelPlan(p.Args):
		c, ok = commands[p.Args[0]]
	default:
		if _, valid := parsePlace(p.Args); valid {
			c, ok = commands[p.Args[0]]
		}
	}
	return c, ok
}

// byName returns the command without an argument: a proxy, by the name of its
// image, otherwise the router.
func byName(name string) command {
	switch filepath.Base(name) {
	case "egress-http-proxy":
		return httpProxyCommand
	case "egress-dns-proxy":
		return dnsProxyCommand
	}
	return routerCommand
}

// resolvConf is the file with the pod's name servers (resolv.conf(5)).
const resolvConf = "/etc/resolv.conf"

// parse reads and validates the environment.
func parse(p Process) (config.Config, error) {
	env, err := p.Environment()
	if err != nil {
		return config.Config{}, fmt.Errorf("read environment: %w", err)
	}
	return config.Parse(env, readFile)
}

// readFile reads a regular file, up to the size of a destination file. Reading other
// files could block for ever.
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

// runMode runs the mode of EGRESS_ROUTER_MODE.
func runMode(ctx context.Context, p Process) error {
	restoreGC := tuneGC()
	hangup, stop := hangups()
	defer stop()
	env, err := p.Environment()
	if err != nil {
		return fmt.Errorf("read environment: %w", err)
	}
	since := follow.At(env.File())
	c, err := config.Parse(env, readFile)
	if err != nil {
		return err
	}
	if c.Mode.Stays() {
		p.queueLog(c.Log)
		p.keepEvents(c.Health.Listen)
	}
	log := p.events.Logger(logger(p.Stderr, c.Log))
	for _, w := range c.Warnings {
		log.Warn("configuration warning", "warning", w)
	}
	log.Debug("configuration", "mode", c.Mode, "source", c.Sources.String(), "gateway", c.Sources.Gateways(),
		"egress", c.Egress, "cluster", c.Cluster, "redirects", len(c.Set.Redirects), "fallback", diagnose.AddressText(c.Set.Fallbacks()))
	if c.Mode == config.UnitTest {
		_, err := p.Stdout.Write(rules.UnitTest(c.Set, c.Sides()))
		return err
	}

	if err := checkPrivilege(c); err != nil {
		return err
	}
	if c.Mode.Stays() {
		return advised(c, stay(ctx, p, c, env, reloader{file: env.File(), since: since, every: c.Health.Interval, hangup: hangup, log: log}, restoreGC))
	}
	if _, err := settleFlowtable(&c, log); err != nil {
		return err
	}
	keepNameServers(&c, log)
	r := newRouter(c, log)
	resolveOnce(ctx, &c, r, log)
	if len(c.Set.Names()) > 0 {
		log.Warn("names are not followed", "effect", "their addresses stay those of now", "hint", "a container in mode monitor follows them")
	}
	r.Want = wanted(c)
	return advised(c, r.Apply(ctx))
}

// A namedError is an error with the names that the user of a configuration has for its
// fields.
type namedError struct {
	error
	names config.Names
}

// Unwrap returns the error without the names.
func (e *namedError) Unwrap() error { return e.error }

// An unadvisedError is an error of a run for which nothing has a hint.
type unadvisedError struct{ error }

// advised returns an error with a hint for the user of a configuration.
func advised(c config.Config, err error) error {
	switch {
	case err == nil || stopped(err):
		return err
	case hint(err) == "":
		return &unadvisedError{err}
	}
	return &namedError{err, c.Names()}
}

// Unwrap returns the error without the hint.
func (e *unadvisedError) Unwrap() error { return e.error }

// Hint returns a way to find the cause.
func (e *unadvisedError) Hint(wording.Names) string {
	return "EGRESS_ROUTER_DEBUG=1 logs every step and all rules, to find the cause"
}

// runWait waits for a signal. It is the second container of a pod whose first one
// was an init run, and keeps the pod's namespace alive without any privilege.
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

// queueLog makes the program wait for no reader of its log. It is for programs that
// stay: one that ends by itself writes every line.
func (p Process) queueLog(l config.Log) {
	p.logs.Start(func(out io.Writer, lines uint64) {
		logger(out, config.Log{JSON: l.JSON, Level: slog.LevelWarn}).Warn("log lines dropped", "lines", lines)
	})
	// Libraries, such as the client of net/http, have no other logger.
	log.SetFlags(0)
	log.SetOutput(slog.NewLogLogger(logger(p.Stderr, l).Handler(), slog.LevelDebug).Writer())
}

// keepEvents keeps the last lines of the log of a program that has a page.
func (p *Process) keepEvents(listen netip.AddrPort) {
	if listen.Port() != 0 {
		p.events = new(page.Events)
	}
}

// stopped reports whether an error is an interruption by a signal with a complete
// rollback.
func stopped(err error) bool { return errors.Is(err, context.Canceled) && !partly(err) }

// partly reports whether an error includes a failed rollback.
func partly(err error) bool {
	_, left := errors.AsType[*router.UndoError](err)
	return left
}

// report returns the output for an error: hints first, since users of the original
// look at the last line.
func report(err error) string {
	if faults, ok := errors.AsType[config.Errors](err); ok {
		return faults.Error() + "\n"
	}
	if stopped(err) {
		return "egress-router: interrupted, changes rolled back\n"
	}
	text := fmt.Sprintf("egress-router: %s\n", wording.OneLine(err.Error()))
	if h := hint(err); h != "" {
		text = fmt.Sprintf("hint: %s\n", strings.ReplaceAll(h, "\n", "\n      ")) + text
	}
	return text
}

// hint returns the hint of an error, or of one that it wraps.
func hint(err error) string {
	var names config.Names
	if named, ok := errors.AsType[*namedError](err); ok {
		names = named.names
	}
	if h := router.Hint(err, names); h != "" {
		return h
	}
	if errors.Is(err, os.ErrPermission) {
		return privilegeHint()
	}
	return ""
}
