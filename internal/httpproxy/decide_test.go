package httpproxy

import "testing"

func TestDecide(t *testing.T) {
	named := func(name, addr string) Destination {
		return Destination{Host: Host{Name: name}, Addr: ip(addr), Local: isLocal(ip(addr))}
	}
	searched := func(name, addr string, full string) Destination {
		return Destination{Host: Host{Name: name}, Full: full, Addr: ip(addr)}
	}
	literal := func(addr string, names ...string) Destination {
		return Destination{Host: Host{Addr: ip(addr)}, Addr: ip(addr), Local: isLocal(ip(addr)), Names: func() []string { return names }}
	}
	for name, test := range map[string]struct {
		rules string
		to    Destination
		allow bool
		by    string // the rule
	}{
		"no rule":                                   {"#", named("a.example", "192.0.2.1"), false, ""},
		"a name":                                    {"a.example", named("a.example", "192.0.2.1"), true, "a.example"},
		"another name":                              {"a.example", named("b.example", "192.0.2.1"), false, ""},
		"a name in another case":                    {"A.Example", named("a.example", "192.0.2.1"), true, "A.Example"},
		"a name does not match its subdomains":      {"a.example", named("b.a.example", "192.0.2.1"), false, ""},
		"a domain itself":                           {"*.a.example", named("a.example", "192.0.2.1"), true, "*.a.example"},
		"a domain far below":                        {"*.a.example", named("c.b.a.example", "192.0.2.1"), true, "*.a.example"},
		"a domain is not what ends like it":         {"*.a.example", named("ba.example", "192.0.2.1"), false, ""},
		"an address":                                {"192.0.2.1", literal("192.0.2.1"), true, "192.0.2.1"},
		"an address by name":                        {"192.0.2.1", named("a.example", "192.0.2.1"), true, "192.0.2.1"},
		"a network":                                 {"192.0.2.0/24", named("a.example", "192.0.2.200"), true, "192.0.2.0/24"},
		"beside a network":                          {"192.0.2.0/24", named("a.example", "192.0.3.0"), false, ""},
		"an IPv6 network":                           {"2001:db8::/32", literal("2001:db8:1::1"), true, "2001:db8::/32"},
		"IPv4 networks hold no IPv6":                {"0.0.0.0/0", literal("2001:db8::1"), false, ""},
		"IPv4 in NAT64, denied":                     {"!10.0.0.0/8\n*", literal("64:ff9b::10.1.2.3"), false, "!10.0.0.0/8"},
		"IPv4 in NAT64, allowed":                    {"192.0.2.1", literal("64:ff9b::192.0.2.1"), true, "192.0.2.1"},
		"IPv4 in NAT64, by name":                    {"!10.0.0.0/8\n*", named("a.example", "64:ff9b::a01:203"), false, "!10.0.0.0/8"},
		"IPv4 in NAT64, by its IPv6 network":        {"!64:ff9b::/96\n192.0.2.1", literal("64:ff9b::192.0.2.1"), false, "!64:ff9b::/96"},
		"other IPv4 in NAT64":                       {"!10.0.0.0/8\n*", literal("64:ff9b::192.0.2.1"), true, "*"},
		"IPv4 in 6to4":                              {"!10.0.0.0/8\n*", literal("2002:a01:203::1"), false, "!10.0.0.0/8"},
		"IPv4-compatible":                           {"!10.0.0.0/8\n*", literal("::10.1.2.3"), false, "!10.0.0.0/8"},
		"IPv4-translated":                           {"!10.0.0.0/8\n*", literal("::ffff:0:10.1.2.3"), false, "!10.0.0.0/8"},
		"IPv4 in Teredo":                            {"!10.0.0.0/8\n*", literal("2001:0:c000:201::f5fe:fdfc"), false, "!10.0.0.0/8"},
		"IPv4 in local NAT64, 48 bits":              {"!10.0.0.0/8\n*", literal("64:ff9b:1:a01:2:300::"), false, "!10.0.0.0/8"},
		"IPv4 in local NAT64, 96 bits":              {"!10.0.0.0/8\n*", literal("64:ff9b:1::10.1.2.3"), false, "!10.0.0.0/8"},
		"other IPv4 in local NAT64":                 {"!10.0.0.0/8\n*", literal("64:ff9b:1::192.0.2.1"), true, "*"},
		"loopback in NAT64":                         {"*", Destination{Host: Host{Addr: ip("64:ff9b::127.0.0.1")}, Addr: ip("64:ff9b::127.0.0.1"), Local: true}, false, ""},
		"loopback in NAT64 that is named":           {"127.0.0.1", Destination{Host: Host{Addr: ip("64:ff9b::127.0.0.1")}, Addr: ip("64:ff9b::127.0.0.1"), Local: true}, true, "127.0.0.1"},
		"the first that matches: deny":              {"!a.example\n*.example\n*", named("a.example", "192.0.2.1"), false, "!a.example"},
		"the first that matches: allow":             {"*.example\n!a.example", named("a.example", "192.0.2.1"), true, "*.example"},
		"a denied network holds for names":          {"!10.0.0.0/8\n*", named("a.example", "10.1.2.3"), false, "!10.0.0.0/8"},
		"a name before a denied network":            {"a.example\n!10.0.0.0/8\n*", named("a.example", "10.1.2.3"), true, "a.example"},
		"the wildcard":                              {"!b.example\n*", named("a.example", "192.0.2.1"), true, "*"},
		"a name of an address":                      {"*.example", literal("192.0.2.1", "x", "A.Example."), true, "*.example"},
		"a denied name of an address":               {"!a.example\n*", literal("192.0.2.1", "a.example"), false, "!a.example"},
		"names do not count for a name":             {"b.example", Destination{Host: Host{Name: "a.example"}, Addr: ip("192.0.2.1"), Names: func() []string { return []string{"b.example"} }}, false, ""},
		"a name without an address":                 {"!10.0.0.0/8\n*", Destination{Host: Host{Name: "a.example"}}, true, "*"},
		"a full name that is denied":                {"!*.corp.test\n*", searched("api", "192.0.2.1", "api.corp.test"), false, "!*.corp.test"},
		"a full name that is denied later":          {"api\n!*.corp.test\n*", searched("api", "192.0.2.1", "api.corp.test"), true, "api"},
		"a full name that is allowed":               {"*.corp.test", searched("api", "192.0.2.1", "api.corp.test"), true, "*.corp.test"},
		"a full name that is allowed later":         {"!api\n*.corp.test", searched("api", "192.0.2.1", "api.corp.test"), false, "!api"},
		"a name with a dot, completed":              {"!*.cluster.local\n*", searched("api.ns", "192.0.2.1", "api.ns.svc.cluster.local"), false, "!*.cluster.local"},
		"an address by full name":                   {"!192.0.2.0/24\n*", searched("api", "192.0.2.1", "api.corp.test"), false, "!192.0.2.0/24"},
		"loopback by wildcard":                      {"*", literal("127.0.0.1"), false, ""},
		"loopback by name":                          {"a.example\n*", named("a.example", "127.0.0.1"), false, ""},
		"loopback by a rule that names it":          {"a.example\n127.0.0.1", named("a.example", "127.0.0.1"), true, "127.0.0.1"},
		"loopback by its network":                   {"127.0.0.0/8", literal("127.1.2.3"), true, "127.0.0.0/8"},
		"loopback by a network that also holds it":  {"0.0.0.0/0", literal("127.0.0.1"), false, ""},
		"loopback denied first":                     {"!a.example\n127.0.0.1", named("a.example", "127.0.0.1"), false, "!a.example"},
		"IPv6 loopback by wildcard":                 {"::/0\n*", literal("::1"), false, ""},
		"IPv6 loopback by a rule that names it":     {"::1", literal("::1"), true, "::1"},
		"link-local by wildcard":                    {"*", literal("169.254.169.254"), false, ""},
		"link-local by a rule that names it":        {"169.254.169.254", literal("169.254.169.254"), true, "169.254.169.254"},
		"link-local by its network":                 {"169.254.0.0/16", literal("169.254.1.1"), true, "169.254.0.0/16"},
		"link-local by a network that also has it":  {"169.0.0.0/8", literal("169.254.1.1"), false, ""},
		"IPv6 link-local by its network":            {"fe80::/10", literal("fe80::1"), true, "fe80::/10"},
		"the unspecified address":                   {"*", literal("0.0.0.0"), false, ""},
		"an own address by wildcard":                {"*", Destination{Host: Host{Addr: ip("10.1.1.1")}, Addr: ip("10.1.1.1"), Local: true}, false, ""},
		"an own address by its network":             {"10.0.0.0/8", Destination{Host: Host{Addr: ip("10.1.1.1")}, Addr: ip("10.1.1.1"), Local: true}, false, ""},
		"an own address by a rule that names it":    {"10.1.1.1", Destination{Host: Host{Addr: ip("10.1.1.1")}, Addr: ip("10.1.1.1"), Local: true}, true, "10.1.1.1"},
		"a local address and a later rule to allow": {"*.example\n!10.0.0.0/8\n127.0.0.1\n*", named("a.example", "127.0.0.1"), true, "127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			list, err := Parse(test.rules)
			if err != nil {
				t.Fatal(err)
			}
			got := list.Decide(test.to)
			if got.Allow != test.allow || got.Rule.String() != test.by {
				t.Errorf("%q: allow %t by %q, want %t by %q", test.rules, got.Allow, got.Rule, test.allow, test.by)
			}
			if got.Local && (got.Allow || !test.to.Local) {
				t.Errorf("%q: %+v", test.rules, got)
			}
		})
	}
}

