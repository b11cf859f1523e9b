package config

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/rules"
)

// A list of comments is valid, and a warning that names its variable.
func TestListOfComments(t *testing.T) {
	read := func(string) ([]byte, error) { return []byte("# none yet\n\n \t\n"), nil }
	accept := func(string) error { return nil }
	http, err := ParseHTTPProxy(HTTPProxyEnvironment{DestinationFile: "rules"}, read, accept)
	if want := []string{"EGRESS_HTTP_PROXY_DESTINATION_FILE contains no rule: every request is denied"}; err != nil || !cmp.Equal(http.Warnings, want) {
		t.Errorf("%v, %q", err, http.Warnings)
	}
	dns, err := ParseDNSProxy(DNSProxyEnvironment{Destination: "#"}, read, accept)
	if want := []string{"EGRESS_DNS_PROXY_DESTINATION contains no destination: the proxy listens on no port"}; err != nil || !cmp.Equal(dns.Warnings, want) {
		t.Errorf("%v, %q", err, dns.Warnings)
	}
}

// A mistake of the whole list has its own hint, with any grammar.
func TestListHints(t *testing.T) {
	refuse := func(n int, text string) func(string) error {
		return func(string) error {
			return &rules.ParseError{Line: rules.Line{Number: n, Text: text}, Sentence: "Bad destination", Hint: "of the grammar"}
		}
	}
	for name, test := range map[string]struct {
		list, line string
		number     int
		want       string
	}{
		"plain":                     {"80 x", "80 x", 1, "hint: of the grammar"},
		"quotation marks":           {`"80 x"`, `"80 x"`, 1, "hint: the quotation marks are part of the line: remove them"},
		"backslash and n":           {`80 x\n81 y`, "80 xn81 y", 1, `hint: the two characters \n are no line end`},
		"backslash and n elsewhere": {"80 x\n" + `81 y\n82 z`, "80 x", 1, "hint: of the grammar"},
	} {
		_, err := ParseDNSProxy(DNSProxyEnvironment{Destination: test.list}, noFile, refuse(test.number, test.line))
		if err == nil || !strings.Contains(err.Error(), test.want) || !strings.HasSuffix(err.Error(), "\nBad destination") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// In a valid list, the rest of such a line is lost.
	for list, want := range map[string]string{
		`a.example\nb.example`:            `EGRESS_HTTP_PROXY_DESTINATION line 1 contains the two characters \n, which are no line end: the rest belongs to the same line`,
		`# ours\na.example`:               `EGRESS_HTTP_PROXY_DESTINATION line 1 contains the two characters \n, which are no line end: the rest belongs to the same line`,
		"a.example\n# not \\n but a line": "",
	} {
		c, err := ParseHTTPProxy(HTTPProxyEnvironment{Destination: list}, noFile, func(string) error { return nil })
		if found := strings.Join(c.Warnings, "\n"); err != nil || !strings.HasPrefix(found, want) || want == "" && found != "" {
			t.Errorf("%q: %v, %q", list, err, found)
		}
	}
}
