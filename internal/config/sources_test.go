package config

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// parseSources parses EGRESS_SOURCE and EGRESS_GATEWAY in the extended grammar.
func parseSources(source, gateway string) (sources, fault string) {
	env := good()
	env.Source, env.Gateway, env.Grammar, env.Destination = source, gateway, "extended", "# none"
	c, err := Parse(env, nil)
	if err != nil {
		return "", err.Error()
	}
	var all []string
	for _, s := range c.Sources {
		all = append(all, fmt.Sprintf("%s via %s", s.Prefix, s.Gateway))
	}
	return strings.Join(all, ", "), ""
}

func TestExtendedSources(t *testing.T) {
	for name, test := range map[string]struct{ source, gateway, want string }{
		"one":      {"192.168.12.99/24", "192.168.12.1", "192.168.12.99/24 via 192.168.12.1"},
		"two":      {"192.168.12.99/24,192.168.12.100/24", "192.168.12.1", "192.168.12.99/24 via 192.168.12.1, 192.168.12.100/24 via 192.168.12.1"},
		"families": {"2001:db8:12::99/64 , 192.168.12.99", " 192.168.12.1,fe80::1\n", "2001:db8:12::99/64 via fe80::1, 192.168.12.99/32 via 192.168.12.1"},
		"IPv6":     {"2001:db8:12::99", "2001:db8:12::1", "2001:db8:12::99/128 via 2001:db8:12::1"},
		"31 bits":  {"192.168.12.2/31, 2001:db8::2/127", "192.168.12.3, 2001:db8::3", "192.168.12.2/31 via 192.168.12.3, 2001:db8::2/127 via 2001:db8::3"},
	} {
		t.Run(name, func(t *testing.T) {
			got, fault := parseSources(test.source, test.gateway)
			if diff := cmp.Diff(test.want, got); diff != "" || fault != "" {
				t.Errorf("%s\n-want +got:\n%s", fault, diff)
			}
		})
	}
}

// Every fault has the sentence of its variable below the place and the advice.
func TestExtendedSourcesRefuse(t *testing.T) {
	many := make([]string, 0, 33)
	for i := range 33 {
		many = append(many, fmt.Sprintf("192.168.12.%d", 10+i))
	}
	const source, gateway, two = "EGRESS_SOURCE", "EGRESS_GATEWAY", "192.168.12.99/24, 2001:db8:12::99/64"
	for name, test := range map[string]struct{ source, gateway, variable, hint string }{
		"unset":                {"", "192.168.12.1", source, "EGRESS_SOURCE is not set"},
		"comma at the end":     {"192.168.12.99/24,", "192.168.12.1", source, "an address is missing beside a comma"},
		"spaces alone":         {"192.168.12.99/24 192.168.12.100/24", "192.168.12.1", source, "write commas between addresses"},
		"semicolons":           {"192.168.12.99/24;192.168.12.100/24", "192.168.12.1", source, "write commas between addresses"},
		"semicolon, no length": {"192.168.12.99;192.168.12.100", "192.168.12.1", source, "write commas between addresses"},
		"spaces, no length":    {"192.168.12.99 192.168.12.100", "192.168.12.1", source, "write commas between addresses"},
		"name":                 {"host", "192.168.12.1", source, `EGRESS_SOURCE contains "host": expected an IPv4 or IPv6 address`},
		"length":               {"2001:db8:12::99/129", "fe80::1", source, "a number from 0 to 128"},
		"twice":                {"192.168.12.99/24, 192.168.12.99/25", "192.168.12.1", source, `contains "192.168.12.99/25": it is there twice`},
		"mapped":               {"::ffff:192.168.12.99", "192.168.12.1", source, "write 192.168.12.99"},
		"zone":                 {"fe80::9%macvlan0", "fe80::1", source, "an address has no zone"},
		"multicast":            {"ff02::1", "fe80::1", source, "a multicast address cannot be the source"},
		"loopback":             {"::1", "fe80::1", source, "the loopback address cannot be the source"},
		"unspecified":          {"::", "fe80::1", source, "the unspecified address cannot be the source"},
		"link-local":           {"fe80::9/64", "fe80::1", source, "a link-local address cannot be the source"},
		"network":              {"192.168.12.0/24", "192.168.12.1", source, "the network address of 192.168.12.0/24"},
		"all routers":          {"2001:db8:12::/64", "fe80::1", source, "the address of all routers of 2001:db8:12::/64"},
		"too many":             {strings.Join(many, ","), "192.168.12.1", source, "more than 32 addresses of one family"},
		"gateway unset":        {two, "", gateway, "for each family of EGRESS_SOURCE"},
		"gateway missing":      {two, "192.168.12.1", gateway, "no IPv6 address for EGRESS_SOURCE 2001:db8:12::99: add the gateway"},
		"gateway of no source": {"192.168.12.99/24", "192.168.12.1, fe80::1", gateway, "contains fe80::1, and EGRESS_SOURCE no IPv6 address"},
		"two gateways":         {"192.168.12.99/24", "192.168.12.1, 192.168.12.2", gateway, "contains 192.168.12.1 and 192.168.12.2: a family has one gateway"},
		"gateway is source":    {two, "192.168.12.99, fe80::1", gateway, "it is the same as EGRESS_SOURCE"},
		"gateway length":       {two, "192.168.12.1/24, fe80::1", gateway, "a gateway is one address, without a length"},
		"gateway multicast":    {two, "192.168.12.1, ff02::2", gateway, "a multicast address cannot be a gateway"},
		"gateway zone":         {two, "192.168.12.1, fe80::1%eth1", gateway, "write fe80::1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, fault := parseSources(test.source, test.gateway)
			lines := strings.Split(fault, "\n")
			if last := lines[len(lines)-1]; last != test.variable+" unspecified or invalid" && lines[0] != test.variable+" unspecified or invalid" && !strings.Contains(fault, "\n"+test.variable+" unspecified or invalid") {
				t.Errorf("no sentence of %s: %q", test.variable, fault)
			}
			if !strings.Contains(fault, test.hint) {
				t.Errorf("got %q, want the hint %q", fault, test.hint)
			}
		})
	}
}

