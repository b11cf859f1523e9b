package httpproxy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/egress-router/egress-router/rules"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// ruleFields compares rules without their text.
var ruleFields = cmp.Options{
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmpopts.IgnoreUnexported(Rule{}),
}

func TestParse(t *testing.T) {
	network := func(s string) Rule { return Rule{Number: 1, Network: netip.MustParsePrefix(s)} }
	for name, test := range map[string]struct {
		value string
		want  Rules
	}{
		"the documentation's example": {
			"!*.example.com\n!192.168.1.0/24\n192.168.2.1\n*",
			Rules{
				{Number: 1, Deny: true, Name: "example.com", Below: true},
				{Number: 2, Deny: true, Network: netip.MustParsePrefix("192.168.1.0/24")},
				{Number: 3, Network: netip.MustParsePrefix("192.168.2.1/32")},
				{Number: 4, Any: true},
			},
		},
		"comments and blank lines":        {"\n# a\n \t\n\r\n  1.2.3.4 \t\n#\n", Rules{network("1.2.3.4/32")}},
		"only comments":                   {"# nothing", nil},
		"only a newline":                  {"\n", nil},
		"comments behind the wildcard":    {"*\n\n# all\n", Rules{{Number: 1, Any: true}}},
		"a second wildcard":               {"*\n*", Rules{{Number: 1, Any: true}}},
		"letter case":                     {"WWW.Example.COM", Rules{{Number: 1, Name: "www.example.com"}}},
		"a final dot":                     {"*.example.com.", Rules{{Number: 1, Name: "example.com", Below: true}}},
		"one label":                       {"intranet", Rules{{Number: 1, Name: "intranet"}}},
		"one letter":                      {"x", Rules{{Number: 1, Name: "x"}}},
		"a name of hexadecimal digits":    {"cafe.de", Rules{{Number: 1, Name: "cafe.de"}}},
		"digits in front":                 {"3.example", Rules{{Number: 1, Name: "3.example"}}},
		"a whole top-level domain":        {"*.com", Rules{{Number: 1, Name: "com", Below: true}}},
		"IPv6":                            {"2001:DB8::1", Rules{network("2001:db8::1/128")}},
		"an IPv6 network":                 {"2001:db8::/32", Rules{network("2001:db8::/32")}},
		"bits beyond the length":          {"192.168.1.77/24", Rules{network("192.168.1.0/24")}},
		"IPv4 in IPv6":                    {"::ffff:192.0.2.1", Rules{network("192.0.2.1/32")}},
		"an IPv4 network in IPv6":         {"::ffff:192.0.2.0/120", Rules{network("192.0.2.0/24")}},
		"length 0":                        {"0.0.0.0/0", Rules{network("0.0.0.0/0")}},
		"a joined line":                   {"example\\\n.com", Rules{{Number: 1, Name: "example.com"}}},
		"a last line that is never read":  {"example.com\n*\\", Rules{{Number: 1, Name: "example.com"}}},
		"unusual hyphens":                 {"a-.b--c", Rules{{Number: 1, Name: "a-.b--c"}}},
		"the longest label":               {strings.Repeat("a", 63), Rules{{Number: 1, Name: strings.Repeat("a", 63)}}},
		"a comment with a protected sign": {`\# x`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse(test.value)
			if err != nil {
				t.Fatalf("Parse(%q): %v", test.value, err)
			}
			if diff := cmp.Diff([]Rule(test.want), []Rule(got), ruleFields); diff != "" {
				t.Errorf("Parse(%q), -want +got:\n%s", test.value, diff)
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	const last = "Wildcard must be last rule, if present"
	bad := func(s string) string { return "Bad destination '" + s + "'" }
	for name, test := range map[string]struct {
		value    string
		line     int
		sentence string
		hint     string // part of it
	}{
		"behind the wildcard":           {"*\nexample.com", 2, last, "move it to the end"},
		"nonsense behind the wildcard":  {"*\n\na b", 3, last, ""},
		"the first fault counts":        {"a b\n*\nx", 1, bad("a b"), "write one rule per line"},
		"a denied wildcard":             {"!*", 1, bad("*"), "remove"},
		"denied twice":                  {"!!x", 1, bad("!x"), "expected IP, IP/LENGTH"},
		"a blank behind the mark":       {"! x", 1, bad(" x"), ""},
		"no such number":                {"1.2.3.256", 1, bad("1.2.3.256"), "0 to 255"},
		"leading zeros":                 {"01.2.3.4", 1, bad("01.2.3.4"), "leading zeros"},
		"three numbers":                 {"!1.2.3", 1, bad("1.2.3"), "four numbers"},
		"one number":                    {"10", 1, bad("10"), "four numbers"},
		"a hexadecimal number":          {"0x7f000001", 1, bad("0x7f000001"), ""},
		"a name that ends in a number":  {"example.1", 1, bad("example.1"), ""},
		"too long a network":            {"10.0.0.0/33", 1, bad("10.0.0.0/33"), "0 to 32"},
		"too long an IPv6 network":      {"2001:db8::/129", 1, bad("2001:db8::/129"), "length"},
		"a netmask":                     {"10.0.0.0/255.0.0.0", 1, bad("10.0.0.0/255.0.0.0"), "length"},
		"a zone":                        {"fe80::1%eth0", 1, bad("fe80::1%eth0"), ""},
		"brackets":                      {"[::1]", 1, bad("[::1]"), ""},
		"a port":                        {"example.com:80", 1, bad("example.com:80"), "every port"},
		"a URL":                         {"http://example.com/", 1, bad("http://example.com/"), "no scheme"},
		"a dot in front":                {".example.com", 1, bad(".example.com"), "write *.example.com"},
		"a star inside":                 {"www.*.com", 1, bad("www.*.com"), "valid only alone"},
		"a star without a dot":          {"*example.com", 1, bad("*example.com"), "valid only alone"},
		"a star before an address":      {"*.1.2.3.4", 1, bad("*.1.2.3.4"), ""},
		"a carriage return":             {"example.com\r\n*", 1, bad("example.com\r"), "carriage return"},
		"a trailing comment":            {"example.com # web", 1, bad("example.com # web"), "on its own line"},
		"two on a line":                 {"a.com, b.com", 1, bad("a.com, b.com"), "one rule"},
		"an underscore":                 {"a_b.com", 1, bad("a_b.com"), ""},
		"other letters":                 {"bücher.example", 1, bad("bücher.example"), "xn--"},
		"an empty label":                {"a..b", 1, bad("a..b"), ""},
		"a hyphen in front":             {"-a.b", 1, bad("-a.b"), ""},
		"a label that is too long":      {strings.Repeat("a", 64) + ".b", 1, bad(strings.Repeat("a", 64) + ".b"), ""},
		"an exclamation mark":           {"!", 1, bad(""), ""},
		"the original's line, unquoted": {`a\\b`, 1, bad(`a\b`), ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse(test.value)
			got, ok := err.(*rules.ParseError)
			if !ok {
				t.Fatalf("Parse(%q): %v, want a *rules.ParseError", test.value, err)
			}
			if got.Sentence != test.sentence || got.Line.Number != test.line || !strings.Contains(got.Hint, test.hint) {
				t.Errorf("Parse(%q): %q at line %d, hint %q; want %q at line %d, hint with %q",
					test.value, got.Sentence, got.Line.Number, got.Hint, test.sentence, test.line, test.hint)
			}
		})
	}
}

func TestSquid(t *testing.T) {
	for name, test := range map[string]struct{ value, want string }{
		"the documentation's example": {"!*.Example.com\n!192.168.1.0/24\n# one\n192.168.2.1\n*", `
acl dest1 dstdomain .Example.com
http_access deny dest1

acl dest2 dst 192.168.1.0/24
http_access deny dest2

acl dest3 dst 192.168.2.1
http_access allow dest3

http_access allow all
`},
		"without a wildcard": {"intranet", "\nacl dest1 dstdomain intranet\nhttp_access allow dest1\n\nhttp_access deny all\n"},
		"nothing":            {"#", "\nhttp_access deny all\n"},
	} {
		t.Run(name, func(t *testing.T) {
			list, err := Parse(test.value)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, list.Squid()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// FuzzParse checks that a valid list can be written and parsed again and decides
// without a panic, and that an invalid one has a sentence and a hint.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"!*.example.com\n!192.168.1.0/24\n192.168.2.1\n*", "2001:db8::/32\n::ffff:1.2.3.4", "! x\\\n y", "*\n*\n#\r\n", "a..b", "1.2.3", "",
	} {
		f.Add(seed, "www.example.com", "192.168.1.1")
	}
	f.Fuzz(func(t *testing.T, value, host, addr string) {
		list, err := Parse(value)
		if err != nil {
			if e, ok := err.(*rules.ParseError); !ok || e.Sentence == "" || e.Hint == "" {
				t.Fatalf("Parse(%q): %#v", value, err)
			}
			return
		}
		var lines []string
		for i, r := range list {
			if r.Number != i+1 || r.Any && i != len(list)-1 {
				t.Errorf("Parse(%q): rule %d is %#v", value, i, r)
			}
			lines = append(lines, r.String())
		}
		again, err := Parse(strings.Join(lines, "\n") + "\n")
		if err != nil || !again.Equal(list) {
			t.Errorf("Parse(%q) = %v, and read again %v, %v", value, list, again, err)
		}
		h, ok := parseHost(host)
		a, err := netip.ParseAddr(addr)
		if !ok || err != nil {
			return
		}
		v := list.Decide(Destination{Host: h, Addr: a, Local: isLocal(a)})
		if v.Allow && (v.Rule.Number == 0 || v.Rule.Deny || isLocal(a) && !v.Rule.Network.IsValid()) {
			t.Errorf("%v allow %s at %s by %v", list, h, a, v.Rule)
		}
	})
}
