package config

import (
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/kelseyhightower/envconfig"

	"github.com/egress-router/egress-router/rules"
)

// A DNSProxyEnvironment holds the value of every variable of the DNS proxy, as
// Environment does for the router.
type DNSProxyEnvironment struct {
	Destination     string `envconfig:"EGRESS_DNS_PROXY_DESTINATION" unset:"required" doc:"where connections go, one line each: PORT HOST, or PORT HOST REMOTEPORT; HOST is an IPv4 address or a name"`
	DestinationFile string `envconfig:"EGRESS_DNS_PROXY_DESTINATION_FILE" unset:"none" doc:"file with the same lines, in place of EGRESS_DNS_PROXY_DESTINATION; changes are followed"`
	IdleTimeout     string `envconfig:"EGRESS_DNS_PROXY_IDLE_TIMEOUT" unset:"60s" doc:"time without data, either way, after which a connection ends; 0: never"`
	SendProxy       string `envconfig:"EGRESS_DNS_PROXY_SEND_PROXY" unset:"false" doc:"true: tell servers who the client is, by the PROXY protocol, version 2"`
	AccessLog       string `envconfig:"EGRESS_ACCESS_LOG" unset:"false" doc:"true: log one line for each connection"`
	ShutdownGrace   string `envconfig:"EGRESS_SHUTDOWN_GRACE" unset:"20s" doc:"how long connections may go on when the proxy is told to stop"`
	Mode            string `envconfig:"EGRESS_DNS_PROXY_MODE" unset:"serve" doc:"unit-test: print what would be listened on and dialled, and do nothing"`
	Debug           string `envconfig:"EGRESS_DNS_PROXY_DEBUG" unset:"off" doc:"any value (also no, 0 and false) logs one line for each connection"`
}

// ReadDNSProxy returns the variables of this process.
func ReadDNSProxy() (DNSProxyEnvironment, error) {
	var env DNSProxyEnvironment
	err := envconfig.Process("", &env)
	return env, err
}

// DNSProxyVariables lists every variable of the DNS proxy, in the order to show
// them.
func DNSProxyVariables() []Variable { return variables(reflect.TypeFor[DNSProxyEnvironment]()) }

// A DNSProxyConfig is everything that the DNS proxy needs besides its
// destinations, checked.
type DNSProxyConfig struct {
	UnitTest  bool          // print, and do nothing
	Idle      time.Duration // 0: never
	SendProxy bool
	AccessLog bool
	Debug     bool
	Grace     time.Duration

	Warnings []string // as in Config
}

// ParseDNSProxy checks env and returns what it asks for. readFile returns the
// content of EGRESS_DNS_PROXY_DESTINATION_FILE. The grammar of destinations is
// the proxy's own: grammar reads a list and says by a *rules.ParseError what is
// wrong with it. Each is called at most once. The error is of type Errors and
// holds every fault.
func ParseDNSProxy(env DNSProxyEnvironment, readFile func(name string) ([]byte, error), grammar func(list string) error) (DNSProxyConfig, error) {
	c := DNSProxyConfig{UnitTest: env.Mode == "unit-test", Debug: env.Debug != ""}
	var faults Errors
	report := func(e *Error) {
		if e != nil {
			faults = append(faults, e)
		}
	}
	report(DNSProxyDestinations(env, readFile, grammar))
	report(parseTime("EGRESS_DNS_PROXY_IDLE_TIMEOUT", orDefault(env.IdleTimeout, "60s"), &c.Idle))
	report(parseBool("EGRESS_DNS_PROXY_SEND_PROXY", env.SendProxy, &c.SendProxy))
	report(parseBool("EGRESS_ACCESS_LOG", env.AccessLog, &c.AccessLog))
	report(parseTime("EGRESS_SHUTDOWN_GRACE", orDefault(env.ShutdownGrace, "20s"), &c.Grace))
	if env.Mode != "" && !c.UnitTest { // the original takes it for none
		c.Warnings = append(c.Warnings, fmt.Sprintf("EGRESS_DNS_PROXY_MODE %q is not known, and has no effect: the only mode is unit-test", env.Mode))
	}
	if len(faults) > 0 {
		return DNSProxyConfig{}, faults
	}
	return c, nil
}

// DNSProxyDestinations reads the destination list, from the variable or the
// file, and returns what is wrong with it. A running proxy calls it again when
// the file has changed.
func DNSProxyDestinations(env DNSProxyEnvironment, readFile func(name string) ([]byte, error), grammar func(list string) error) *Error {
	const inVariable, inFile = "EGRESS_DNS_PROXY_DESTINATION", "EGRESS_DNS_PROXY_DESTINATION_FILE"
	variable, list := inVariable, env.Destination
	place := func(n int) string { return fmt.Sprintf("%s line %d", inVariable, n) }
	if env.DestinationFile != "" {
		variable = inFile
		if list != "" {
			return &Error{variable, fmt.Sprintf("%s and %s are both set: unset one of them", inVariable, inFile), ""}
		}
		data, err := readFile(env.DestinationFile)
		if err != nil {
			return &Error{variable, fmt.Sprintf("%s %q cannot be read: %v", inFile, env.DestinationFile, cause(err)),
				"hint: it names a file inside the container, such as a key of a mounted ConfigMap"}
		}
		list, place = string(data), func(n int) string { return fmt.Sprintf("%s:%d", env.DestinationFile, n) }
	}
	if list == "" {
		hint := `hint: give it one line for each destination, for example "8443 www.example.com 443"`
		if env.DestinationFile != "" {
			hint = fmt.Sprintf("hint: the file %q is empty", env.DestinationFile)
		}
		return &Error{variable, "Must specify " + inVariable, hint}
	}
	err := grammar(list)
	if err == nil {
		return nil
	}
	parse, ok := errors.AsType[*rules.ParseError](err)
	if !ok {
		return &Error{variable, err.Error(), ""}
	}
	hint := fmt.Sprintf("%s: %q", place(parse.Line.Number), shorten(parse.Line.Text))
	if parse.Hint != "" {
		hint += "\nhint: " + parse.Hint
	}
	return &Error{variable, parse.Sentence, hint}
}

// parseTime accepts a time with its unit, and 0.
func parseTime(variable, s string, set *time.Duration) *Error {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return &Error{variable, fmt.Sprintf("%s %q is not a time: expected a number with its unit, such as 500ms, 90s or 15m, or 0", variable, s), ""}
	}
	*set = d
	return nil
}

func parseBool(variable, s string, set *bool) *Error {
	switch s {
	case "true":
		*set = true
	case "", "false":
	default:
		return &Error{variable, fmt.Sprintf("%s %q is neither true nor false", variable, s), ""}
	}
	return nil
}
