package config

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// A Health is the settings of a router that stays.
type Health struct {
	Interval         time.Duration  // between full comparisons; 0: only after events
	AnnounceInterval time.Duration  // between announcements; 0: none
	Listen           netip.AddrPort // address of /healthz; the zero Addr: all addresses; port 0: none
	Probe            bool           // probe each tcp destination
	ProbeInterval    time.Duration
	ProbeFailsReady  bool
	AuditLog         bool
}

// parseHealth reads the settings of a router that stays.
func (c *Config) parseHealth(env Environment, readFile func(string) ([]byte, error), report func(*Error)) {
	c.Conflict = spec.Conflict(orDefault(env.Conflict, string(spec.ConflictWarn)))
	report(choose("EGRESS_CONFLICT", string(c.Conflict), string(spec.ConflictWarn), string(spec.ConflictRefuse), string(spec.ConflictDefend)))
	h := &c.Health
	report(parseTime("EGRESS_HEALTH_INTERVAL", orDefault(env.HealthInterval, "10s"), orZero, &h.Interval))
	report(parseTime("EGRESS_ANNOUNCE_INTERVAL", orDefault(env.AnnounceInterval, "60s"), orZero, &h.AnnounceInterval))
	report(parseHealthListen(env.HealthListen, &h.Listen))
	c.HealthPort = rules.Port(h.Listen.Port())
	c.parseStandby(env, readFile, report)
	switch env.Probe {
	case "":
	case "tcp":
		h.Probe = true
	default:
		report(&Error{"EGRESS_PROBE", fmt.Sprintf("EGRESS_PROBE %s is not tcp, the only kind of probe", quote(env.Probe)), remedy("write tcp, or unset the variable for no probe")})
	}
	report(parseTime("EGRESS_PROBE_INTERVAL", orDefault(env.ProbeInterval, "30s"), notZero, &h.ProbeInterval))
	c.warnShort("EGRESS_HEALTH_INTERVAL", h.Interval)
	c.warnShort("EGRESS_ANNOUNCE_INTERVAL", h.AnnounceInterval)
	c.warnShort("EGRESS_PROBE_INTERVAL", h.ProbeInterval)
	report(parseBool("EGRESS_PROBE_FAILS_READY", env.ProbeFailsReady, &h.ProbeFailsReady))
	for _, v := range []struct{ name, value string }{{"EGRESS_PROBE_INTERVAL", env.ProbeInterval}, {"EGRESS_PROBE_FAILS_READY", env.ProbeFailsReady}} {
		if v.value != "" && env.Probe == "" {
			c.Warnings = append(c.Warnings, v.name+" has no effect without EGRESS_PROBE")
		}
	}
	report(parseBool("EGRESS_AUDIT_LOG", env.AuditLog, &h.AuditLog))
	report(c.parseLogDrops(env.LogDrops))
	report(c.checkHealthPort())
	if c.Mode == UnitTest { // it prints the rules of the original
		c.HealthPort = 0
	}
}

// shortest is the shortest interval without a warning. A reconcile of 10,000
// destinations by iptables takes about as long; 5m and 5ms differ by a letter.
const shortest = 100 * time.Millisecond

func (c *Config) warnShort(variable string, interval time.Duration) {
	if interval > 0 && interval < shortest {
		c.Warnings = append(c.Warnings, fmt.Sprintf("%s %s is very short: expected at least %s", variable, interval, shortest))
	}
}

// parseLogDrops parses EGRESS_LOG_DROPS. In mode init it loads the rules for a monitor,
// which would otherwise find drift.
func (c *Config) parseLogDrops(s string) *Error {
	fault := parseBool("EGRESS_LOG_DROPS", s, &c.LogDrops)
	switch {
	case !c.LogDrops || c.Mode.Stays():
	case c.Mode == Init:
		c.Warnings = append(c.Warnings, "EGRESS_LOG_DROPS=true logs nothing in mode init, which ends at once: a router in mode monitor with the same variables does")
	default:
		c.Warnings = append(c.Warnings, fmt.Sprintf("EGRESS_LOG_DROPS=true has no effect in mode %s", c.Mode))
	}
	return fault
}

// checkHealthPort checks that no destination has a port that the pod itself answers: of the
// health endpoint, and of heartbeats.
func (c *Config) checkHealthPort() *Error {
	for _, f := range c.ValidateHealthPort() {
		return &Error{"EGRESS_HEALTH_LISTEN", f.Why.In(Names{}), ""}
	}
	for _, f := range c.ValidateStandby() {
		return &Error{"EGRESS_STANDBY", f.Why.In(Names{}), ""}
	}
	return nil
}

// Reread returns c with the current destinations of the variable or the file. A
// router that stays calls it after the file has changed.
func (c Config) Reread(env Environment, readFile func(name string) ([]byte, error)) (Config, *Error) {
	c.Set, c.Warnings = rules.Set{}, nil
	reread := c.parseDestinations
	if c.Object {
		reread = c.rereadObject
	}
	if fault := reread(env, readFile); fault != nil {
		return Config{}, fault
	}
	if fault := c.checkHealthPort(); fault != nil {
		return Config{}, fault
	}
	return c, nil
}

// parseHealthListen parses the address of a health endpoint; empty: none.
func parseHealthListen(s string, set *netip.AddrPort) *Error {
	if s == "" {
		return nil
	}
	return parseListen("EGRESS_HEALTH_LISTEN", ":9465", s, set)
}

// parseListen accepts a listen address: an address and a port, or a port.
func parseListen(variable, example, s string, set *netip.AddrPort) *Error {
	at, err := netip.ParseAddrPort(s)
	if port, ok := strings.CutPrefix(s, ":"); ok {
		var n uint64
		n, err = strconv.ParseUint(port, 10, 16)
		at = netip.AddrPortFrom(netip.Addr{}, uint16(n))
	}
	if err != nil || at.Port() == 0 {
		hint := meantListen(s, example)
		if m := mistake(s); m != "" {
			hint = remedy("%s", m)
		}
		return &Error{variable, fmt.Sprintf("%s %s is not an address and a port: expected such as %s, 10.128.0.98%[3]s or [::1]%[3]s", variable, quote(s), example), hint}
	}
	*set = at
	return nil
}

// collide reports whether two listen addresses exclude each other.
func collide(a, b netip.AddrPort) bool {
	all := func(a, b netip.Addr) bool { // whether a includes b
		return !a.IsValid() || a == netip.IPv6Unspecified() || a == netip.IPv4Unspecified() && b.Is4()
	}
	return a.Port() == b.Port() && (a.Addr() == b.Addr() || all(a.Addr(), b.Addr()) || all(b.Addr(), a.Addr()))
}

// A Log is the format and level of log lines.
type Log struct {
	JSON  bool
	Level slog.Level
}

func (l *Log) parse(env LogEnvironment, report func(*Error)) {
	report(choose("EGRESS_LOG_FORMAT", orDefault(env.LogFormat, "text"), "text", "json"))
	l.JSON = env.LogFormat == "json"
	report(choose("EGRESS_LOG_LEVEL", orDefault(env.LogLevel, "info"), "debug", "info", "warn", "error"))
	levels := map[string]slog.Level{"debug": slog.LevelDebug, "": slog.LevelInfo, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
	l.Level = levels[env.LogLevel]
}
