package cli

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/wording"
)

// A place is the network namespace of a router that a command looks at, and its options.
type place struct {
	pid    int    // a process in it; 0: none is given
	netns  string // its file; empty: none is given
	json   bool
	follow bool
	of     string // destination, name or port; empty: all
}

// parsePlace parses the arguments of diagnose and connections.
func parsePlace(args []string) (at place, ok bool) {
	if len(args) == 0 || args[0] != "diagnose" && args[0] != "connections" {
		return at, false
	}
	for rest := args[1:]; len(rest) > 0; {
		option := rest[0]
		rest = rest[1:]
		value := ""
		if slices.Contains([]string{"--pid", "--netns", "-o"}, option) {
			if len(rest) == 0 {
				return at, false
			}
			value, rest = rest[0], rest[1:]
		}
		var err error
		switch {
		case option == "--pid" && at.pid == 0:
			at.pid, err = strconv.Atoi(value)
			ok = err == nil && at.pid > 0
		case option == "--netns" && at.netns == "":
			at.netns, ok = value, value != ""
		case option == "-o" && !at.json:
			at.json, ok = true, value == "json"
		case option == "--follow" && args[0] == "connections":
			at.follow, ok = true, true
		case args[0] == "diagnose" && at.of == "" && !strings.HasPrefix(option, "-"):
			at.of, ok = option, option != ""
		default:
			ok = false
		}
		if !ok {
			return at, false
		}
	}
	return at, at.pid == 0 || at.netns == ""
}

// file returns the file of the namespace; empty: it is that of this process.
func (at place) file() string {
	if at.pid != 0 {
		return at.inRoot("ns/net")
	}
	return at.netns
}

// inRoot returns a file below /proc/PID.
func (at place) inRoot(name string) string { return fmt.Sprintf("/proc/%d/%s", at.pid, name) }

// enter moves the process into the namespace, with the variables of its process where this
// one has none. If it is in another one, it does not return but executes the program anew
// there, since namespaces belong to threads.
func (at place) enter(p Process) error {
	if at.file() == "" {
		return nil
	}
	if at.pid != 0 && os.Getenv("EGRESS_SOURCE") == "" && os.Getenv("EGRESS_CONFIG") == "" {
		if err := at.adoptVariables(); err != nil {
			return err
		}
	}
	there, err := netns.Open(at.file())
	if err != nil {
		return err
	}
	defer there.Close()
	here, err := netns.Current()
	if err != nil {
		return err
	}
	defer here.Close()
	if there.Equal(here) {
		return nil
	}
	return there.Do(func() error {
		return os.NewSyscallError("execve", unix.Exec("/proc/self/exe", append([]string{p.Name}, p.Args...), os.Environ()))
	})
}

// The variables whose values are files of the router's container.
var fileVariables = []string{"EGRESS_DESTINATION_FILE", "EGRESS_CONFIG"}