func TestDecideName(t *testing.T) {
	for name, test := range map[string]struct {
		rules   string
		decided bool
		by      string
		full    []string // default: a.example alone
	}{
		"denied by name":               {"!*.example\n*", true, "!*.example", nil},
		"denied by no rule":            {"b.example", true, "", nil},
		"an allowed one has addresses": {"a.example", false, "a.example", nil},
		"as with the wildcard":         {"*", false, "*", nil},
		"an address comes first":       {"192.0.2.1\n!a.example", false, "", nil},
		"nothing but an address":       {"192.0.2.1", false, "", nil},
		"denied before an address":     {"!a.example\n192.0.2.1", true, "!a.example", nil},
		"no rule at all":               {"#", true, "", nil},
		"denied as each full name":     {"!*.cluster\n!a.example\n*", true, "!*.cluster", []string{"a.example.cluster", "a.example"}},
		"perhaps allowed":              {"!*.cluster\n*", false, "*", []string{"a.example.cluster", "a.example"}},
		"perhaps allowed by full name": {"*.cluster\n!a.example", false, "*.cluster", []string{"a.example", "a.example.cluster"}},
		"allowed by no full name":      {"b.cluster", true, "", []string{"a.example.cluster", "a.example"}},
	} {
		t.Run(name, func(t *testing.T) {
			list, err := Parse(test.rules)
			if err != nil {
				t.Fatal(err)
			}
			if test.full == nil {
				test.full = []string{"a.example"}
			}
			got, decided := list.DecideName("a.example", test.full)
			if decided != test.decided || got.Rule.String() != test.by || got.Allow {
				t.Errorf("%+v, decided %t; want %t by %q", got, decided, test.decided, test.by)
			}
		})
	}
}

