package rules

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseExtended(t *testing.T) {
	server := ip("203.0.113.9")
	for name, test := range map[string]struct {
		value string
		want  Set
	}{
		"the legacy grammar's example": {example, exampleSet},
		"several protocols":            {"53 tcp,udp 203.0.113.9", Set{Redirects: []Redirect{{Protocol: TCP, Port: 53, To: server}, {Protocol: UDP, Port: 53, To: server}}}},
		"sctp":                         {"3868 sctp 203.0.113.9 3869", Set{Redirects: []Redirect{{Protocol: SCTP, Port: 3868, To: server, ToPort: 3869}}}},
		"once for each protocol":       {"53 tcp 203.0.113.9\n53 udp 203.0.113.9 54", Set{Redirects: []Redirect{{Protocol: TCP, Port: 53, To: server}, {Protocol: UDP, Port: 53, To: server, ToPort: 54}}}},
		"a range":                      {"30000-30100 udp 203.0.113.9", Set{Redirects: []Redirect{{Protocol: UDP, Port: 30000, Last: 30100, To: server}}}},
		"a shifted range":              {"30000-30100 udp 203.0.113.9 40000-40100", Set{Redirects: []Redirect{{Protocol: UDP, Port: 30000, Last: 30100, To: server, ToPort: 40000, Shifts: true}}}},
		"a range to itself":            {"30000-30100 udp 203.0.113.9 30000-30100", Set{Redirects: []Redirect{{Protocol: UDP, Port: 30000, Last: 30100, To: server}}}},
		"a range to one port":          {"30000-30100 tcp 203.0.113.9 443", Set{Redirects: []Redirect{{Protocol: TCP, Port: 30000, Last: 30100, To: server, ToPort: 443}}}},
		"a range of one port":          {"80-80 tcp 203.0.113.9 90-90", Set{Redirects: []Redirect{{Protocol: TCP, Port: 80, To: server, ToPort: 90}}}},
		"all ports":                    {"1-65535 tcp 203.0.113.9", Set{Redirects: []Redirect{{Protocol: TCP, Port: 1, Last: 65535, To: server}}}},
		"several addresses of both families": {"443 tcp,udp 203.0.113.9,2001:db8::9,203.0.113.8", Set{Redirects: []Redirect{
			Redirect{Protocol: TCP, Port: 443}.Spread([]netip.Addr{server, ip("203.0.113.8")}), {Protocol: TCP, Port: 443, To: ip("2001:db8::9")},
			Redirect{Protocol: UDP, Port: 443}.Spread([]netip.Addr{server, ip("203.0.113.8")}), {Protocol: UDP, Port: 443, To: ip("2001:db8::9")},
		}}},
		"a name": {"443 tcp,udp DB.example.com 5432 # db", Set{Redirects: []Redirect{
			Redirect{Protocol: TCP, Port: 443, ToPort: 5432}.named("db.example.com"), Redirect{Protocol: UDP, Port: 443, ToPort: 5432}.named("db.example.com"),
		}}},
		"several addresses": {"443 tcp,udp 203.0.113.9,203.0.113.8 8443", Set{Redirects: []Redirect{
			Redirect{Protocol: TCP, Port: 443, ToPort: 8443}.Spread([]netip.Addr{server, ip("203.0.113.8")}),
			Redirect{Protocol: UDP, Port: 443, ToPort: 8443}.Spread([]netip.Addr{server, ip("203.0.113.8")}),
		}}},
		"IPv6":                       {"443 tcp 2001:db8::25\n5353 udp 2001:DB8:0::9 53", Set{Redirects: []Redirect{{Protocol: TCP, Port: 443, To: ip("2001:db8::25")}, {Protocol: UDP, Port: 5353, To: ip("2001:db8::9"), ToPort: 53}}}},
		"once for each family":       {"443 tcp 203.0.113.9\n443 tcp 2001:db8::25", Set{Redirects: []Redirect{{Protocol: TCP, Port: 443, To: server}, {Protocol: TCP, Port: 443, To: ip("2001:db8::25")}}}},
		"a fallback for each family": {"443 tcp 2001:db8::25\n2001:db8::27\n203.0.113.9", Set{Redirects: []Redirect{{Protocol: TCP, Port: 443, To: ip("2001:db8::25")}}, Fallback: server, Fallback6: ip("2001:db8::27")}},
		"a fallback of IPv6":         {"443 tcp 203.0.113.9\n2001:db8::27", Set{Redirects: []Redirect{{Protocol: TCP, Port: 443, To: server}}, Fallback6: ip("2001:db8::27")}},
		"several addresses of IPv6":  {"443 tcp 2001:db8::25,2001:db8::26 8443", Set{Redirects: []Redirect{(Redirect{Protocol: TCP, Port: 443, ToPort: 8443}).Spread([]netip.Addr{ip("2001:db8::25"), ip("2001:db8::26")})}}},
		"comments":                   {"80 tcp 203.0.113.9 # web, #1\n203.0.113.9 #\n# rest", Set{Redirects: []Redirect{{Protocol: TCP, Port: 80, To: server}}, Fallback: server}},
		"limits": {"443 tcp 203.0.113.9 8443 limit=100/s burst=200 max=500\n80-90 tcp 203.0.113.9 max=1 # small\n53 tcp,udp 203.0.113.9 limit=90/m", Set{Redirects: []Redirect{
			{Protocol: TCP, Port: 443, To: server, ToPort: 8443, Limits: NewLimited(Limit{PerMinute: 6000, Burst: 200, Max: 500})},
			{Protocol: TCP, Port: 80, Last: 90, To: server, Limits: NewLimited(Limit{Max: 1})},
			{Protocol: TCP, Port: 53, To: server, Limits: NewLimited(Limit{PerMinute: 90, Burst: 2})}, {Protocol: UDP, Port: 53, To: server, Limits: NewLimited(Limit{PerMinute: 90, Burst: 2})},
		}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Extended.Parse(test.value, variables{})
			if err != nil {
				t.Fatalf("%q: %v", test.value, err)
			}
			if diff := cmp.Diff(test.want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("%q, - want, + got:\n%s", test.value, diff)
			}
			if entries := Extended.Entries(test.value); len(entries) < len(got.Redirects) {
				t.Errorf("%d entries for %d redirects", len(entries), len(got.Redirects))
			}
		})
	}
}

