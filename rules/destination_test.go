package rules

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/wording"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// example is the destination list of the original's documentation.
const example = `80   tcp 203.0.113.25
8080 tcp 203.0.113.26 80
8443 tcp 203.0.113.26 443
203.0.113.27
`

var exampleSet = Set{
	Redirects: []Redirect{
		{Protocol: TCP, Port: 80, To: ip("203.0.113.25")},
		{Protocol: TCP, Port: 8080, To: ip("203.0.113.26"), ToPort: 80},
		{Protocol: TCP, Port: 8443, To: ip("203.0.113.26"), ToPort: 443},
	},
	Fallback: ip("203.0.113.27"),
}

func TestParse(t *testing.T) {
	one := Set{Redirects: []Redirect{{Protocol: UDP, Port: 53, To: ip("10.4.5.6")}}}
	for name, test := range map[string]struct {
		value string
		want  Set
	}{
		"the documentation's example":      {example, exampleSet},
		"without a final newline":          {strings.TrimSpace(example), exampleSet},
		"only a fallback":                  {"10.1.2.3", Set{Fallback: ip("10.1.2.3")}},
		"comments and blank lines":         {"\n# a\n  # b\n \t\n\r\n\v\f\n53 udp 10.4.5.6\n#", one},
		"many spaces":                      {"  53     udp   10.4.5.6\t ", one},
		"comments behind the fallback":     {"10.1.2.3\n\n# nothing else\n", Set{Fallback: ip("10.1.2.3")}},
		"nothing but comments":             {"# 80 tcp 10.4.5.6", Set{}},
		"a continued line":                 {"53 udp \\\n10.4.5.6", one},
		"a remote port that is the same":   {"53 udp 10.4.5.6 53", Set{Redirects: []Redirect{{Protocol: UDP, Port: 53, To: ip("10.4.5.6"), ToPort: 53}}}},
		"the highest port":                 {"65535 tcp 10.4.5.6 65535", Set{Redirects: []Redirect{{Protocol: TCP, Port: 65535, To: ip("10.4.5.6"), ToPort: 65535}}}},
		"protected blanks at the end":      {`53 udp 10.4.5.6\ `, one},
		"a last line that is never read":   {"53 udp 10.4.5.6\n54 udp 10.4.5.6\\", one},
		"a protected number sign comments": {`\# 80`, Set{}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse(test.value, variables{})
			if err != nil {
				t.Fatalf("Parse(%q): %v", test.value, err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("Parse(%q), - want, + got:\n%s", test.value, diff)
			}
		})
	}
}

// variables are the names of a front end that is configured by the original's variables.
type variables struct{}

func (variables) Name(f wording.Field) string {
	return "EGRESS_" + strings.TrimSuffix(strings.ToUpper(string(f)), "S")
}
func (variables) Set(f wording.Field, value string) string { return string(f) + "=" + value }

