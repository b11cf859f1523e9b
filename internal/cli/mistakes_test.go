package cli

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/httpproxy"
	"github.com/egress-router/egress-router/internal/tcpproxy"
)

// wrong are values that no variable accepts, other than those of anyValue.
var wrong = []string{
	" ", "\t", "\n", "nonsense ", " nonsense", "nonsense\n", `"nonsense"`, `'true'`, "non\x01sense", "non\x1b[31msense", "nonsensé", "true\u00a0", "$(NONSENSE)", "${NONSENSE}",
	"-1", "-", "/", ":", ",;", "99999999999999999999", "non sense", strings.Repeat("x", 100000),
}

// wrongOf are wrong values of single variables.
var wrongOf = map[string][]string{
	"EGRESS_ROUTER_MODE":          {"Init", "INIT", "legacy ", "redirect", "httpproxy", "1", "true"},
	"EGRESS_SOURCE":               {"192.168.12.99/", "192.168.12.99/33", "192.168.12.99/255.255.255.0", "192.168.12", "fd00::1/64", "192.168.12.99,192.168.12.100", "host.example", `"192.168.12.99/24"`, "192.168.12.99 / 24"},
	"EGRESS_GATEWAY":              {"192.168.12.1/24", "192.168.12", "fd00::1", "router.example", "192.168.12.1,192.168.12.2", "eth0", "'192.168.12.1'"},
	"EGRESS_DESTINATION":          {"80 tcp", "80 203.0.113.25", "80 TCP 203.0.113.25", "80 tcp www.example.com", "80 tcp 203.0.113.25:80", "80\ttcp\t203.0.113.25", "tcp 80 203.0.113.25", "203.0.113.25/32", "80 tcp 203.0.113.25\r", "80 tcp 203.0.113.25 # web", "80-90 tcp 203.0.113.25", "fd00::1", `80 tcp 203.0.113.25\n81 tcp 203.0.113.26`, `# web\n80 tcp 203.0.113.25`, "80 tcp 203.0.113.25 81 tcp 203.0.113.26", "80 icmp 203.0.113.25", `80 tcp 203.0.113.25\`, "203.0.113.27\n80 tcp 203.0.113.25", "80 tcp 203.0.113.25\n80 udp 203.0.113.25", "080 tcp 203.0.113.25", "#"},
	"EGRESS_DESTINATION_FILE":     {"/nowhere", "/", "/dev/zero", "/dev/null", "destinations", "80 tcp 203.0.113.25"},
	"EGRESS_INTERFACE":            {"lo", "eth0", "macvlan0,", "macvlan0 ", "eth0/1", "averyverylongname", "..", "eth+"},
	"EGRESS_CLUSTER_INTERFACE":    {"lo", "macvlan0", "eth0:1", "averyverylongname", "!eth0"},
	"EGRESS_CLUSTER_CIDRS":        {"10.96.0.0", "10.96.0.1/12", "10.96.0.0/33", "10.96.0.0/255.240.0.0", "fd00::/8", "0.0.0.0/0", "10.96.0.0/12;10.128.0.0/14", "192.168.0.0/16", "203.0.113.0/24", "127.0.0.0/8", "224.0.0.0/4", ",", "true", "cluster.local"},
	"EGRESS_REPLY_MARK":           {"0", "0x", "0x100000000", "4294967296", "0b1", "1/1"},
	"EGRESS_REPLY_TABLE":          {"0", "0x10", "main", "254", "4294967296"},
	"EGRESS_ROUTER_BACKEND":       {"nft", "Iptables", "iptables-nft", "iptables-legacy", "true"},
	"EGRESS_FORWARD":              {"true", "Open", "all", "1"},
	"EGRESS_MACVLAN_PARENT":       {"false", "False", "True", "TRUE", "yes", "no", "0", "1", "eth0:1", "averyverylongname"},
	"EGRESS_MACVLAN_MODE":         {"Bridge", "source", "1"},
	"EGRESS_HOST_NETNS":           {"/nowhere", "host"}, // a warning, without a parent
	"EGRESS_CONFLICT":             {"Warn", "ignore", "error", "true"},
	"EGRESS_HEALTH_INTERVAL":      {"10", "10S", "10 s", "1d", "-1s", "ten", "1,5s", "10ms"},
	"EGRESS_ANNOUNCE_INTERVAL":    {"60", "1m30", "-1m", "1w"},
	"EGRESS_HEALTH_LISTEN":        {":0", "9465", ":", ":99999", "localhost:9465", "10.128.0.98", "*:9465", "::1:9465", "http://:9465", ":http", ":80"},
	"EGRESS_PROBE":                {"true", "TCP", "icmp", "tcp,udp"},
	"EGRESS_PROBE_INTERVAL":       {"0", "30", "-1s", "30s"}, // the last one without a probe
	"EGRESS_PROBE_FAILS_READY":    {"yes", "1", "True", "true"},
	"EGRESS_AUDIT_LOG":            {"yes", "1", "True", "TRUE", "on", "json"},
	"EGRESS_LOG_FORMAT":           {"JSON", "logfmt", "xml"},
	"EGRESS_LOG_LEVEL":            {"DEBUG", "trace", "warning", "0"},
	"EGRESS_SHUTDOWN_GRACE":       {"20", "-1s", "1d"},
	"EGRESS_ACCESS_LOG":           {"yes", "1", "/dev/stdout"},
	"EGRESS_HTTP_PROXY_LISTEN":    {":0", "8080", "localhost:8080", "10.128.0.98"},
	"EGRESS_DNS_PROXY_SEND_PROXY": {"yes", "v2", "2"},

	"EGRESS_HTTP_PROXY_DESTINATION":       {"1.2.3.256", "*\nexample.com", "http://example.com", "example.com:443", "!*", "example.com # web", `!example.com\n*`},
	"EGRESS_HTTP_PROXY_DESTINATION_FILE":  {"/nowhere", "/"},
	"EGRESS_HTTP_PROXY_CONNECT_TIMEOUT":   {"0", "10", "-1s"},
	"EGRESS_HTTP_PROXY_HEADER_TIMEOUT":    {"0", "10", "-1s"},
	"EGRESS_HTTP_PROXY_KEEPALIVE_TIMEOUT": {"0", "10", "-1s"},
	"EGRESS_HTTP_PROXY_IDLE_TIMEOUT":      {"0", "10", "-1s"},
	"EGRESS_HTTP_PROXY_MAX_HEADER":        {"0", "64k", "64KiB", "1e6"},
	"EGRESS_HTTP_PROXY_MAX_CONNECTIONS":   {"0", "many", "-5"},
	"EGRESS_HTTP_PROXY_MODE":              {"Unit-Test", "unittest"},
	"EGRESS_DNS_PROXY_DESTINATION":        {"80", "80 intranet", "tcp 80 a.example", "80 a.example:80", "0 a.example", "80 a.example\n80 b.example", `80 a.example\n81 b.example`, "80 fd00::1"},
	"EGRESS_DNS_PROXY_DESTINATION_FILE":   {"/nowhere", "/"},
	"EGRESS_DNS_PROXY_IDLE_TIMEOUT":       {"60", "-1s", "1d"},
	"EGRESS_ROUTER_DEBUG":                 {"0", "no", "false", "False", "off"}, // warnings: it is on
	"EGRESS_DNS_PROXY_DEBUG":              {"0", "no", "false", "False", "off"},
	"EGRESS_DNS_PROXY_MODE":               {"Unit-Test", "unittest"},
}

// isValid reports whether a value of the table is valid in a program: the kernel accepts
// many names of interfaces, a list is cut at the ends, and a port may be free.
func isValid(program, variable, value string) bool {
	switch variable {
	case "EGRESS_INTERFACE", "EGRESS_CLUSTER_INTERFACE", "EGRESS_MACVLAN_PARENT":
		return slices.Contains([]string{"$(NONSENSE)", "${NONSENSE}", ",;", "macvlan0,"}, value)
	case "EGRESS_HTTP_PROXY_DESTINATION":
		return strings.TrimSpace(value) == "nonsense"
	case "EGRESS_CLUSTER_CIDRS":
		return value == "203.0.113.0/24" && strings.HasSuffix(program, "-proxy") // which reads no destination
	case "EGRESS_HEALTH_LISTEN":
		return value == ":80" && strings.HasSuffix(program, "-proxy")
	}
	return false
}

// anyValue are the variables that any value turns on.
var anyValue = []string{"EGRESS_ROUTER_DEBUG", "EGRESS_DNS_PROXY_DEBUG"}

// whole are the variables whose frozen sentences contain the whole value.
var whole = []string{"EGRESS_ROUTER_MODE", "EGRESS_DESTINATION", "EGRESS_HTTP_PROXY_DESTINATION", "EGRESS_DNS_PROXY_DESTINATION"}

// A wrong value of any variable, in any mode that reads it, is an error or a warning that
// names the variable. An error states a remedy on a line before it, in text without
// control characters.
func TestMistakes(t *testing.T) {
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "EGRESS_") {
			t.Setenv(name, "")
		}
	}
	type program struct {
		variables []config.Variable
		env       map[string]string
		parse     func() (warnings []string, err error)
	}
	programs := map[string]program{
		"http-proxy": {config.HTTPProxyVariables(), map[string]string{"EGRESS_HTTP_PROXY_DESTINATION": "*"}, func() ([]string, error) {
			env, err := config.ReadHTTPProxy()
			if err != nil {
				return nil, err
			}
			c, err := config.ParseHTTPProxy(env, readFile, func(list string) error { _, err := httpproxy.Parse(list); return err })
			return c.Warnings, err
		}},
		"dns-proxy": {config.DNSProxyVariables(), map[string]string{"EGRESS_DNS_PROXY_DESTINATION": "80 a.example"}, func() ([]string, error) {
			env, err := config.ReadDNSProxy()
			if err != nil {
				return nil, err
			}
			c, err := config.ParseDNSProxy(env, readFile, func(list string) error { _, err := tcpproxy.Parse(list); return err })
			return c.Warnings, err
		}},
	}
	for _, mode := range config.Modes {
		programs["mode "+string(mode)] = program{config.Variables(), map[string]string{
			"EGRESS_ROUTER_MODE": string(mode), "EGRESS_SOURCE": "192.168.12.99/24", "EGRESS_GATEWAY": "192.168.12.1", "EGRESS_DESTINATION": "80 tcp 203.0.113.25",
		}, func() ([]string, error) {
			env, err := config.Read()
			if err != nil {
				return nil, err
			}
			c, err := config.Parse(env, readFile)
			return c.Warnings, err
		}}
	}
	for name, p := range programs {
		set := func(variable, value string) {
			if err := os.Setenv(variable, value); err != nil {
				t.Fatal(err)
			}
		}
		for variable, value := range p.env {
			set(variable, value)
		}
		if warnings, err := p.parse(); err != nil || len(warnings) > 0 {
			t.Errorf("%s: valid values: %v, warnings %q", name, err, warnings)
		}
		for _, v := range p.variables {
			if proxies := name == "mode http-proxy" || name == "mode dns-proxy"; proxies && strings.HasPrefix(v.Name, "EGRESS_DESTINATION") {
				continue // not read
			}
			if list, ok := strings.CutSuffix(v.Name, "_FILE"); ok {
				set(list, "")
			}
			values := slices.Concat(wrong, wrongOf[v.Name])
			if slices.Contains(anyValue, v.Name) {
				values = wrongOf[v.Name]
			}
			for _, value := range values {
				if isValid(name, v.Name, value) {
					continue
				}
				set(v.Name, value)
				warnings, err := p.parse()
				faults, _ := errors.AsType[config.Errors](err)
				named := slices.ContainsFunc(warnings, func(w string) bool { return strings.Contains(w, v.Name) })
				for _, f := range faults {
					named = named || strings.Contains(f.Sentence+f.Variable, v.Name)
					text := f.Sentence
					if slices.Contains(whole, v.Name) {
						text = ""
					}
					if f.Hint == "" || strings.ContainsFunc(strings.ReplaceAll(f.Hint, "\n", "")+text, func(r rune) bool { return r < ' ' }) || len(text)+len(f.Hint) > 1000 {
						t.Errorf("%s: %s=%.60q: hint %.200q of %.200q", name, v.Name, value, f.Hint, f.Sentence)
					}
				}
				if !named {
					t.Errorf("%s: %s=%.60q: no error or warning names it: %v, warnings %q", name, v.Name, value, err, warnings)
				}
			}
			set(v.Name, p.env[v.Name])
			for variable, value := range p.env {
				set(variable, value)
			}
		}
		for variable := range p.env {
			set(variable, "")
		}
	}
	for variable := range wrongOf {
		if !slices.ContainsFunc(slices.Concat(config.Variables(), config.HTTPProxyVariables(), config.DNSProxyVariables()), func(v config.Variable) bool { return v.Name == variable }) {
			t.Errorf("there is no variable %s", variable)
		}
	}
}
