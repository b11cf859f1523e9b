package config

import (
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/egress-router/egress-router/internal/manual"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

func noFile(name string) ([]byte, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

// good is a valid environment.
func good() Environment {
	return Environment{Source: "192.168.12.99/24", Gateway: "192.168.12.1", Destination: "80 tcp 203.0.113.25"}
}

// sources returns one source with its gateway.
func sources(prefix, gateway string) spec.Sources {
	return spec.Sources{{Prefix: netip.MustParsePrefix(prefix), Gateway: netip.MustParseAddr(gateway)}}
}

func TestParse(t *testing.T) {
	want := Config{
		Router: spec.Router{
			Sources: sources("192.168.12.99/24", "192.168.12.1"),
			Egress:  "macvlan0",
			Cluster: "eth0",
			Forward: true,
			Set:     rules.Set{Redirects: []rules.Redirect{{Protocol: rules.TCP, Port: 80, To: netip.MustParseAddr("203.0.113.25")}}},

			ReplyMark:  0x1000,
			ReplyTable: 4711,

			Conflict: spec.ConflictWarn,
		},
		Mode:    Legacy,
		Backend: Auto,
		Health:  Health{Interval: 10 * time.Second, AnnounceInterval: time.Minute, ProbeInterval: 30 * time.Second},
	}
	for name, test := range map[string]struct {
		env  func(*Environment)
		want func(*Config)
	}{
		"defaults": {func(*Environment) {}, func(*Config) {}},
		"monitor":  {func(e *Environment) { e.Mode = "monitor" }, func(c *Config) { c.Mode = Monitor }},
		"no intervals": {
			func(e *Environment) { e.HealthInterval, e.AnnounceInterval = "0", "0s" },
			func(c *Config) { c.Health.Interval, c.Health.AnnounceInterval = 0, 0 },
		},
		"surroundings": {
			func(e *Environment) {
				e.Conflict, e.Probe, e.ProbeInterval, e.ProbeFailsReady = "refuse", "tcp", "5s", "true"
			},
			func(c *Config) {
				c.Conflict = spec.ConflictRefuse
				c.Health.Probe, c.Health.ProbeInterval, c.Health.ProbeFailsReady = true, 5*time.Second, true
			},
		},
		"reports": {
			func(e *Environment) {
				e.HealthListen, e.AuditLog, e.LogDrops, e.LogFormat, e.LogLevel = ":9465", "true", "true", "json", "warn"
			},
			func(c *Config) {
				c.Health.Listen, c.HealthPort, c.Health.AuditLog, c.LogDrops = netip.AddrPortFrom(netip.Addr{}, 9465), 9465, true, true
				c.Log = Log{JSON: true, Level: slog.LevelWarn}
			},
		},
		"drop log in mode init": {
			func(e *Environment) { e.Mode, e.LogDrops = "init", "true" },
			func(c *Config) {
				c.Mode, c.LogDrops = Init, true
				c.Warnings = []string{"EGRESS_LOG_DROPS=true logs nothing in mode init, which ends at once: a router in mode monitor with the same variables does"}
			},
		},
		"drop log with a proxy": {
			func(e *Environment) { e.Mode, e.LogDrops = "dns-proxy", "true" },
			func(c *Config) {
				c.Mode, c.Forward, c.Set, c.LogDrops = DNSProxy, false, rules.Set{}, true
				c.Warnings = []string{"EGRESS_LOG_DROPS=true has no effect in mode dns-proxy"}
			},
		},
		"modes":          {func(e *Environment) { e.Mode = "init" }, func(c *Config) { c.Mode = Init }},
		"without length": {func(e *Environment) { e.Source = "192.168.12.99" }, func(c *Config) { c.Sources = sources("192.168.12.99/32", "192.168.12.1") }},
		"gateway outside of the subnet": {
			func(e *Environment) { e.Gateway = "192.168.13.1" },
			func(c *Config) {
				c.Sources = sources("192.168.12.99/24", "192.168.13.1")
				c.Warnings = []string{"EGRESS_GATEWAY 192.168.13.1 is outside of the subnet of EGRESS_SOURCE, 192.168.12.0/24: check both, and the length"}
			},
		},
		"gateway without a subnet": {
			func(e *Environment) { e.Source, e.Gateway = "192.168.12.99", "192.168.13.1" },
			func(c *Config) {
				c.Sources = sources("192.168.12.99/32", "192.168.13.1")
			},
		},
		"interfaces":    {func(e *Environment) { e.Interface, e.ClusterInterface = "net1", "net0" }, func(c *Config) { c.Egress, c.Cluster = "net1", "net0" }},
		"a dotted name": {func(e *Environment) { e.Interface = "eth1.100@x" }, func(c *Config) { c.Egress = "eth1.100@x" }},
		"debug by 0": {func(e *Environment) { e.Debug = "0" }, func(c *Config) {
			c.Log.Level = slog.LevelDebug
			c.Warnings = []string{"EGRESS_ROUTER_DEBUG=0 turns debug logging on, as any value does: unset the variable to turn it off"}
		}},
		"short intervals": {
			func(e *Environment) {
				e.Probe, e.HealthInterval, e.AnnounceInterval, e.ProbeInterval = "tcp", "100ms", "60ms", "1ns"
			},
			func(c *Config) {
				c.Health.Probe = true
				c.Health.Interval, c.Health.AnnounceInterval, c.Health.ProbeInterval = 100*time.Millisecond, 60*time.Millisecond, 1
				c.Warnings = []string{"EGRESS_ANNOUNCE_INTERVAL 60ms is very short: expected at least 100ms", "EGRESS_PROBE_INTERVAL 1ns is very short: expected at least 100ms"}
			},
		},
		"debug by spaces": {func(e *Environment) { e.Debug = " " }, func(c *Config) { c.Log.Level = slog.LevelDebug }},
		"a proxy reads no destination": {
			func(e *Environment) { e.Mode, e.Destination = "http-proxy", "nonsense" },
			func(c *Config) { c.Mode, c.Forward, c.Set = HTTPProxy, false, rules.Set{} },
		},
		"backend":      {func(e *Environment) { e.Backend = "nftables" }, func(c *Config) { c.Backend = NFTables }},
		"forward":      {func(e *Environment) { e.Forward = "redirected" }, func(*Config) {}},
		"forward open": {func(e *Environment) { e.Forward = "open" }, func(c *Config) { c.Crossing = rules.CrossAll }},
		"helpers": {
			func(e *Environment) { e.Helpers = " ftp,, sip ,ftp" },
			func(c *Config) {
				c.Helpers = []rules.Helper{{Name: "ftp", Protocol: rules.TCP, Port: 21}, {Name: "sip", Protocol: rules.TCP, Port: 5060}, {Name: "sip", Protocol: rules.UDP, Port: 5060}}
			},
		},
		"flowtable":    {func(e *Environment) { e.Flowtable = "auto" }, func(c *Config) { c.Flowtable = spec.FlowtableAuto }},
		"no flowtable": {func(e *Environment) { e.Flowtable = "off" }, func(*Config) {}},
		"flowtable of a proxy": {
			func(e *Environment) { e.Mode, e.Flowtable = "dns-proxy", "require" },
			func(c *Config) {
				c.Mode, c.Forward, c.Set = DNSProxy, false, rules.Set{}
				c.Warnings = []string{"EGRESS_FLOWTABLE=require has no effect in mode dns-proxy"}
			},
		},
		"no helpers": {func(e *Environment) { e.Helpers = " , " }, func(c *Config) { c.Warnings = []string{`EGRESS_HELPERS " , " names no helper`} }},
		"helpers of a proxy": {
			func(e *Environment) { e.Mode, e.Helpers = "http-proxy", "ftp" },
			func(c *Config) {
				c.Mode, c.Forward, c.Set = HTTPProxy, false, rules.Set{}
				c.Warnings = []string{"EGRESS_HELPERS has no effect in mode http-proxy: nothing is redirected"}
			},
		},
		"forward open with a proxy": {
			func(e *Environment) { e.Mode, e.Forward = "http-proxy", "open" },
			func(c *Config) {
				c.Mode, c.Forward, c.Set = HTTPProxy, false, rules.Set{}
				c.Warnings = []string{"EGRESS_FORWARD=open has no effect in mode http-proxy: nothing is forwarded"}
			},
		},
		"nor a file": {
			func(e *Environment) { e.Mode, e.Destination, e.DestinationFile = "dns-proxy", "nonsense", "missing" },
			func(c *Config) { c.Mode, c.Forward, c.Set = DNSProxy, false, rules.Set{} },
		},
		"cluster networks": {
			func(e *Environment) { e.ClusterCIDRs = "10.96.0.0/12, 10.128.0.0/14" },
			func(c *Config) {
				c.ClusterDestinations = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("10.128.0.0/14")}
			},
		},
		"mark and table": {
			func(e *Environment) { e.ReplyMark, e.ReplyTable = "0x40000", "99" },
			func(c *Config) { c.ReplyMark, c.ReplyTable = 0x40000, 99 },
		},
		"comments only": {
			func(e *Environment) { e.Destination = "#" },
			func(c *Config) {
				c.Set, c.Warnings = rules.Set{}, []string{"EGRESS_DESTINATION contains no destination: nothing is redirected"}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			env, want := good(), want
			test.env(&env)
			test.want(&want)
			got, err := Parse(env, noFile)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
				cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
		})
	}
}

// All faults are reported together, and the original's sentence is the last line.
func TestParseFindsAll(t *testing.T) {
	_, err := Parse(Environment{
		Mode: "redirect", Source: "a", Gateway: "b", Interface: "a/b", ClusterInterface: strings.Repeat("x", 16),
		ReplyMark: "010x", ReplyTable: "254", ClusterCIDRs: "a,b",
	}, noFile)
	var variables []string
	for _, e := range err.(Errors) {
		variables = append(variables, e.Variable)
	}
	want := []string{"EGRESS_SOURCE", "EGRESS_GATEWAY", "EGRESS_ROUTER_MODE",
		"EGRESS_REPLY_MARK", "EGRESS_REPLY_TABLE", "EGRESS_CLUSTER_CIDRS", "EGRESS_CLUSTER_CIDRS", "EGRESS_INTERFACE", "EGRESS_CLUSTER_INTERFACE"}
	if diff := cmp.Diff(want, variables); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
	lines := strings.Split(err.Error(), "\n")
	if last := lines[len(lines)-1]; last != "EGRESS_SOURCE unspecified or invalid" {
		t.Errorf("the last line is %q", last)
	}
}

// An address that no host of the physical network can have is an error as source and
// as gateway, and a warning with its line as a destination. The mode unit-test prints
// source and gateway, as the original does.
func TestUnusableAddresses(t *testing.T) {
	for a, is := range map[string]string{
		"0.0.0.0": "the unspecified address", "0.1.2.3": "an address of 0.0.0.0/8", "127.0.0.1": "a loopback address", "127.255.0.1": "a loopback address",
		"224.0.0.1": "a multicast address", "239.255.255.255": "a multicast address", "255.255.255.255": "the broadcast address",
		"192.168.12.0": "the network address of 192.168.12.0/24", "192.168.12.255": "the broadcast address of 192.168.12.0/24",
	} {
		for _, mode := range []string{"", "init", "monitor", "http-proxy", "dns-proxy", "unit-test"} {
			for variable, set := range map[string]func(*Environment){
				"EGRESS_SOURCE":  func(e *Environment) { e.Source = a + "/24" },
				"EGRESS_GATEWAY": func(e *Environment) { e.Gateway = a },
			} {
				env := good()
				env.Mode = mode
				set(&env)
				_, err := Parse(env, noFile)
				if mode == "unit-test" {
					if err != nil {
						t.Errorf("%s %s in mode %s: %v", variable, a, mode, err)
					}
					continue
				}
				if err == nil || !strings.HasSuffix(err.Error(), "\n"+variable+" unspecified or invalid") || !strings.Contains(err.Error(), ": "+is+" cannot be ") {
					t.Errorf("%s %s in mode %q: error %v, want %q", variable, a, mode, err, is)
				}
			}
		}
		env := good()
		env.Destination = "# comment\n80 tcp 203.0.113.25\n81 udp " + a
		c, err := Parse(env, noFile)
		if want := "EGRESS_DESTINATION line 3: " + a + " is " + is + ": connections redirected to it fail"; err != nil || len(c.Warnings) != 1 || c.Warnings[0] != want {
			t.Errorf("destination: error %v, warnings %q, want %q", err, c.Warnings, want)
		}
	}
	// A /31 and a /32 have neither a network nor a broadcast address (RFC 3021).
	for _, source := range []string{"192.168.12.0/31", "192.168.12.1/31", "192.168.12.0/32", "192.168.12.255", "192.168.12.99/0"} {
		env := good()
		env.Source, env.Gateway = source, "192.168.13.1"
		if _, err := Parse(env, noFile); err != nil {
			t.Errorf("EGRESS_SOURCE %s: %v", source, err)
		}
	}
}

// Thousands of unreachable destinations do not flood the log, and the file names the
// place.
func TestUnreachableDestinations(t *testing.T) {
	env := good()
	env.Destination, env.DestinationFile = "", "/etc/egress/destinations"
	c, err := Parse(env, func(string) ([]byte, error) {
		var b strings.Builder
		for port := 1; port <= 5000; port++ {
			fmt.Fprintf(&b, "%d tcp 127.0.0.1\n", port)
		}
		return []byte(b.String() + "192.168.12.99\n"), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(c.Warnings); n != 11 || !strings.HasPrefix(c.Warnings[9], "/etc/egress/destinations:10: ") || c.Warnings[10] != "EGRESS_DESTINATION_FILE has 4991 more destinations of that kind" {
		t.Errorf("%d warnings: %q", n, c.Warnings)
	}
}

func TestHealthErrors(t *testing.T) {
	for _, test := range []struct {
		set  func(*Environment)
		want string
	}{
		{func(e *Environment) { e.HealthInterval = "10" }, "hint: write 10s for 10 seconds\n" + `EGRESS_HEALTH_INTERVAL "10" is not a time: expected a number with its unit, such as 500ms, 90s or 15m, or 0`},
		{func(e *Environment) { e.AnnounceInterval = "-1s" }, "hint: correct the value, or unset the variable for the default, 60s\n" + `EGRESS_ANNOUNCE_INTERVAL "-1s" is not a time: expected a number with its unit, such as 500ms, 90s or 15m, or 0`},
		{func(e *Environment) { e.ProbeInterval = "0" }, "hint: correct the value, or unset the variable for the default, 30s\n" + `EGRESS_PROBE_INTERVAL "0" is not a time: expected a number with its unit, such as 500ms, 90s or 15m`},
		{func(e *Environment) { e.Conflict = "ignore" }, "hint: correct the value, or unset the variable for the default, warn\n" + `EGRESS_CONFLICT "ignore" is neither warn, refuse nor defend`},
		{func(e *Environment) { e.Flowtable = "true" }, "hint: correct the value, or unset the variable for the default, off\n" + `EGRESS_FLOWTABLE "true" is neither off, auto nor require`},
		{
			func(e *Environment) { e.Helpers = "ftp;tftp" },
			"hint: the helpers are amanda, ftp, h323, irc, netbios-ns, pptp, sane, sip, snmp, tftp\nEGRESS_HELPERS \"ftp;tftp\" is not a helper",
		},
		{func(e *Environment) { e.Probe = "icmp" }, "hint: write tcp, or unset the variable for no probe\n" + `EGRESS_PROBE "icmp" is not tcp, the only kind of probe`},
		{func(e *Environment) { e.ProbeFailsReady = "1" }, "hint: write true\n" + `EGRESS_PROBE_FAILS_READY "1" is neither true nor false`},
		{func(e *Environment) { e.AuditLog = "yes" }, "hint: write true\n" + `EGRESS_AUDIT_LOG "yes" is neither true nor false`},
		{func(e *Environment) { e.LogDrops = "yes" }, "hint: write true\n" + `EGRESS_LOG_DROPS "yes" is neither true nor false`},
		{func(e *Environment) { e.LogFormat = "xml" }, "hint: correct the value, or unset the variable for the default, text\n" + `EGRESS_LOG_FORMAT "xml" is neither text nor json`},
		{func(e *Environment) { e.LogLevel = "DEBUG" }, "hint: write debug\n" + `EGRESS_LOG_LEVEL "DEBUG" is neither debug, info, warn nor error`},
		{func(e *Environment) { e.HealthListen = "9465" }, "hint: write :9465, with a colon in front of the port\n" + `EGRESS_HEALTH_LISTEN "9465" is not an address and a port: expected such as :9465, 10.128.0.98:9465 or [::1]:9465`},
		{func(e *Environment) { e.HealthListen = ":80" }, "hint: correct the value, or unset the variable\n" + `EGRESS_HEALTH_LISTEN has port 80, which is also a local port of the destinations: choose another port`},
	} {
		env := good()
		test.set(&env)
		if _, err := Parse(env, noFile); err == nil || err.Error() != test.want {
			t.Errorf("got  %v\nwant %s", err, test.want)
		}
	}
}

func TestInterfaceNames(t *testing.T) {
	for _, name := range []string{"a b", "a/b", "a:b", "eth+", "!eth0", "-i", "..", ".", `a"b`, "a'b", `a\b`, "a\tb", "a\nb", "ethé", "0123456789abcdef"} {
		env := good()
		env.Interface = name
		if _, err := Parse(env, noFile); err == nil {
			t.Errorf("%q is accepted as an interface name", name)
		} else if !strings.Contains(err.Error(), "EGRESS_INTERFACE") || strings.Count(err.Error(), "\n") > 1 {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestReplyErrors(t *testing.T) {
	for name, test := range map[string]struct {
		env  func(*Environment)
		want string
	}{
		"mark 0":       {func(e *Environment) { e.ReplyMark = "0" }, `EGRESS_REPLY_MARK "0" is not a mark`},
		"mark text":    {func(e *Environment) { e.ReplyMark = "x" }, `EGRESS_REPLY_MARK "x" is not a mark`},
		"main table":   {func(e *Environment) { e.ReplyTable = "254" }, `EGRESS_REPLY_TABLE "254" is not a table`},
		"table 0":      {func(e *Environment) { e.ReplyTable = "0" }, `EGRESS_REPLY_TABLE "0" is not a table`},
		"IPv6":         {func(e *Environment) { e.ClusterCIDRs = "fd00::/8" }, `EGRESS_CLUSTER_CIDRS "fd00::/8": expected an IPv4 network`},
		"everything":   {func(e *Environment) { e.ClusterCIDRs = "0.0.0.0/0" }, `expected an IPv4 network`},
		"no network":   {func(e *Environment) { e.ClusterCIDRs = "10.96.0.1/12" }, `the network with that length is 10.96.0.0/12`},
		"the gateway":  {func(e *Environment) { e.ClusterCIDRs = "192.168.0.0/16" }, `it contains EGRESS_GATEWAY (192.168.12.1)`},
		"a redirect's": {func(e *Environment) { e.ClusterCIDRs = "203.0.113.0/24" }, `it contains the destination 203.0.113.25`},
	} {
		t.Run(name, func(t *testing.T) {
			env := good()
			test.env(&env)
			if _, err := Parse(env, noFile); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
		})
	}
}

// A destination of a family without a source is an error with its line.
func TestDestinationOfOtherFamily(t *testing.T) {
	for _, destination := range []string{"80 tcp 203.0.113.25\n443 tcp 2001:db8::25", "203.0.113.25\n2001:db8::27 # all"} {
		for _, mode := range []string{"", "unit-test"} {
			env := good()
			env.Mode, env.Grammar, env.Destination = mode, "extended", destination
			_, err := Parse(env, noFile)
			if err == nil || !strings.Contains(err.Error(), "EGRESS_DESTINATION line 2: ") || !strings.HasSuffix(err.Error(), " is for IPv6, and EGRESS_SOURCE has no IPv6 address") {
				t.Errorf("%q in mode %q: %v", destination, mode, err)
			}
		}
	}
}

func TestKeepNameServers(t *testing.T) {
	env := good()
	env.ClusterCIDRs = "10.0.0.53/32"
	env.Destination += "\n198.51.100.53"
	c, err := Parse(env, noFile)
	if err != nil {
		t.Fatal(err)
	}
	c.KeepNameServers([]byte(`# a comment
search cluster.local
nameserver 10.96.0.10
nameserver 10.0.0.53
nameserver 10.96.0.10
nameserver 127.0.0.11
nameserver 192.168.12.1
nameserver 192.168.12.53
nameserver 198.51.100.53
nameserver fd00::10
nameserver
options ndots:5
`))
	want := []netip.Prefix{netip.MustParsePrefix("10.0.0.53/32"), netip.MustParsePrefix("10.96.0.10/32")}
	if diff := cmp.Diff(want, c.ClusterDestinations, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

// A long line does not flood the log more than with the original.
func TestLongLine(t *testing.T) {
	env := good()
	env.Destination = strings.Repeat("x", 100000)
	_, err := Parse(env, noFile)
	if n := len(err.Error()); n > 100000*2+1000 {
		t.Errorf("%d bytes of error for a line of 100,000", n)
	}
}

// A stray variable with the bare name is ignored, and every variable is read
// unchanged.
func TestRead(t *testing.T) {
	for _, v := range Variables() {
		t.Setenv(v.Name, "")
		t.Setenv(strings.TrimPrefix(v.Name, "EGRESS_"), "stray")
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	env, err := Read()
	env.Names = nil
	if diff := cmp.Diff(Environment{}, env); err != nil || diff != "" {
		t.Errorf("error %v, - want, + got:\n%s", err, diff)
	}
	t.Setenv("EGRESS_SOURCE", " 1.2.3.4\n")
	t.Setenv("EGRESS_ROUTER_DEBUG", "no")
	env, err = Read()
	if !slices.Contains(env.Names, "EGRESS_SOURCE") {
		t.Errorf("names %q", env.Names)
	}
	env.Names = nil
	if diff := cmp.Diff(Environment{Source: " 1.2.3.4\n", Debug: "no"}, env); err != nil || diff != "" {
		t.Errorf("error %v, - want, + got:\n%s", err, diff)
	}
}

// Kubernetes sets NAME_SERVICE_HOST and NAME_PORT... for every service; a
// variable of ours must not look like one.
func TestNamesAreNotOfServices(t *testing.T) {
	for _, v := range Variables() {
		if strings.Contains(v.Name, "_SERVICE_") || serviceName().MatchString(v.Name) {
			t.Errorf("%s could be set by Kubernetes for a service", v.Name)
		}
	}
}

var update = flag.Bool("update", false, "rewrite the tables of cmd/egress-router/README.md")

// The structs, the command's comment and the tables of its README describe the same
// variables in the same words.
func TestDocumentation(t *testing.T) {
	comment, err := os.ReadFile("../../cmd/egress-router/main.go")
	if err != nil {
		t.Fatal(err)
	}
	all := 0
	for name, part := range map[string]struct {
		variables []Variable
		width     int // width of the column of names in the comment
	}{
		"variables of the router":     {Variables(), 25},
		"variables of the HTTP proxy": {HTTPProxyVariables(), 35},
		"variables of the DNS proxy":  {DNSProxyVariables(), 35},
	} {
		table := "| variable | default | meaning |\n|---|---|---|\n"
		for _, v := range part.variables {
			if v.Unset == "" || v.Doc == "" {
				t.Errorf("%s is not described", v.Name)
			}
			if line := fmt.Sprintf("//\t%-*s (%s) %s\n", part.width, v.Name, v.Unset, v.Doc); !strings.Contains(string(comment), line) {
				t.Errorf("cmd/egress-router/main.go lacks\n%s", line)
			}
			table += fmt.Sprintf("| `%s` | %s | %s |\n", v.Name, v.Unset, v.Doc)
		}
		if err := manual.Generated("../../cmd/egress-router/README.md", name, table, *update); err != nil {
			t.Error(err)
		}
		all += len(part.variables)
	}
	if n := strings.Count(string(comment), "//\tEGRESS_"); n != all {
		t.Errorf("cmd/egress-router/main.go has %d variables, want %d", n, all)
	}
}