// adoptVariables sets the variables of the router's process, with its files as this
// process sees them.
func (at place) adoptVariables() error {
	list, err := os.ReadFile(at.inRoot("environ"))
	if err != nil {
		return fmt.Errorf("read the variables of process %d: %w", at.pid, err)
	}
	for variable := range bytes.SplitSeq(list, []byte{0}) {
		name, value, _ := strings.Cut(string(variable), "=")
		if !strings.HasPrefix(name, "EGRESS_") || os.Getenv(name) != "" {
			continue
		}
		if slices.Contains(fileVariables, name) && value != "" {
			value = at.inRoot(filepath.Join("root", value))
		}
		if err := os.Setenv(name, value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// resolvConf returns the resolv.conf(5) of the router's container; empty: it is not known.
func (at place) resolvConf() string {
	switch {
	case at.pid != 0:
		return at.inRoot("root" + resolvConf)
	case at.netns != "":
		return ""
	}
	return resolvConf
}

// A notConfiguredError means that a command has no variables, and that the namespace does
// not show what they would be.
type notConfiguredError struct{ error }

// Hint returns the remedy.
func (e *notConfiguredError) Hint(wording.Names) string {
	return "set EGRESS_SOURCE and EGRESS_GATEWAY as for the router, or, on the node, name its process by --pid PID"
}

// configuration returns the configuration of the router. Without variables it is what the
// namespace shows, and partial is why it lacks the rest.
func (at place) configuration(p Process) (c config.Config, partial string, err error) {
	env, err := p.Environment()
	if err != nil {
		return c, "", fmt.Errorf("read environment: %w", err)
	}
	if env.Mode == string(config.UnitTest) {
		env.Mode = string(config.Init)
	}
	if env.Source == "" && env.ConfigFile == "" {
		s, err := show(env)
		if err != nil {
			return c, "", &notConfiguredError{err}
		}
		env.Mode, env.Interface, env.Source, env.Gateway, env.Grammar = string(config.HTTPProxy), s.egress, s.source.String(), s.gateway.String(), ""
		partial = fmt.Sprintf("this container lacks the router's variables; %s and the gateway %s are those of the default route, and destinations and rules are not known", s.source.Addr(), s.gateway)
	}
	c, err = config.Parse(env, readFile)
	return c, partial, err
}

// shown is what a namespace shows of a router.
type shown struct {
	egress  string // interface
	source  netip.Prefix
	gateway netip.Addr
}

// show returns the reserved address and the gateway, as far as the namespace shows them: those of
// the default route by the egress interface, which without its variable is macvlan0, or else the
// one that the default route has.
func show(env config.Environment) (shown, error) {
	kernel, err := link.Open()
	if err != nil {
		return shown{}, err
	}
	defer kernel.Close()
	egress := cmp.Or(env.Interface, config.DefaultInterface)
	candidates := []string{egress}
	if env.Interface == "" && kernel.Exists(egress) != nil {
		all, err := kernel.Interfaces()
		if err != nil {
			return shown{}, err
		}
		for _, i := range all {
			if i.Macvlan { // as the CNI plugin's
				candidates = append(candidates, i.Name)
			}
		}
	}
	var failed error
	for _, name := range candidates {
		s, err := showBy(kernel, name)
		if err == nil {
			return s, nil
		}
		failed = cmp.Or(failed, err)
	}
	return shown{}, failed
}

// showBy is show for one interface. Another program may have replaced the route by one without
// a source.
func showBy(kernel *link.Kernel, egress string) (shown, error) {
	state, err := kernel.Observe(plan.Network{Interface: egress})
	if err != nil {
		return shown{}, err
	}
	for _, r := range state.Routes {
		for _, a := range state.Addresses {
			if r.IsDefault() && r.Index == state.Index && r.Gateway.IsValid() && (r.Source == a.Addr() || !r.Source.IsValid() && a.Addr().Is4() == r.Gateway.Is4()) {
				return shown{egress, a, r.Gateway}, nil
			}
		}
	}
	return shown{}, fmt.Errorf("find the reserved address: no default route by %s has a source, and EGRESS_SOURCE is unset", egress)
}

// errFault makes diagnose exit with 1 after it has printed the findings.
var errFault = errors.New("fault found")

// runDiagnose prints why traffic does not arrive.
func runDiagnose(ctx context.Context, p Process) error {
	at, _ := parsePlace(p.Args)
	if err := at.enter(p); err != nil {
		return err
	}
	c, partial, err := at.configuration(p)
	if err != nil {
		return err
	}
	log := logger(p.Stderr, config.Log{JSON: c.Log.JSON, Level: max(c.Log.Level, slog.LevelError)})
	o, err := newObserver(at, c, partial, log).observe(ctx)
	if err != nil {
		return advised(c, err)
	}
	d, write := diagnose.Diagnose(o), diagnose.Diagnosis.WriteText
	if at.json {
		write = diagnose.Diagnosis.WriteJSON
	}
	if err := write(d, p.Stdout); err != nil {
		return err
	}
	if !d.OK {
		return errFault
	}
	return nil
}
