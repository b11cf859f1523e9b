package operator_test

import (
	"flag"
	"fmt"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/cmd/egress-operator/internal/operator"
	"github.com/egress-router/egress-router/internal/manual"
)

var update = flag.Bool("update", false, "write the table of the README")

// The table of the README lists the flags.
func TestDocumentation(t *testing.T) {
	var table strings.Builder
	table.WriteString("| flag | default | meaning |\n|---|---|---|\n")
	flags, _ := operator.Flags()
	flags.VisitAll(func(f *flag.Flag) {
		_, usage := flag.UnquoteUsage(f)
		value := f.DefValue
		if value != "" {
			value = "`" + value + "`"
		}
		fmt.Fprintf(&table, "| `-%s` | %s | %s |\n", f.Name, value, usage)
	})
	if err := manual.Generated("../../README.md", "flags", table.String(), *update); err != nil {
		t.Error(err)
	}
}

// Invalid flags end the program before it reads anything, with a message that says what
// was expected.
func TestInvalidFlags(t *testing.T) {
	for _, test := range []struct {
		args string
		want string
	}{
		{"-default-route=yes", `flag -default-route is "yes": expected auto, always or never`},
		{"-log-level=loud", `flag -log-level is "loud": expected debug, info, warn or error`},
		{"-log-format=xml", `flag -log-format is "xml": expected text or json`},
		{"run", `argument "run": expected flags only`},
		{"-unknown", "flag provided but not defined: -unknown"},
	} {
		var stderr strings.Builder
		if code := operator.Run(t.Context(), strings.Fields(test.args), &stderr); code != 2 || !strings.Contains(stderr.String(), test.want) {
			t.Errorf("%s: exit code %d, want 2; stderr %q, want %q", test.args, code, &stderr, test.want)
		}
	}
}

func TestHelp(t *testing.T) {
	var stderr strings.Builder
	if code := operator.Run(t.Context(), []string{"-help"}, &stderr); code != 0 || !strings.Contains(stderr.String(), "-take-over") {
		t.Errorf("exit code %d, want 0; stderr %q", code, &stderr)
	}
}
