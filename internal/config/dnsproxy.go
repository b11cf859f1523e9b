package config

import (
	"fmt"
	"os"
	"reflect"
	"slices"
	"time"

	"github.com/kelseyhightower/envconfig"

	"github.com/egress-router/egress-router/rules"
)

// A DNSProxyEnvironment contains the variables of the DNS proxy, as Environment
// does those of the router.
type DNSProxyEnvironment struct {
	Destination     string `envconfig:"EGRESS_DNS_PROXY_DESTINATION" unset:"required" doc:"destinations, one a line: PORT HOST, or PORT HOST REMOTEPORT; HOST is an IPv4 address or a name"`
	DestinationFile string `envconfig:"EGRESS_DNS_PROXY_DESTINATION_FILE" unset:"none" doc:"file with the same lines, instead of EGRESS_DNS_PROXY_DESTINATION; reloaded when it changes"`
	IdleTimeout     string `envconfig:"EGRESS_DNS_PROXY_IDLE_TIMEOUT" unset:"60s" doc:"time without data, either way, after which a connection ends; 0: never"`
	SendProxy       string `envconfig:"EGRESS_DNS_PROXY_SEND_PROXY" unset:"false" doc:"true: send the client's address to servers, by the PROXY protocol, version 2"`
	ProxyEnvironment
	Mode  string `envconfig:"EGRESS_DNS_PROXY_MODE" unset:"serve" doc:"unit-test: print the listen and dial addresses, and do nothing"`
	Debug string `envconfig:"EGRESS_DNS_PROXY_DEBUG" unset:"off" doc:"any value (also no, 0 and false) logs one line for each connection"`
}

// ReadDNSProxy returns the variables of this process.
func ReadDNSProxy() (DNSProxyEnvironment, error) {
	var env DNSProxyEnvironment
	env.Names, env.RouterMode = names(), os.Getenv("EGRESS_ROUTER_MODE")
	err := envconfig.Process("", &env)
	return env, err
}

// DNSProxyVariables lists every variable of the DNS proxy, in display order.
func DNSProxyVariables() []Variable { return variables(reflect.TypeFor[DNSProxyEnvironment]()) }

// A DNSProxyConfig is the valid configuration of the DNS proxy, without its
// destinations.
type DNSProxyConfig struct {
	ProxyConfig
	Idle      time.Duration // 0: never
	SendProxy bool
	Debug     bool
}

// ParseDNSProxy validates env and returns its configuration. readFile returns the
// content of EGRESS_DNS_PROXY_DESTINATION_FILE. grammar is the proxy's parser of
// destinations, which returns a *rules.ParseError. Each is called at most once. The
// error is an Errors with every invalid variable.
func ParseDNSProxy(env DNSProxyEnvironment, readFile func(name string) ([]byte, error), grammar func(list string) error) (DNSProxyConfig, error) {
	c := DNSProxyConfig{Debug: env.Debug != ""}
	var faults Errors
	report := func(e *Error) {
		if e != nil {
			faults = append(faults, e)
		}
	}
	unknown := unknownVariables(env.Names, DNSProxyVariables())
	empty := false
	warning, fault := env.list().read(readFile, func(list string) error {
		empty = isEmpty(list)
		return grammar(list)
	})
	report(fault)
	report(parseTime("EGRESS_DNS_PROXY_IDLE_TIMEOUT", orDefault(env.IdleTimeout, "60s"), orZero, &c.Idle))
	report(parseBool("EGRESS_DNS_PROXY_SEND_PROXY", env.SendProxy, &c.SendProxy))
	c.parse("EGRESS_DNS_PROXY_MODE", env.Mode, env.ProxyEnvironment, report)
	if len(faults) > 0 {
		faults.explain(env)
		return DNSProxyConfig{}, faults.with(unknown)
	}
	c.Warnings = slices.Concat(unknown, c.Warnings, debugWarning("EGRESS_DNS_PROXY_DEBUG", env.Debug))
	if warning != "" {
		c.Warnings = append(c.Warnings, warning)
	}
	if empty {
		c.Warnings = append(c.Warnings, env.list().from()+" contains no destination: the proxy listens on no port")
	}
	return c, nil
}

// CheckPorts checks that no destination has the port of the health endpoint: the proxy
// listens on all addresses.
func (c DNSProxyConfig) CheckPorts(ports []rules.Port) *Error {
	if port := c.Health.Port(); port != 0 && slices.Contains(ports, rules.Port(port)) {
		return &Error{"EGRESS_HEALTH_LISTEN", fmt.Sprintf("EGRESS_HEALTH_LISTEN has port %d, as has a line of EGRESS_DNS_PROXY_DESTINATION", port), "hint: set another port in EGRESS_HEALTH_LISTEN, such as :9465"}
	}
	return nil
}

// DNSProxyDestinations reads the destination list, from the variable or the file,
// and returns its error. A running proxy calls it again after the file has changed.
func DNSProxyDestinations(env DNSProxyEnvironment, readFile func(name string) ([]byte, error), grammar func(list string) error) *Error {
	_, fault := env.list().read(readFile, grammar)
	return fault
}

func (env DNSProxyEnvironment) list() list {
	return list{"EGRESS_DNS_PROXY_DESTINATION", env.Destination, env.DestinationFile,
		rules.ParseError{Sentence: "Must specify EGRESS_DNS_PROXY_DESTINATION", Hint: `set EGRESS_DNS_PROXY_DESTINATION to one line for each destination, for example "8443 www.example.com 443"`}}
}
