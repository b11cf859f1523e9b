package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// A ProxyEnvironment contains the variables of both proxies.
type ProxyEnvironment struct {
	ShutdownGrace string `envconfig:"EGRESS_SHUTDOWN_GRACE" unset:"20s" doc:"time that active requests and connections may take after SIGTERM"`
	AccessLog     string `envconfig:"EGRESS_ACCESS_LOG" unset:"false" doc:"true: log one line for each connection, or, as the HTTP proxy, for each request and tunnel"`
	HealthListen  string `envconfig:"EGRESS_HEALTH_LISTEN" unset:"none" doc:"address of the status page /, /healthz, /readyz and /metrics, on the cluster side: :PORT or IP:PORT"`
	LogEnvironment
	RouterMode string `ignored:"true"` // value of EGRESS_ROUTER_MODE, which is no variable of a proxy
}

// A ProxyConfig is the common configuration of both proxies.
type ProxyConfig struct {
	UnitTest  bool          // print the configuration, and exit
	Grace     time.Duration // for active requests and connections after SIGTERM
	AccessLog bool
	Health    netip.AddrPort // address of /healthz; port 0: none
	Log       Log

	Warnings []string // see Config
}

// serveMode is the documented default of the proxies' modes.
const serveMode = "serve"

// parse parses the mode, by the name of its variable, and the common variables.
func (c *ProxyConfig) parse(variable, mode string, env ProxyEnvironment, report func(*Error)) {
	c.UnitTest = mode == "unit-test"
	if mode != "" && mode != serveMode && !c.UnitTest { // the original ignores it
		c.Warnings = append(c.Warnings, fmt.Sprintf("%s %q has no effect: the only mode is unit-test", variable, mode))
	}
	if !c.UnitTest && !slices.Contains([]Mode{"", HTTPProxy, DNSProxy}, Mode(env.RouterMode)) {
		c.Warnings = append(c.Warnings, fmt.Sprintf("EGRESS_ROUTER_MODE %s has no effect on a proxy: its variable is %s", quote(env.RouterMode), variable))
	}
	report(parseTime("EGRESS_SHUTDOWN_GRACE", orDefault(env.ShutdownGrace, "20s"), orZero, &c.Grace))
	report(parseBool("EGRESS_ACCESS_LOG", env.AccessLog, &c.AccessLog))
	report(parseHealthListen(env.HealthListen, &c.Health))
	c.Log.parse(env.LogEnvironment, report)
}

// Values of parseTime's parameter zero.
const (
	orZero  = true
	notZero = false
)

// parseTime accepts a time with its unit, and 0 if zero is set.
func parseTime(variable, s string, zero bool, set *time.Duration) *Error {
	d, err := time.ParseDuration(s)
	if err == nil && (d > 0 || d == 0 && zero) {
		*set = d
		return nil
	}
	text := fmt.Sprintf("%s %s is not a time: expected a number with its unit, such as 500ms, 90s or 15m", variable, quote(s))
	if zero {
		text += ", or 0"
	}
	return &Error{variable, text, meantTime(s)}
}

func parseBool(variable, s string, set *bool) *Error {
	switch s {
	case "true":
		*set = true
	case "", "false":
	default:
		return &Error{variable, fmt.Sprintf("%s %s is neither true nor false", variable, quote(s)), meantBool(s)}
	}
	return nil
}

// debugWarning returns a warning if a variable that any value turns on was probably
// meant to turn it off. The original took any value, too.
func debugWarning(variable, value string) []string {
	if booleans[strings.ToLower(strings.TrimSpace(value))] != "false" {
		return nil
	}
	return []string{fmt.Sprintf("%s=%s turns debug logging on, as any value does: unset the variable to turn it off", variable, strings.TrimSpace(value))}
}
