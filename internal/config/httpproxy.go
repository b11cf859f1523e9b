package config

import (
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strconv"
	"time"

	"github.com/kelseyhightower/envconfig"

	"github.com/egress-router/egress-router/rules"
)

// An HTTPProxyEnvironment contains the variables of the HTTP proxy, as Environment
// does those of the router.
type HTTPProxyEnvironment struct {
	Destination      string `envconfig:"EGRESS_HTTP_PROXY_DESTINATION" unset:"required" doc:"the rules, one a line: IP, IP/LENGTH, NAME, *.NAME, any of them with ! in front to deny, and * at the end to allow the rest"`
	DestinationFile  string `envconfig:"EGRESS_HTTP_PROXY_DESTINATION_FILE" unset:"none" doc:"file with the same lines, instead of EGRESS_HTTP_PROXY_DESTINATION; reloaded when it changes"`
	Listen           string `envconfig:"EGRESS_HTTP_PROXY_LISTEN" spec:"HTTP proxy address" unset:":8080" doc:"listen address: :PORT, IP:PORT or [IPv6]:PORT"`
	ConnectTimeout   string `envconfig:"EGRESS_HTTP_PROXY_CONNECT_TIMEOUT" unset:"10s" doc:"timeout of a name lookup, and of a connection to a server"`
	HeaderTimeout    string `envconfig:"EGRESS_HTTP_PROXY_HEADER_TIMEOUT" unset:"30s" doc:"timeout for the header of a request"`
	KeepAliveTimeout string `envconfig:"EGRESS_HTTP_PROXY_KEEPALIVE_TIMEOUT" unset:"2m" doc:"time that a client's connection is kept for its next request"`
	IdleTimeout      string `envconfig:"EGRESS_HTTP_PROXY_IDLE_TIMEOUT" unset:"15m" doc:"time without data, either way, after which a request or a tunnel ends"`
	MaxHeader        string `envconfig:"EGRESS_HTTP_PROXY_MAX_HEADER" unset:"65536" doc:"maximum size of the header of a request or an answer, in bytes"`
	MaxConnections   string `envconfig:"EGRESS_HTTP_PROXY_MAX_CONNECTIONS" unset:"3/4 of the open files allowed" doc:"maximum number of client connections; more wait"`
	ProxyEnvironment
	Mode string `envconfig:"EGRESS_HTTP_PROXY_MODE" unset:"serve" doc:"unit-test: print the rules in squid's notation, and do nothing"`
}

// ReadHTTPProxy returns the variables of this process.
func ReadHTTPProxy() (HTTPProxyEnvironment, error) {
	var env HTTPProxyEnvironment
	env.Names, env.RouterMode = names(), os.Getenv("EGRESS_ROUTER_MODE")
	err := envconfig.Process("", &env)
	return env, err
}

// HTTPProxyVariables lists every variable of the HTTP proxy, in display order.
func HTTPProxyVariables() []Variable { return variables(reflect.TypeFor[HTTPProxyEnvironment]()) }

// An HTTPProxyConfig is the valid configuration of the HTTP proxy.
type HTTPProxyConfig struct {
	ProxyConfig

	Listen netip.AddrPort // the zero Addr: all addresses

	ConnectTimeout, HeaderTimeout, KeepAliveTimeout, IdleTimeout time.Duration

	MaxHeader      int // bytes
	MaxConnections int // 0: derived from the limit of open files
}