func TestParseAuthority(t *testing.T) {
	for s, want := range map[string]target{
		"a.example:443":           {Host{Name: "a.example"}, 443},
		"A.Example.:443":          {Host{Name: "a.example", Absolute: true}, 443},
		"a.example":               {Host{Name: "a.example"}, 80},
		"a.example:":              {Host{Name: "a.example"}, 80},
		"a_b.example":             {Host{Name: "a_b.example"}, 80},
		"192.0.2.1:8080":          {Host{Addr: ip("192.0.2.1")}, 8080},
		"192.0.2.1.:8080":         {Host{Addr: ip("192.0.2.1")}, 8080},
		"[2001:db8::1]:65535":     {Host{Addr: ip("2001:db8::1")}, 65535},
		"[2001:db8::1]":           {Host{Addr: ip("2001:db8::1")}, 80},
		"[::ffff:127.0.0.1]:1":    {Host{Addr: ip("127.0.0.1")}, 1},
		"2001:db8::1":             {},
		"[192.0.2.1]":             {},
		"[fe80::1%25eth0]":        {},
		"[fe80::1%eth0]":          {},
		"[::1":                    {},
		"a.example:0":             {},
		"a.example:65536":         {},
		"a.example:http":          {},
		"a.example:+80":           {},
		"a.example:80:80":         {},
		"127.1:80":                {}, // inet_aton(3) has 127.0.0.1
		"0x7f000001:80":           {},
		"2130706433:80":           {},
		"0177.0.0.1:80":           {},
		"192.0.2.1..:80":          {},
		"a..example:80":           {},
		".:80":                    {},
		":80":                     {},
		"":                        {},
		"a.example/:80":           {},
		"user@a.example:80":       {},
		"a.example%00.b:80":       {},
		"b\u00fccher.example:443": {},
	} {
		got, err := parseAuthority(s, 80)
		if got != want || (err == nil) != (want.port != 0) {
			t.Errorf("parseAuthority(%q) = %v, %v; want %v", s, got, err, want)
		}
	}
	if got, err := parseAuthority("a.example", 0); err == nil {
		t.Errorf("without a default port: %v", got)
	}
}