func TestParseErrors(t *testing.T) {
	invalid := func(line string) string { return "EGRESS_DESTINATION value '" + line + "' is invalid" }
	port := func(p string) string { return "Invalid port: " + p + ", must be in the range 1 to 65535" }
	const last = "EGRESS_DESTINATION fallback IP must be the last line"
	used := func(p int) string {
		return fmt.Sprintf("EGRESS_DESTINATION localport %d is already used, must be unique for each destination", p)
	}
	for name, test := range map[string]struct {
		value    string
		line     int
		sentence string
		hint     string // part of it
	}{
		"not an address":             {"not an IP address", 1, invalid("not an IP address"), "is not a port"},
		"a line that is cut":         {"  x y  ", 1, invalid("x y"), "a line is"},
		"behind the fallback":        {"10.1.2.3\n\n80 tcp 10.4.5.6", 3, last, `line 1 ("10.1.2.3") is the fallback`},
		"two fallbacks":              {"10.1.2.3\n10.4.5.6", 2, last, ""},
		"nonsense behind it":         {"10.1.2.3\nx", 2, last, ""},
		"the first fault counts":     {"80 tcp 10.4.5.6\ninvalid\n80 tcp 10.4.5.6", 2, invalid("invalid"), ""},
		"sctp":                       {"80 sctp 10.4.5.6", 1, invalid("80 sctp 10.4.5.6"), `"sctp" is not a protocol`},
		"upper case":                 {"80 TCP 10.4.5.6", 1, invalid("80 TCP 10.4.5.6"), `lower case: "tcp"`},
		"a tab":                      {"80\ttcp 10.4.5.6", 1, invalid("80\ttcp 10.4.5.6"), "a tab"},
		"a control character":        {"80 tcp 10.4.5.6\x1b[0m", 1, invalid("80 tcp 10.4.5.6\x1b[0m"), "control character U+001B"},
		"a long word":                {strings.Repeat("x", 1000), 1, invalid(strings.Repeat("x", 1000)), `"` + strings.Repeat("x", 60) + `..." is a name`},
		"a carriage return":          {"80 tcp 10.4.5.6\r\n", 1, invalid("80 tcp 10.4.5.6\r"), "carriage return"},
		"a no-break space":           {"80\u00a0tcp 10.4.5.6", 1, invalid("80\u00a0tcp 10.4.5.6"), "U+00A0"},
		"a byte order mark":          {"\ufeff80 tcp 10.4.5.6", 1, invalid("\ufeff80 tcp 10.4.5.6"), "U+FEFF"},
		"a trailing comment":         {"80 tcp 10.4.5.6 # web", 1, invalid("80 tcp 10.4.5.6 # web"), "as its first character; grammar=extended accepts this line"},
		"no address":                 {"80 tcp", 1, invalid("80 tcp"), `the address is missing: write "80 tcp IP"`},
		"no protocol":                {"80 10.4.5.6", 1, invalid("80 10.4.5.6"), `"80 tcp 10.4.5.6"`},
		"IPv6":                       {"80 tcp 2001:db8::1", 1, invalid("80 tcp 2001:db8::1"), "IPv6"},
		"IPv6 with a port":           {"[2001:db8::1]:80", 1, invalid("[2001:db8::1]:80"), "IPv6"},
		"a host name":                {"80 tcp www.example.com", 1, invalid("80 tcp www.example.com"), "is a name"},
		"a name as fallback":         {"www.example.com", 1, invalid("www.example.com"), "(mode=dns-proxy serves names)"},
		"a network":                  {"10.4.5.0/24", 1, invalid("10.4.5.0/24"), "not a network"},
		"address:port":               {"80 tcp 10.4.5.6:80", 1, invalid("80 tcp 10.4.5.6:80"), "a field of its own"},
		"octet out of range":         {"80 tcp 1.2.3.256", 1, invalid("80 tcp 1.2.3.256"), "0 to 255"},
		"octet with a leading zero":  {"01.2.3.4", 1, invalid("01.2.3.4"), "leading zeros"},
		"three octets":               {"1.2.3", 1, invalid("1.2.3"), "four numbers"},
		"a range of ports":           {"80-90 tcp 10.4.5.6", 1, invalid("80-90 tcp 10.4.5.6"), "one number from 1 to 65535; grammar=extended accepts this line"},
		"a remote range":             {"80 tcp 10.4.5.6 80-90", 1, invalid("80 tcp 10.4.5.6 80-90"), "one number"},
		"folded by YAML":             {"80 tcp 10.4.5.6 81 tcp 10.4.5.7", 1, invalid("80 tcp 10.4.5.6 81 tcp 10.4.5.7"), "YAML"},
		"several protocols":          {"53 tcp,udp 10.4.5.6", 1, invalid("53 tcp,udp 10.4.5.6"), `a line has one protocol: "tcp" or "udp"; grammar=extended accepts this line`},
		"commas":                     {"80,81 tcp 10.4.5.6", 1, invalid("80,81 tcp 10.4.5.6"), "separated by spaces"},
		"a protected space in front": {`\ 10.4.5.6`, 1, invalid(" 10.4.5.6"), ""},
		"port zero":                  {"0 tcp 10.4.5.6", 1, port("0"), ""},
		"port too high":              {"\n65536 udp 10.4.5.6", 2, port("65536"), ""},
		"port beyond 64 bits":        {"18446744073709551617 udp 10.4.5.6", 1, port("18446744073709551617"), ""},
		"port with a leading zero":   {"080 tcp 10.4.5.6", 1, port("080"), "octal"},
		"remote port zero":           {"80 tcp 10.4.5.6 0", 1, port("0"), ""},
		"remote port first":          {"70000 tcp 10.4.5.6 70001", 1, port("70001"), ""},
		"the port before its use":    {"80 tcp 10.4.5.6\n80 tcp 10.4.5.6 0", 2, port("0"), ""},
		"a port twice":               {"80 tcp 10.4.5.6\n81 tcp 10.4.5.6\n80 tcp 10.7.8.9 900", 3, used(80), "line 1 uses it first"},
		"a port twice, by protocol":  {"53 tcp 10.4.5.6\n53 udp 10.4.5.6", 2, used(53), "whatever the protocol; grammar=extended accepts this list"},
	} {
		t.Run(name, func(t *testing.T) {
			set, err := Parse(test.value, variables{})
			e, ok := err.(*ParseError)
			if !ok {
				t.Fatalf("Parse(%q) = %v, %v; want a *ParseError", test.value, set, err)
			}
			if e.Error() != test.sentence || e.Line.Number != test.line {
				t.Errorf("Parse(%q):\n got line %d: %s\nwant line %d: %s", test.value, e.Line.Number, e, test.line, test.sentence)
			}
			if !strings.Contains(e.Hint, test.hint) {
				t.Errorf("Parse(%q): hint %q lacks %q", test.value, e.Hint, test.hint)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		example,                                // the documentation's
		"80 tcp 1.2.3.4\\",                     // never read
		"80 \\\ntcp 1.2.3.4",                   // joined
		`80 tcp 1.2.3.4\ `,                     // protected blank
		"80 tcp 1.2.3.4 # no",                  // trailing comment
		"080 tcp 1.2.3.4",                      // leading zero
		"80 tcp 01.2.3.4\n1.2.3.4\n1.2.3.5",    // octal address
		"1.2.3.4\n\x00\xff\n",                  // not text
		"80 tcp 1.2.3.4\n80 udp 1.2.3.4 65536", // used, out of range
	} {
		f.Add(seed)
	}
	sides := Sides{Cluster: "eth0", Egress: "macvlan0", Sources: []netip.Addr{ip("192.168.12.99")}}
	f.Fuzz(func(t *testing.T, value string) {
		set, err := Parse(value, variables{})
		Unread(value)
		if err != nil {
			e := err.(*ParseError)
			if e.Line.Number < 1 || e.Line.Number > strings.Count(value, "\n")+1 {
				t.Errorf("error in line %d of %q", e.Line.Number, value)
			}
			if !strings.HasPrefix(e.Sentence, "EGRESS_DESTINATION ") && !strings.HasPrefix(e.Sentence, "Invalid port: ") {
				t.Errorf("not a sentence of the original: %q", e.Sentence)
			}
			return
		}
		wantSameExtended(t, value, set)
		again, err := Parse(set.String(), nil)
		if err != nil || !set.Equal(again) {
			t.Errorf("%q gives %v, which reads back as %v, %v", value, set, again, err)
		}
		// Every accepted value becomes exactly one rule and one line.
		lines := strings.Count(string(UnitTest(set, sides)), "\n")
		want := len(set.Redirects) + 1
		if set.Fallback.IsValid() {
			want++
		}
		if lines != want {
			t.Errorf("%q gives %d rules, want %d", value, lines, want)
		}
	})
}

func FuzzLines(f *testing.F) {
	for _, seed := range []string{"a\\\nb", "\\", "\\\\", " \\ ", "a b\x01 ", "\n\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		before := 0
		for _, line := range Lines(value) {
			if line.Number <= before {
				t.Errorf("line %d of %q comes after line %d", line.Number, value, before)
			}
			before = line.Number
			if strings.Contains(line.Text, "\n") {
				t.Errorf("line %d of %q holds a newline: %q", line.Number, value, line.Text)
			}
		}
	})
}