// ParseHTTPProxy validates env and returns its configuration. readFile returns the
// content of EGRESS_HTTP_PROXY_DESTINATION_FILE, grammar parses the rules, as for
// ParseDNSProxy; each is called at most once. The error is an Errors with every
// invalid variable.
func ParseHTTPProxy(env HTTPProxyEnvironment, readFile func(name string) ([]byte, error), grammar func(list string) error) (HTTPProxyConfig, error) {
	var c HTTPProxyConfig
	var faults Errors
	report := func(e *Error) {
		if e != nil {
			faults = append(faults, e)
		}
	}
	unknown := unknownVariables(env.Names, HTTPProxyVariables())
	empty := false
	warning, fault := env.list().read(readFile, func(list string) error {
		empty = isEmpty(list)
		return grammar(list)
	})
	report(fault)
	report(parseListen("EGRESS_HTTP_PROXY_LISTEN", ":8080", orDefault(env.Listen, ":8080"), &c.Listen))
	for _, v := range []struct {
		name, value, unset string
		set                *time.Duration
	}{
		{"EGRESS_HTTP_PROXY_CONNECT_TIMEOUT", env.ConnectTimeout, "10s", &c.ConnectTimeout},
		{"EGRESS_HTTP_PROXY_HEADER_TIMEOUT", env.HeaderTimeout, "30s", &c.HeaderTimeout},
		{"EGRESS_HTTP_PROXY_KEEPALIVE_TIMEOUT", env.KeepAliveTimeout, "2m", &c.KeepAliveTimeout},
		{"EGRESS_HTTP_PROXY_IDLE_TIMEOUT", env.IdleTimeout, "15m", &c.IdleTimeout},
	} {
		report(parseTime(v.name, orDefault(v.value, v.unset), notZero, v.set))
	}
	report(parseCount("EGRESS_HTTP_PROXY_MAX_HEADER", orDefault(env.MaxHeader, "65536"), 1<<10, 16<<20, &c.MaxHeader))
	if env.MaxConnections != "" {
		report(parseCount("EGRESS_HTTP_PROXY_MAX_CONNECTIONS", env.MaxConnections, 1, 1<<24, &c.MaxConnections))
	}
	if env.Mode != "" && env.Mode != serveMode && env.Mode != "unit-test" { // the original serves then, which a misspelt unit-test does not mean
		report(&Error{"EGRESS_HTTP_PROXY_MODE", fmt.Sprintf("EGRESS_HTTP_PROXY_MODE %s is not a mode: the only one is unit-test", quote(env.Mode)), ""})
		env.Mode = ""
	}
	c.parse("EGRESS_HTTP_PROXY_MODE", env.Mode, env.ProxyEnvironment, report)
	if c.Health.Port() != 0 && collide(c.Health, c.Listen) {
		report(&Error{"EGRESS_HEALTH_LISTEN", fmt.Sprintf("EGRESS_HEALTH_LISTEN has port %d, as has EGRESS_HTTP_PROXY_LISTEN", c.Health.Port()), "hint: set another port in EGRESS_HEALTH_LISTEN, such as :9465"})
	}
	if len(faults) > 0 {
		faults.explain(env)
		return HTTPProxyConfig{}, faults.with(unknown)
	}
	c.Warnings = append(unknown, c.Warnings...)
	if warning != "" {
		c.Warnings = append(c.Warnings, warning)
	}
	if empty {
		c.Warnings = append(c.Warnings, env.list().from()+" contains no rule: every request is denied")
	}
	return c, nil
}

// HTTPProxyRules reads the rules, from the variable or the file, and returns their
// error, as DNSProxyDestinations does for the other proxy.
func HTTPProxyRules(env HTTPProxyEnvironment, readFile func(name string) ([]byte, error), grammar func(list string) error) *Error {
	_, fault := env.list().read(readFile, grammar)
	return fault
}

func (env HTTPProxyEnvironment) list() list {
	return list{"EGRESS_HTTP_PROXY_DESTINATION", env.Destination, env.DestinationFile,
		rules.ParseError{Sentence: "No EGRESS_HTTP_PROXY_DESTINATION specified", Hint: `set EGRESS_HTTP_PROXY_DESTINATION to one rule on each line, for example "*.example.com"; a line "*" allows everything`}}
}

func parseCount(variable, s string, least, most int, set *int) *Error {
	n, err := strconv.Atoi(s)
	if err != nil || n < least || n > most {
		return &Error{variable, fmt.Sprintf("%s %s is not a number from %d to %d", variable, quote(s), least, most), ""}
	}
	*set = n
	return nil
}
