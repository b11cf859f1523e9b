package tcpproxy

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/rules"
)

func TestParse(t *testing.T) {
	long := strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("a", 61)
	for name, test := range map[string]struct {
		value string
		want  []Destination
	}{
		"the documentation's example": {
			"80   203.0.113.25\n100  example.com\n8080 203.0.113.26 80\n8443 foobar.example.com 443",
			[]Destination{{80, "203.0.113.25", 80}, {100, "example.com", 100}, {8080, "203.0.113.26", 80}, {8443, "foobar.example.com", 443}},
		},
		"comments and blanks":  {"# web\n\n \t \n\r\n80 example.com\n  # end", []Destination{{80, "example.com", 80}}},
		"nothing":              {"#", nil},
		"blanks at both ends":  {" \t80 example.com \t", []Destination{{80, "example.com", 80}}},
		"joined lines":         {"80 \\\nexample.com", []Destination{{80, "example.com", 80}}},
		"the same port as to":  {"80 example.com 80", []Destination{{80, "example.com", 80}}},
		"any port":             {"1 a.b 65535\n65535 a.b 1", []Destination{{1, "a.b", 65535}, {65535, "a.b", 1}}},
		"odd names":            {"1 _x.my_host.a-b.C1\n2 xn--bcher-kva.example.\n3 1and1.com\n4 3com.com", []Destination{{1, "_x.my_host.a-b.C1", 1}, {2, "xn--bcher-kva.example.", 2}, {3, "1and1.com", 3}, {4, "3com.com", 4}}},
		"a name, no address":   {"80 cafe.de", []Destination{{80, "cafe.de", 80}}},
		"the longest name":     {"80 " + long, []Destination{{80, long, 80}}},
		"continued to nothing": {"80 a.b\n81 a.b\\", []Destination{{80, "a.b", 80}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse(test.value)
			if diff := cmp.Diff(test.want, got); diff != "" || err != nil {
				t.Errorf("error %v, -want +got:\n%s", err, diff)
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	bad := func(line string) string { return "Bad destination '" + line + "'" }
	port := func(p string) string { return "Invalid port: " + p + ", must be in the range 1 to 65535" }
	for name, test := range map[string]struct {
		value string
		line  int
		want  string
		hint  string
	}{
		"one field":            {"80", 1, bad("80"), forms},
		"a host alone":         {"example.com", 1, bad("example.com"), `write "443 example.com"`},
		"a tab":                {"80\texample.com", 1, bad("80\texample.com"), "a tab"},
		"a carriage return":    {"80 example.com\r\n", 1, bad("80 example.com\r"), `\r`},
		"a comment behind":     {"# a\n80 example.com # b", 2, bad("80 example.com # b"), "a comment"},
		"four fields":          {"80 a.b 81 a.b", 1, bad("80 a.b 81 a.b"), "several destinations"},
		"the router's grammar": {"80 tcp 203.0.113.25", 1, bad("80 tcp 203.0.113.25"), "no protocol"},
		"no port":              {"http example.com", 1, bad("http example.com"), `"http" is not a port`},
		"no remote port":       {"80 example.com http", 1, bad("80 example.com http"), `"http" is not a port`},
		"a negative port":      {"-1 example.com", 1, bad("-1 example.com"), "is not a port"},
		"no dot":               {"80 intranet", 1, bad("80 intranet"), "has no dot"},
		"a dot at the end":     {"80 intranet.", 1, bad("80 intranet."), "has no dot"},
		"octets":               {"80 1.2.3.256", 1, bad("80 1.2.3.256"), "four numbers"},
		"leading zeros":        {"80 01.2.3.4", 1, bad("80 01.2.3.4"), "four numbers"},
		"a number at the end":  {"80 a.b.1", 1, bad("80 a.b.1"), "is not a domain name"},
		"IPv6":                 {"80 2001:db8::1", 1, bad("80 2001:db8::1"), "IPv6"},
		"a colon":              {"80 example.com:8080", 1, bad("80 example.com:8080"), `"80 example.com 8080"`},
		"a URL":                {"80 http://example.com/", 1, bad("80 http://example.com/"), "no scheme"},
		"a network":            {"80 192.0.2.0/24", 1, bad("80 192.0.2.0/24"), "no prefix length"},
		"a wildcard":           {"80 *.example.com", 1, bad("80 *.example.com"), "is not a domain name"},
		"an empty label":       {"80 a..b", 1, bad("80 a..b"), "is not a domain name"},
		"a hyphen in front":    {"80 -a.b", 1, bad("80 -a.b"), "is not a domain name"},
		"a long label":         {"80 " + strings.Repeat("a", 64) + ".b", 1, bad("80 " + strings.Repeat("a", 64) + ".b"), "1 to 63"},
		"other letters":        {"80 bücher.example", 1, bad("80 bücher.example"), "xn--"},
		"a protected blank":    {`\ 80 a.b`, 1, bad(" 80 a.b"), forms},
		"port 0":               {"0 a.b", 1, port("0"), ""},
		"port 65536":           {"80 a.b\n65536 a.b", 2, port("65536"), ""},
		"the local port first": {"0 a.b 65536", 1, port("0"), ""},
		"the remote port":      {"1 a.b 65536", 1, port("65536"), ""},
		"a huge port":          {"18446744073709551617 a.b", 1, port("18446744073709551617"), ""},
		"an octal port":        {"080 a.b", 1, port("080"), "leading zeros"},
		"used twice":           {"80 a.b\n#\n80 c.d", 3, "Proxy port 80 already used, must be unique for each destination", "line 1"},
	} {
		t.Run(name, func(t *testing.T) {
			list, err := Parse(test.value)
			parse, ok := errors.AsType[*rules.ParseError](err)
			if !ok || list != nil {
				t.Fatalf("%v, %v; want a ParseError", list, err)
			}
			if parse.Error() != test.want || parse.Line.Number != test.line || !strings.Contains(parse.Hint, test.hint) {
				t.Errorf("line %d: %s, hint %q; want line %d: %s, hint %q", parse.Line.Number, parse, parse.Hint, test.line, test.want, test.hint)
			}
		})
	}
}

// FuzzParse checks that a valid list can be written and parsed again, and that the error
// of an invalid one is a sentence of the contract.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"80 203.0.113.25", "100 example.com", "8443 foobar.example.com 443", "# a\n\n 80 \\\n a.b", "80 1.2.3.256",
		"0 a.b", "80 a.b\n80 a.b", "80 a.b c", "80\ta.b", `\ 80 a.b`, "80 ü.b", "80 a.b\x00", "80 tcp 1.2.3.4", "80 [::1]:80",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		list, err := Parse(value)
		if err != nil {
			parse, ok := errors.AsType[*rules.ParseError](err)
			if !ok || list != nil {
				t.Fatalf("%v, %v", list, err)
			}
			for _, begin := range []string{"Bad destination '" + parse.Line.Text + "'", "Invalid port: ", "Proxy port ", "Must specify "} {
				if strings.HasPrefix(parse.Sentence, begin) {
					return
				}
			}
			t.Fatalf("another sentence: %s", parse.Sentence)
		}
		var b strings.Builder
		for _, d := range list {
			b.WriteString(d.String() + "\n")
		}
		b.WriteString("# the end\n")
		again, err := Parse(b.String())
		if diff := cmp.Diff(list, again); diff != "" || err != nil {
			t.Errorf("%q is read as %v, %v:\n%s", b.String(), again, err, diff)
		}
	})
}

func TestUnitTest(t *testing.T) {
	got := string(UnitTest([]Destination{{80, "203.0.113.25", 80}, {8443, "foobar.example.com", 443}}))
	if want := "listen *:80 dial 203.0.113.25:80\nlisten *:8443 dial foobar.example.com:443\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}
