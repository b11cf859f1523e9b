// Package operator is the command egress-operator: flags, log and exit codes.
package operator

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"

	"github.com/egress-router/egress-router/cmd/egress-operator/internal/controller"
)

// memory is the heap size, in bytes, from which the garbage collector works harder. The
// operator needs 64 MB with 200 routers, together with what is not on the heap.
// GOMEMLIMIT takes precedence (package runtime).
const memory = 32 << 20

// Settings are the values of the flags.
type Settings struct {
	controller.Options
	LogFormat, LogLevel string
}

// Flags returns the flags of the command and the settings that they write to.
func Flags() (*flag.FlagSet, *Settings) {
	s := &Settings{}
	f := flag.NewFlagSet("egress-operator", flag.ContinueOnError)
	f.StringVar(&s.Image, "image", "localhost/egress-router", "`image` of egress-router, which the pods of routers run")
	f.StringVar(&s.Namespace, "namespace", "", "`namespace` whose routers are reconciled (default all)")
	f.BoolVar(&s.TakeOver, "take-over", false, "reconcile also routers and objects that another operator manages")
	f.StringVar((*string)(&s.DefaultRoute), "default-route", string(controller.Auto), "request the default route in the annotation of pods: always, never, or auto, which is always on OVN-Kubernetes")
	f.StringVar(&s.MetricsListen, "metrics-listen", ":8080", "`address` of /metrics; 0: none")
	f.StringVar(&s.HealthListen, "health-listen", ":8081", "`address` of /healthz and /readyz; 0: none")
	f.BoolVar(&s.LeaderElect, "leader-elect", true, "wait until no other operator runs, by a Lease")
	f.StringVar(&s.LogFormat, "log-format", "text", "format of log lines: text or json")
	f.StringVar(&s.LogLevel, "log-level", "info", "minimum `level` of log lines: debug, info, warn or error")
	return f, s
}

// Run runs the operator until SIGTERM, and returns the exit code.
func Run(ctx context.Context, args []string, stderr io.Writer) int {
	flags, s := Flags()
	flags.SetOutput(stderr)
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	}
	log, err := s.logger(stderr)
	if err == nil {
		err = s.check(flags.Args())
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memory)
	}
	s.Log = log
	if err := run(ctx, s.Options); err != nil {
		log.Error("operator failed", "error", err)
		return 1
	}
	return 0
}

func run(ctx context.Context, o controller.Options) error {
	ctrl.SetLogger(logr.FromSlogHandler(o.Log.Handler()))
	klog.SetSlogLogger(o.Log)
	cfg, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find API server: %w", err)
	}
	m, err := controller.New(cfg, o)
	if err != nil {
		return err
	}
	if err := m.Start(ctx); err != nil {
		return fmt.Errorf("run manager: %w", err)
	}
	return nil
}

// check checks the flags that have a list of values.
func (s *Settings) check(rest []string) error {
	switch s.DefaultRoute {
	case controller.Auto, controller.Always, controller.Never:
	default:
		return fmt.Errorf("flag -default-route is %q: expected auto, always or never", s.DefaultRoute)
	}
	if len(rest) > 0 {
		return fmt.Errorf("argument %q: expected flags only", rest[0])
	}
	return nil
}

func (s *Settings) logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(s.LogLevel)); err != nil {
		return nil, fmt.Errorf("flag -log-level is %q: expected debug, info, warn or error", s.LogLevel)
	}
	options := &slog.HandlerOptions{Level: level}
	switch s.LogFormat {
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return nil, fmt.Errorf("flag -log-format is %q: expected text or json", s.LogFormat)
}