// The legacy grammar stays, and its errors say which values the extended one accepts.
func TestLegacySourcesHint(t *testing.T) {
	const hint = "EGRESS_GRAMMAR=extended accepts this value"
	for name, test := range map[string]struct {
		source, gateway string
		accepts         bool
	}{
		"several":              {"192.168.12.99/24, 192.168.12.100/24", "192.168.12.1", true},
		"IPv6":                 {"2001:db8:12::99/64", "fe80::1", true},
		"both":                 {"192.168.12.99/24,2001:db8:12::99/64", "192.168.12.1, fe80::1", true},
		"space":                {" 192.168.12.99/24", "192.168.12.1", true},
		"link-local":           {"fe80::9", "fe80::1", false},
		"gateway of no source": {"192.168.12.99/24", "192.168.12.1, fe80::1", false},
		"word":                 {"none", "192.168.12.1", false},
	} {
		t.Run(name, func(t *testing.T) {
			env := good()
			env.Source, env.Gateway = test.source, test.gateway
			_, err := Parse(env, nil)
			if err == nil {
				t.Fatal("accepted")
			}
			if got := strings.Contains(err.Error(), hint); got != test.accepts {
				t.Errorf("hint: %t, want %t: %q", got, test.accepts, err)
			}
		})
	}
}

// Name servers and networks of the cluster side may be IPv6 if there is an IPv6 source.
func TestClusterSideOfIPv6(t *testing.T) {
	env := good()
	env.Source, env.Gateway, env.Grammar = "192.168.12.99/24, 2001:db8:12::99/64", "192.168.12.1, fe80::1", "extended"
	env.ClusterCIDRs = "10.96.0.0/12, fd00:96::/108"
	c, err := Parse(env, nil)
	if err != nil {
		t.Fatal(err)
	}
	c.KeepNameServers([]byte("nameserver fd00:96::a\nnameserver fd00:97::a\nnameserver ::1\nnameserver fe80::53\nnameserver 2001:db8:12::53\nnameserver 10.96.0.10\n"))
	var got []string
	for _, p := range c.ClusterDestinations {
		got = append(got, p.String())
	}
	if diff := cmp.Diff([]string{"10.96.0.0/12", "fd00:96::/108", "fd00:96::a/128", "fd00:97::a/128", "10.96.0.10/32"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
