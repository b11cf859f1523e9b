// Package ci tests the scripts of this directory.
package ci

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// program is a program that no machine has, in a package of the same name.
const program = "egress-router-no-such-program"

// install runs .ci/install with stand-ins for all programs that would change the
// machine. apt-get fails for the first failures calls and writes its calls to a file.
func install(t *testing.T, failures int, args ...string) (code int, stderr string, calls []string) {
	t.Helper()
	directory := t.TempDir()
	for name, text := range map[string]string{
		"apt-get": `for a; do case $a in -*|*=*) ;; *) printf '%s ' "$a" ;; esac; done >>"$CALLS"; echo >>"$CALLS"
[ "$(wc -l <"$CALLS")" -gt "$FAILURES" ] || { echo "E: no route" >&2; exit 100; }`,
		"sleep":     `echo "sleep $1" >>"$CALLS"`,
		"sudo":      `exec "$@"`,
		"tee":       `cat >/dev/null`,
		"chmod":     "",
		"rm":        "",
		"systemctl": "",
	} {
		if err := os.WriteFile(filepath.Join(directory, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(directory, "calls")
	cmd := exec.Command("./install", args...)
	cmd.Env = []string{"PATH=" + directory + ":/usr/bin:/bin", "CALLS=" + file, "FAILURES=" + strconv.Itoa(failures)}
	var errs strings.Builder
	cmd.Stderr = &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		calls = append(calls, strings.TrimSpace(line))
	}
	return cmd.ProcessState.ExitCode(), errs.String(), calls
}

func TestInstall(t *testing.T) {
	for _, test := range []struct {
		name     string
		failures int
		code     int
		want     []string
	}{
		{"first download works", 0, 0, []string{"update", "install " + program}},
		{"second download works", 1, 0, []string{"update", "sleep 5", "update", "install " + program}},
		{"no download works", 9, 100, []string{"update", "sleep 5", "update", "sleep 20", "update"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			code, stderr, calls := install(t, test.failures, program, "sh", "coreutils:/bin/sh")
			if diff := cmp.Diff(test.want, calls); diff != "" || code != test.code {
				t.Errorf("exit code %d, want %d; calls want -, got +:\n%s\nstderr:\n%s", code, test.code, diff, stderr)
			}
			if want := "installing " + program + "\n"; !strings.HasPrefix(stderr, want) {
				t.Errorf("stderr = %q, want it to begin with %q", stderr, want)
			}
		})
	}
}

func TestInstallNothing(t *testing.T) {
	code, stderr, calls := install(t, 0, "sh", "coreutils:/bin/sh")
	if code != 0 || stderr != "" || calls != nil {
		t.Errorf("exit code %d, stderr %q, calls %q, want 0 and nothing", code, stderr, calls)
	}
}
