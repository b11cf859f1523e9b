package cli

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// version is set by the linker, to the source's version by git describe.
var version string

// programVersion returns version, or the module version of a go install.
func programVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && version == "" {
		return info.Main.Version
	}
	return version
}

func runVersion(_ context.Context, p Process) error {
	_, err := fmt.Fprintf(p.Stdout, "egress-router %s %s %s/%s\n", programVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}

// effect describes the redirects for a client, those to names with the addresses if these
// have been looked up.
func effect(set rules.Set, sources spec.Sources, resolved bool) string {
	var b strings.Builder
	var addresses []string
	for _, a := range sources.Addresses() {
		addresses = append(addresses, a.String())
	}
	source := strings.Join(addresses, ", ")
	if len(addresses) > 1 {
		source += ", by family and client,"
	}
	fmt.Fprintf(&b, "connections to the pod, with %s as their source:\n", source)
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, r := range set.Redirects {
		limits := strings.ReplaceAll(r.Limits.Value().String(), " ", ", ") // each begins with a space
		to := r.Destination()
		if resolved && r.Name() != "" {
			to += " (" + diagnose.AddressText(slices.Collect(r.All())) + ")"
		}
		fmt.Fprintf(table, "  %s %s\tto %s %s%s\n", r.Protocol, portText(r.LocalPorts()), to, portText(r.ToPorts()), limits)
	}
	rest := "everything else"
	if len(set.Redirects) == 0 {
		rest = "everything"
	}
	families := set.Families()
	if len(families) == 0 {
		families = []rules.Family{rules.IPv4}
	}
	for _, f := range families {
		what := rest
		if families[len(families)-1] != rules.IPv4 {
			what += " of " + f.String()
		}
		if to := set.FallbackOf(f); to.IsValid() {
			fmt.Fprintf(table, "  %s\tto %s, same protocol and port\n", what, to)
		} else {
			fmt.Fprintf(table, "  %s\tis not redirected\n", what)
		}
	}
	table.Flush()
	return b.String()
}

// portText returns one port, or a range, with its noun.
func portText(ports string) string {
	if strings.Contains(ports, "-") {
		return "ports " + ports
	}
	return "port " + ports
}
