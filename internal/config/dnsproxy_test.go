package config

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/rules"
)

func TestParseDNSProxy(t *testing.T) {
	for name, test := range map[string]struct {
		env  DNSProxyEnvironment
		want func(*DNSProxyConfig)
	}{
		"defaults":    {DNSProxyEnvironment{}, func(*DNSProxyConfig) {}},
		"unit-test":   {DNSProxyEnvironment{Mode: "unit-test"}, func(c *DNSProxyConfig) { c.UnitTest = true }},
		"debug by 0":  {DNSProxyEnvironment{Debug: "0"}, func(c *DNSProxyConfig) { c.Debug = true }},
		"never idle":  {DNSProxyEnvironment{IdleTimeout: "0"}, func(c *DNSProxyConfig) { c.Idle = 0 }},
		"other times": {DNSProxyEnvironment{IdleTimeout: "1h30m", ShutdownGrace: "500ms"}, func(c *DNSProxyConfig) { c.Idle, c.Grace = 90*time.Minute, 500*time.Millisecond }},
		"switches":    {DNSProxyEnvironment{SendProxy: "true", AccessLog: "true"}, func(c *DNSProxyConfig) { c.SendProxy, c.AccessLog = true, true }},
		"off":         {DNSProxyEnvironment{SendProxy: "false", AccessLog: "false"}, func(*DNSProxyConfig) {}},
		"other mode": {DNSProxyEnvironment{Mode: "x"}, func(c *DNSProxyConfig) {
			c.Warnings = []string{`EGRESS_DNS_PROXY_MODE "x" is not known, and has no effect: the only mode is unit-test`}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			want := DNSProxyConfig{Idle: time.Minute, Grace: 20 * time.Second}
			test.want(&want)
			test.env.Destination = "80 a.example"
			var list string
			got, err := ParseDNSProxy(test.env, noFile, func(l string) error { list = l; return nil })
			if diff := cmp.Diff(want, got); diff != "" || err != nil || list != "80 a.example" {
				t.Errorf("%v, list %q, - wanted, + got:\n%s", err, list, diff)
			}
		})
	}
}

// Each fault names its variable, and the place in the list.
func TestDNSProxyErrors(t *testing.T) {
	bad := func(string) error {
		return &rules.ParseError{Line: rules.Line{Number: 2, Text: "x"}, Sentence: "Bad destination 'x'", Hint: "look"}
	}
	file := func(string) ([]byte, error) { return []byte("y\nx\n"), nil }
	for name, test := range map[string]struct {
		env      DNSProxyEnvironment
		readFile func(string) ([]byte, error)
		want     string
	}{
		"nothing":       {DNSProxyEnvironment{}, noFile, "hint: give it one line for each destination, for example \"8443 www.example.com 443\"\nMust specify EGRESS_DNS_PROXY_DESTINATION"},
		"a line":        {DNSProxyEnvironment{Destination: "y\nx"}, noFile, "EGRESS_DNS_PROXY_DESTINATION line 2: \"x\"\nhint: look\nBad destination 'x'"},
		"a file's line": {DNSProxyEnvironment{DestinationFile: "/f"}, file, "/f:2: \"x\"\nhint: look\nBad destination 'x'"},
		"no file":       {DNSProxyEnvironment{DestinationFile: "/f"}, noFile, "hint: it names a file inside the container, such as a key of a mounted ConfigMap\nEGRESS_DNS_PROXY_DESTINATION_FILE \"/f\" cannot be read: file does not exist"},
		"both":          {DNSProxyEnvironment{Destination: "x", DestinationFile: "/f"}, file, "EGRESS_DNS_PROXY_DESTINATION and EGRESS_DNS_PROXY_DESTINATION_FILE are both set: unset one of them"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseDNSProxy(test.env, test.readFile, bad)
			faults, ok := errors.AsType[Errors](err)
			if !ok || len(faults) != 1 || err.Error() != test.want {
				t.Errorf("got\n%v\nwant\n%s", err, test.want)
			}
		})
	}
}

// The variables are read as they stand, could not be set by Kubernetes, and are
// in the README in the same words.
func TestDNSProxyVariables(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(readme), "\n## DNS proxy\n")
	section, _, _ = strings.Cut(section, "\n## ")
	for _, v := range DNSProxyVariables() {
		t.Setenv(v.Name, "")
		t.Setenv(strings.TrimPrefix(v.Name, "EGRESS_"), "stray")
		if strings.Contains(v.Name, "_SERVICE_") || strings.Contains(v.Name, "_PORT") {
			t.Errorf("%s could be set by Kubernetes for a service", v.Name)
		}
		if row := fmt.Sprintf("| `%s` | %s | %s |\n", v.Name, v.Unset, v.Doc); v.Unset == "" || v.Doc == "" || !strings.Contains(section, row) {
			t.Errorf("the README's section lacks\n%s", row)
		}
	}
	if n := strings.Count(section, "\n| `EGRESS_"); n != len(DNSProxyVariables()) {
		t.Errorf("the README's section has %d variables, want %d", n, len(DNSProxyVariables()))
	}
	t.Setenv("EGRESS_DNS_PROXY_DESTINATION", " 80 a.example\n")
	t.Setenv("EGRESS_DNS_PROXY_DEBUG", "no")
	if env, err := ReadDNSProxy(); err != nil || env != (DNSProxyEnvironment{Destination: " 80 a.example\n", Debug: "no"}) {
		t.Errorf("%+v, %v", env, err)
	}
}