func TestParseExtendedError(t *testing.T) {
	for name, test := range map[string]struct {
		value          string
		line           int
		sentence, hint string
	}{
		"overlap":                   {"80-90 tcp 10.4.5.6\n85 udp 10.4.5.6\n90-95 tcp 10.4.5.6", 3, "localport 90 is already used for tcp", "line 1 uses it first"},
		"overlap in a list":         {"53 udp 10.4.5.6\n53 tcp,udp 10.4.5.6", 2, "localport 53 is already used for udp", "line 1"},
		"a protocol twice":          {"53 udp,udp 10.4.5.6", 1, "value '53 udp,udp 10.4.5.6' is invalid", `the protocol "udp" stands twice`},
		"an unknown protocol":       {"53 icmp 10.4.5.6", 1, "is invalid", `"icmp" is not a protocol`},
		"no protocol in a list":     {"53 tcp, 10.4.5.6", 1, "is invalid", "protocols are separated by commas without spaces"},
		"upper case":                {"53 TCP,udp 10.4.5.6", 1, "is invalid", "lower case"},
		"spaces around a hyphen":    {"80 - 90 tcp 10.4.5.6", 1, "is invalid", "\"8080-8089 tcp,udp 203.0.113.26 80-89\""},
		"several ports":             {"80,443 tcp 10.4.5.6", 1, "is invalid", "a line for each"},
		"ranges of other lengths":   {"80-90 tcp 10.4.5.6 180-191", 1, "is invalid", "the ranges have 11 and 12 ports"},
		"one port to a range":       {"80 tcp 10.4.5.6 80-90", 1, "is invalid", "the ranges have 1 and 11 ports"},
		"a range that ends before":  {"90-80 tcp 10.4.5.6", 1, "is invalid", "the range 90-80 ends before it begins"},
		"port zero":                 {"0-80 tcp 10.4.5.6", 1, "Invalid port: 0, must be in the range 1 to 65535", ""},
		"port too high":             {"80-65536 tcp 10.4.5.6", 1, "Invalid port: 65536", ""},
		"no range":                  {"80- tcp 10.4.5.6", 1, "is invalid", `"80-" is no port and no range of ports`},
		"a comment without space":   {"80 tcp 10.4.5.6# web", 1, "is invalid", "a comment needs a space in front of #"},
		"behind the fallback":       {"10.4.5.6 # all\n80 tcp 10.4.5.6", 2, "fallback IP must be the last line", "move it to the end"},
		"an unknown option":         {"80 tcp 10.4.5.6 180 color=red", 1, "value '80 tcp 10.4.5.6 180 color=red' is invalid", `"color" is not an option`},
		"an option before the end":  {"80 tcp color=red 10.4.5.6", 1, "is invalid", `the option "color=red" has to stand at the end`},
		"an option of the fallback": {"10.4.5.6 color=red", 1, "is invalid", "the fallback has no options"},
		"a limit without unit":      {"80 tcp 10.4.5.6 limit=100", 1, "is invalid", "limit=100: expected new connections a second or a minute, such as limit=100/s"},
		"a limit of nothing":        {"80 tcp 10.4.5.6 limit=0/s", 1, "is invalid", "limit=0/s: expected"},
		"a limit without number":    {"80 tcp 10.4.5.6 limit=/s", 1, "is invalid", "limit=/s: expected"},
		"a limit too high":          {"80 tcp 10.4.5.6 limit=1000001/s", 1, "is invalid", "up to 1000000"},
		"a maximum of nothing":      {"80 tcp 10.4.5.6 max=0", 1, "is invalid", "max=0: expected a number of connections from 1 to 1000000"},
		"a negative maximum":        {"80 tcp 10.4.5.6 max=-5", 1, "is invalid", "max=-5: expected"},
		"a leading zero":            {"80 tcp 10.4.5.6 max=010", 1, "is invalid", "max=010: expected"},
		"no maximum":                {"80 tcp 10.4.5.6 max=", 1, "is invalid", "max=: expected"},
		"a burst alone":             {"80 tcp 10.4.5.6 burst=5 max=7", 1, "is invalid", "burst needs limit"},
		"an option twice":           {"80 tcp 10.4.5.6 max=5 max=7", 1, "is invalid", `the option "max" stands twice`},
		"only an option":            {"color=red", 1, "is invalid", "a line is"},
		"a name with an option":     {"80 tcp db.example.com color=red", 1, "is invalid", `"color" is not an option`},
		"IPv4-mapped":               {"80 tcp ::ffff:203.0.113.9", 1, "is invalid", "represents an IPv4 address: write 203.0.113.9"},
		"link-local":                {"80 tcp fe80::1", 1, "is invalid", "fe80::1 is an address of one link"},
		"link-local with a link":    {"fe80::1%eth0", 1, "is invalid", "is an address of one link"},
		"a zone":                    {"80 tcp 2001:db8::1%eth0 80", 1, "is invalid", "no interface behind it: write 2001:db8::1"},
		"brackets":                  {"80 tcp [2001:db8::1]", 1, "is invalid", "without brackets: 2001:db8::1"},
		"brackets and a port":       {"80 tcp [2001:db8::1]:90", 1, "is invalid", "the remote port is a field of its own: write \"2001:db8::1 90\""},
		"malformed IPv6":            {"80 tcp 2001:db8:::1", 1, "is invalid", "\"2001:db8:::1\" is not an IPv6 address"},
		"malformed among several":   {"80 tcp 10.4.5.6,2001:db8:::1", 1, "is invalid", "\"2001:db8:::1\" is not an IPv6 address"},
		"a network of IPv6":         {"80 tcp 2001:db8::/64", 1, "is invalid", "not a network"},
		"a name and a port":         {"80 tcp db.example.com:5432", 1, "is invalid", "the remote port is a field of its own: write \"db.example.com 5432\""},
		"link-local of several":     {"80 tcp 2001:db8::1,fe80::1", 1, "is invalid", "fe80::1 is an address of one link"},
		"twice in two forms":        {"80 tcp 2001:db8::1,10.4.5.6,2001:0db8::1", 1, "is invalid", "the address 2001:0db8::1 stands twice"},
		"a name in both families":   {"80 tcp db.example.com\n80 tcp 2001:db8::1", 2, "localport 80 is already used for tcp", "line 1 uses it first"},
		"twice in IPv6":             {"80 tcp 2001:db8::1\n80 tcp 10.4.5.6\n80 tcp 2001:db8::2", 3, "localport 80 is already used for tcp", "line 1 uses it first"},
		"two fallbacks of IPv6":     {"2001:db8::1\n10.4.5.6\n2001:db8::2", 3, "fallback IP must be the last line", "line 2"},
		"two fallbacks of IPv4":     {"10.4.5.6\n10.4.5.7", 2, "fallback IP must be the last line", "line 1"},
		"between the fallbacks":     {"10.4.5.6\n80 tcp 2001:db8::2\n2001:db8::1", 2, "fallback IP must be the last line", "line 1"},

		"a name and an address":    {"80 tcp db.example.com,10.4.5.6", 1, "is invalid", "a line has addresses, or one name alone"},
		"a name as fallback":       {"db.example.com", 1, "is invalid", "the fallback is an address, not a name"},
		"an invalid name":          {"80 tcp db_.-x", 1, "is invalid", `"db_.-x" is no name`},
		"a name of one label":      {"80 tcp db", 1, "is invalid", `"db" is no name`},
		"drain without a name":     {"80 tcp 10.4.5.6 drain=no", 1, "is invalid", "drain is for lines with a name"},
		"drain with another value": {"80 tcp db.example.com drain=0", 1, "is invalid", `drain is yes or no, not "0"`},
		"an address twice":         {"80 tcp 10.4.5.6,10.4.5.7,10.4.5.6 90", 1, "is invalid", "the address 10.4.5.6 stands twice"},
		"no address in a list":     {"80 tcp 10.4.5.6,,10.4.5.7", 1, "is invalid", "a comma has an address at each side"},
		"a comma at the end":       {"80 tcp 10.4.5.6,", 1, "is invalid", "a comma has an address at each side"},
		"spaces around a comma":    {"80 tcp 10.4.5.6, 10.4.5.7", 1, "is invalid", "addresses are separated by commas without spaces"},
		"several fallbacks":        {"10.4.5.6,10.4.5.7", 1, "is invalid", "the fallback is one address"},
		"a bad address of several": {"80 tcp 10.4.5.6,10.4.5.256", 1, "is invalid", `"10.4.5.256" is not an IPv4 address`},
		"too many addresses":       {"80 tcp " + strings.Trim(strings.Join(strings.Fields(fmt.Sprint(addresses(IPv4, 65))), ","), "[]"), 1, "is invalid", "a line has at most 64 addresses, this one has 65"},
	} {
		t.Run(name, func(t *testing.T) {
			set, err := Extended.Parse(test.value, variables{})
			e, ok := err.(*ParseError)
			if !ok {
				t.Fatalf("%q gives %v, %v; want a *ParseError", test.value, set, err)
			}
			if !strings.Contains(e.Error(), test.sentence) || e.Line.Number != test.line || !strings.Contains(e.Hint, test.hint) {
				t.Errorf("%q: line %d: %s\nhint: %s", test.value, e.Line.Number, e, e.Hint)
			}
		})
	}
}

