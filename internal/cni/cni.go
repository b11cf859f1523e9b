// Package cni is the CNI plugin egress-router: the verbs of the CNI specification, their
// keys, results and errors, and the plugin's log on the node. It gives a pod a reserved
// source address on the physical network, as a router in a container does, from the node
// and without a privilege in the pod.
package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/spec"
)

// A Process is what the program has of its environment.
type Process struct {
	Args   []string // without the name of the program
	Getenv func(string) string
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// Namespaces is the directory with the named network namespaces of the node; empty:
	// /run/netns.
	Namespaces string
}

// patience is the time for ADD, CHECK and DEL. The kubelet waits two minutes, and duplicate
// address detection may take seconds.
const patience = 90 * time.Second

// A verb is a command of the runtime (CNI specification, CNI operations).
type verb struct {
	run   func(*call, context.Context) error
	needs []string // variables
	since string   // first version of the specification that has it
	fails bool     // it may fail
}

var verbs = map[string]verb{
	"ADD":    {(*call).add, []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"}, "0.1.0", true},
	"CHECK":  {(*call).check, []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"}, "0.4.0", true},
	"STATUS": {(*call).status, nil, "1.1.0", true},
	"GC":     {(*call).gc, nil, "1.1.0", true},
	"DEL":    {(*call).del, nil, "0.1.0", false},
}

// Run is the program. With CNI_COMMAND it is the plugin, whose result and errors are JSON on
// stdout, otherwise the program that installs it. It returns the exit code.
func Run(ctx context.Context, p Process) int {
	name := p.Getenv("CNI_COMMAND")
	if name == "" && len(p.Args) > 0 {
		return manage(ctx, p)
	}
	signal.Ignore(unix.SIGPIPE) // ADD rolls back if nobody reads its result
	c := &call{process: p, stderr: slog.New(slog.NewTextHandler(p.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))}
	if err := c.serve(ctx, name); err != nil {
		e := failure(err)
		c.log.line(levelError, "%s: %s", name, e.Error())
		_ = encode(p.Stdout, struct { // without a reader nobody learns of it
			CNIVersion string `json:"cniVersion"`
			*types.Error
		}{c.version, e})
		return 1
	}
	return 0
}

// encode writes a value as JSON.
func encode(w io.Writer, v any) error {
	text, err := json.MarshalIndent(v, "", "    ")
	if err == nil {
		_, err = w.Write(append(text, '\n'))
	}
	return err
}

// A call is one call of the plugin.
type call struct {
	process Process
	stderr  *slog.Logger
	log     nodeLog
	version string // of the specification, for the result
	conf    config

	container, netns, ifname string
	adjusts                  bool // an earlier plugin has made the interface
}

// serve runs a verb.
func (c *call) serve(ctx context.Context, name string) error {
	c.version = version.Current()
	v, known := verbs[name]
	if name == "VERSION" {
		return c.printVersion()
	}
	if !known {
		if name == "" {
			fmt.Fprint(c.process.Stderr, usage)
		}
		return newError(types.ErrInvalidEnvironmentVariables, "a runtime sets CNI_COMMAND; for a person: egress-router-cni install, uninstall, version",
			"CNI_COMMAND is %q: expected ADD, DEL, CHECK, STATUS, GC or VERSION", name)
	}
	if !v.fails { // half of it would be no success
		ctx = context.WithoutCancel(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	environment := c.readEnvironment(v)
	text, err := io.ReadAll(c.process.Stdin)
	if err == nil {
		err = c.parse(text)
	} else {
		err = newError(types.ErrIOFailure, "", "read configuration from stdin: %v", err)
	}
	c.log = nodeLog{file: c.conf.LogFile, level: levelOf(c.conf.LogLevel), stderr: c.stderr, now: time.Now, wait: maxLogWait, busy: new(bool)}
	if !v.fails { // a garbled call still has to end
		return v.run(c, ctx)
	}
	if environment != nil {
		return environment
	}
	if err != nil {
		return err
	}
	if old, err := version.GreaterThan(v.since, c.version); err != nil || old {
		return newError(types.ErrIncompatibleCNIVersion, "set cniVersion to "+v.since+" or later", "cniVersion is %q, which has no %s", c.version, name)
	}
	c.log.line(levelDebug, "Called CNI %s", name)
	return v.run(c, ctx)
}

// readEnvironment reads the variables of a call. The error is about a missing or an invalid
// one.
func (c *call) readEnvironment(v verb) error {
	c.container, c.netns, c.ifname = c.process.Getenv("CNI_CONTAINERID"), c.process.Getenv("CNI_NETNS"), c.process.Getenv("CNI_IFNAME")
	var invalid *types.Error
	for _, name := range v.needs {
		value := c.process.Getenv(name)
		switch {
		case value == "":
			return newError(types.ErrInvalidEnvironmentVariables, "the runtime has to set it", "%s is not set", name)
		case name == "CNI_CONTAINERID":
			invalid = utils.ValidateContainerID(value)
		case name == "CNI_IFNAME":
			if invalid = utils.ValidateInterfaceName(value); invalid == nil {
				if why := spec.FaultOfInterface(value); why != "" {
					invalid = newError(0, "", "%s", why)
				}
			}
		}
		if invalid != nil {
			return newError(types.ErrInvalidEnvironmentVariables, "", "%s is %q: %s", name, value, invalid.Msg)
		}
	}
	return nil
}

// printVersion prints the versions of the specification.
func (c *call) printVersion() error {
	var asked struct {
		CNIVersion string `json:"cniVersion"`
	}
	all := version.All.SupportedVersions()
	if text, err := io.ReadAll(c.process.Stdin); err != nil || json.Unmarshal(text, &asked) != nil || !slices.Contains(all, asked.CNIVersion) {
		asked.CNIVersion = version.Current()
	}
	return c.print(struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}{asked.CNIVersion, all})
}

// print prints a result.
func (c *call) print(v any) error {
	if err := encode(c.process.Stdout, v); err != nil {
		return newError(types.ErrIOFailure, "", "write result to stdout: %v", err)
	}
	return nil
}

// isGone reports whether a namespace has been deleted already.
func isGone(file string) bool {
	_, err := os.Stat(file)
	return file == "" || os.IsNotExist(err)
}
