package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/router"
)

func TestTerminationLog(t *testing.T) {
	t.Setenv("EGRESS_HTTP_PROXY_DESTINATION", "!*")
	t.Setenv("EGRESS_DNS_PROXY_DESTINATION", "80")
	good := config.Environment{Mode: "init", Source: "192.168.12.99/24", Gateway: "192.168.12.1", Destination: "203.0.113.27"}
	for name, test := range map[string]struct {
		name, args string
		env        config.Environment
		mode       string // mode of the proxies
		last       string // on stderr
		left       bool   // the file contains the same
	}{
		"a mode, bad variables":         {last: "EGRESS_SOURCE unspecified or invalid", left: true},
		"a mode, no interface":          {env: good, last: `egress-router: interface "macvlan0" not found`, left: true},
		"unit-test":                     {env: config.Environment{Mode: "unit-test"}, last: "EGRESS_SOURCE unspecified or invalid"},
		"plan":                          {args: "plan", last: "EGRESS_SOURCE unspecified or invalid"},
		"health":                        {args: "health", last: "egress-router: "},
		"no such argument":              {args: "plans", last: `egress-router: invalid arguments: ["plans"]`},
		"HTTP proxy":                    {args: "http-proxy", last: "Bad destination '*'", left: true},
		"HTTP proxy, by name":           {name: "/usr/bin/egress-http-proxy", last: "Bad destination '*'", left: true},
		"HTTP proxy, by name, and plan": {name: "/usr/bin/egress-http-proxy", args: "plan", last: "EGRESS_SOURCE unspecified or invalid"},
		"HTTP proxy, unit-test":         {args: "http-proxy", mode: "unit-test", last: "Bad destination '*'"},
		"DNS proxy":                     {args: "dns-proxy", last: "Bad destination '80'", left: true},
		"DNS proxy, by name":            {name: "egress-dns-proxy", last: "Bad destination '80'", left: true},
		"DNS proxy, unit-test":          {name: "egress-dns-proxy", mode: "unit-test", last: "Bad destination '80'"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("EGRESS_HTTP_PROXY_MODE", test.mode)
			t.Setenv("EGRESS_DNS_PROXY_MODE", test.mode)
			file := filepath.Join(t.TempDir(), "termination-log")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			var stdout, stderr strings.Builder
			p := Process{
				Name: test.name, Args: strings.Fields(test.args), Stdout: &stdout, Stderr: &stderr, TerminationLog: file,
				Environment: func() (config.Environment, error) { return test.env, nil },
			}
			if code := Run(t.Context(), p); code == exitOK {
				t.Errorf("exit code 0, want a failure")
			}
			lines := strings.Split(strings.TrimSuffix(stderr.String(), "\n"), "\n")
			if !strings.HasPrefix(lines[len(lines)-1], test.last) {
				t.Errorf("on stderr: %q, want %q last", &stderr, test.last)
			}
			want := ""
			if test.left {
				want = stderr.String()
			}
			if got, err := os.ReadFile(file); string(got) != want || err != nil {
				t.Errorf("in the file: %q, %v; want %q", got, err, want)
			}
		})
	}
}

// An interruption is not a failure of the container, unless its rollback failed.
func TestEndsContainer(t *testing.T) {
	stop := fmt.Errorf("setting the address: %w", context.Canceled)
	for _, test := range []struct {
		err  error
		want bool
	}{
		{errors.New("no route"), true}, {stop, false},
		{errors.Join(stop, &router.UndoError{Err: errors.New("no such device")}), true},
	} {
		c := command{mode: func(Process) string { return "init" }}
		if got := endsContainer(c, Process{}, test.err); got != test.want {
			t.Errorf("%v: %v, want %v", test.err, got, test.want)
		}
	}
}

// writeTermination overwrites an existing regular file, and nothing else.
func TestWriteTermination(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{
		os.WriteFile(path("file"), []byte("what was there before, and is longer"), 0o600),
		os.WriteFile(path("other"), []byte("another's"), 0o600),
		os.Symlink("other", path("link")),
		unix.Mkfifo(path("pipe"), 0o600), // has no reader: opening it would block
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"file", "link", "pipe", "missing", "no/directory", "."} {
		writeTermination(path(name), "why\n")
	}
	writeTermination("", "why\n")
	for name, want := range map[string]string{"file": "why\n", "other": "another's"} {
		if got, err := os.ReadFile(path(name)); string(got) != want || err != nil {
			t.Errorf("%s holds %q, %v; want %q", name, got, err, want)
		}
	}
	if _, err := os.Lstat(path("missing")); !os.IsNotExist(err) {
		t.Errorf("file created: %v", err)
	}

	writeTermination(path("file"), strings.Repeat("hint: too long\n", 1000)+"why\n")
	got, err := os.ReadFile(path("file"))
	if err != nil || len(got) > 4096 || len(got) < 4096-len("hint: too long\n") || !strings.HasSuffix(string(got), "long\nwhy\n") {
		t.Errorf("%d bytes written of a long text, %v: %q", len(got), err, got)
	}
}

func TestLastLines(t *testing.T) {
	for name, test := range map[string]struct{ text, want string }{
		"nothing":                      {"", ""},
		"all":                          {"one\n567890\n", "one\n567890\n"},
		"one byte too many":            {"four\n567890\n", "567890\n"},
		"the cut is a line's start":    {"one\n2345\n789ab\n", "2345\n789ab\n"},
		"in the middle of a line":      {"one\ntwo\nthree\nfour\n", "three\nfour\n"},
		"a last line that is too long": {"hint: no\n123456789abc\n", "3456789abc\n"},
		"the same, of larger letters":  {"hint: no\n" + strings.Repeat("ä", 8) + "\n", "äääää\n"},
		"the same, cut inside a letter": {
			"hint: no\n" + strings.Repeat("ä", 8) + "!\n", "ääää!\n",
		},
		"no UTF-8":                     {"a\xff\xfeb\n", "a\uFFFDb\n"},
		"no UTF-8 and then too long":   {"1\xff23456789\n", "23456789\n"},
		"the last line has no newline": {"hint: no\nwhy", "why"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := lastLines(test.text, 11); got != test.want || !utf8.ValidString(got) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