// The entries of both fallbacks are in the order in which the set has them.
func TestEntriesOfFallbacks(t *testing.T) {
	entries := Extended.Entries("80 tcp,udp 2001:db8::25 # web\n2001:db8::27\n203.0.113.9")
	var numbers []int
	for _, e := range entries {
		numbers = append(numbers, e.Number)
	}
	if diff := cmp.Diff([]int{1, 1, 3, 2}, numbers); diff != "" {
		t.Errorf("lines of entries, - want, + got:\n%s", diff)
	}
}

// Each port of a range has its server, also by a Lookup.
func TestServer(t *testing.T) {
	set, err := ParseExtended("10-20 tcp 10.4.5.6\n30-40 tcp 10.4.5.6 130-140\n50-60 tcp 10.4.5.6 443\n70 tcp 10.4.5.6\n80 tcp 10.4.5.6 8080\n10-20 udp 10.4.5.6 9-19", nil)
	if err != nil {
		t.Fatal(err)
	}
	lookup := NewLookup(set.Redirects)
	found := 0
	for p := range map[Protocol]bool{TCP: true, UDP: true, SCTP: true} {
		for local := Port(1); local < 100; local++ {
			want := map[bool]Port{
				p == TCP && (local >= 10 && local <= 20 || local == 70): local, p == TCP && local >= 30 && local <= 40: local + 100,
				p == TCP && local >= 50 && local <= 60: 443, p == TCP && local == 80: 8080, p == UDP && local >= 10 && local <= 20: local - 1,
			}[true]
			i, ok := lookup.Find(IPv4, p, local)
			if ok != (want != 0) || ok && Port(set.Redirects[i].Server(local).Port()) != want {
				t.Errorf("%s %d: found %v, want port %d", p, local, ok, want)
			}
			if !ok {
				continue
			}
			found++
			first, last, there := set.Redirects[i].portsTo(want)
			if !there || local < first || local > max(first, last) {
				t.Errorf("%s %d: the ports to %d are %d to %d, %v", p, local, want, first, last, there)
			}
		}
	}
	if found != 11*4+2 {
		t.Errorf("%d ports found", found)
	}
}

func FuzzParseExtended(f *testing.F) {
	for _, seed := range []string{
		example, "53 tcp,udp 1.2.3.4 # names", "1-65535 sctp 1.2.3.4 443", "30000-30100 udp 1.2.3.4 40000-40100\n1.2.3.4", "80-80 tcp 1.2.3.4 90-90", "5-3 tcp 1.2.3.4", "443 tcp,udp 2001:db8::25 8443\n2001:db8::27\n1.2.3.4", "80 tcp 2001:db8::1,2001:db8::2\n::ffff:1.2.3.4", "80 tcp,sctp 2001:db8::1,1.2.3.4", "443 tcp,udp 1.2.3.4,1.2.3.5 8443", "1-9 sctp 1.2.3.4,1.2.3.4", "443 tcp,udp DB.example.com 8443 drain=no", "1-9 tcp a.b. 11-19 drain=yes", `80 tcp 1.2.3.4\ # x`, "80 tcp 1.2.3.4 90 x=y", "80 tcp,udp 1.2.3.4 limit=100/s burst=7 max=9", "80-90 sctp db.example.com drain=no max=9\n91 tcp 2001:db8::1 limit=7/m",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		set, err := ParseExtended(value, variables{})
		legacy, legacyErr := Parse(value, variables{})
		if legacyErr == nil && (err != nil || !set.Equal(legacy)) {
			t.Errorf("%q is %v in the legacy grammar and %v, %v in the extended one", value, legacy, set, err)
		}
		if err != nil {
			if e := err.(*ParseError); e.Line.Number < 1 || e.Line.Number > strings.Count(value, "\n")+1 {
				t.Errorf("error in line %d of %q", e.Line.Number, value)
			}
			return
		}
		if again, err := ParseExtended(set.String(), nil); err != nil || !set.Equal(again) {
			t.Errorf("%q gives %v, which reads back as %v, %v", value, set, again, err)
		}
	})
}
