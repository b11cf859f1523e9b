package config

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// A Mode selects what a run of the router does.
type Mode string

// The modes, by the values of EGRESS_ROUTER_MODE.
const (
	Legacy    Mode = "legacy"     // configure network and rules, then repair drift
	Init      Mode = "init"       // configure network and rules, then exit
	Monitor   Mode = "monitor"    // repair drift of an init run
	HTTPProxy Mode = "http-proxy" // configure the network only
	DNSProxy  Mode = "dns-proxy"  // configure the network only
	UnitTest  Mode = "unit-test"  // print the rules, change nothing
)

// Modes lists every mode.
var Modes = []Mode{Init, Legacy, Monitor, HTTPProxy, DNSProxy, UnitTest}

// Redirects reports whether the mode reads destinations and redirects to them.
func (m Mode) Redirects() bool { return m == Init || m == UnitTest || m.Stays() }

// Stays reports whether the mode keeps running, to repair drift.
func (m Mode) Stays() bool { return m == Legacy || m == Monitor }

// The defaults of the interface names are those of the original.
const (
	DefaultInterface        = "macvlan0"
	DefaultClusterInterface = "eth0"
)

// A Config is the complete and valid configuration of a run.
type Config struct {
	spec.Router
	Mode    Mode
	Grammar rules.Grammar // of the destinations
	Log     Log
	Health  Health // settings of a mode that stays
	Peers   Peers  // of a router that stands by
	Backend Backend
	Object  bool // the addresses and the destinations are those of an object

	// Warnings are about accepted but probably unintended input, one line each.
	Warnings []string
}

// An Error is an invalid variable.
type Error struct {
	Variable string
	Sentence string // the original's sentence, if it had one
	Hint     string // place and advice; may be empty; may have several lines
}

// Error returns the hint, if any, and the sentence below it.
func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Sentence
	}
	return e.Hint + "\n" + e.Sentence
}

// Line returns the sentence and the hint on one line, for a log or a status.
func (e *Error) Line() string {
	if e.Hint == "" {
		return e.Sentence
	}
	return e.Sentence + " (" + e.Advice() + ")"
}

// Advice returns the hint on one line without its prefix, for a log attribute.
func (e *Error) Advice() string {
	place, advice, both := strings.Cut(e.Hint, "\nhint: ")
	if both {
		place += ": " + advice
	}
	return strings.ReplaceAll(strings.TrimPrefix(place, "hint: "), "\n", "; ")
}

// Errors are all errors of an environment, in the order of the original's checks,
// followed by those of variables that the original does not have.
type Errors []*Error

// Error returns the errors in reverse order, because users of the original look at
// the last line, which is then the original's sentence.
func (e Errors) Error() string {
	lines := make([]string, 0, len(e))
	for _, fault := range slices.Backward(e) {
		lines = append(lines, fault.Error())
	}
	return strings.Join(lines, "\n")
}

// with adds warnings as hints, in front of all errors: a misspelt variable may be
// the reason of another one that is unset.
func (e Errors) with(warnings []string) Errors {
	for _, w := range slices.Backward(warnings) {
		e = append(e, &Error{Sentence: "hint: " + w})
	}
	return e
}

// quote quotes a value for a message, of which a long one would fill the log.
func quote(value string) string { return strconv.Quote(shorten(value)) }

// MaxDestinationFile is the largest size of a destination file, in bytes. A
// ConfigMap has at most 1 MiB (Kubernetes API, ConfigMap); other sources may be
// larger.
const MaxDestinationFile = 16 << 20

// Parse validates env and returns its configuration. readFile returns the content
// of EGRESS_DESTINATION_FILE; it is called at most once. The error is an Errors with
// every invalid variable.
func Parse(env Environment, readFile func(name string) ([]byte, error)) (Config, error) {
	c := Config{Mode: Mode(orDefault(env.Mode, string(Legacy)))}
	c.Egress = orDefault(env.Interface, DefaultInterface)
	c.Cluster = orDefault(env.ClusterInterface, DefaultClusterInterface)
	c.Forward = c.Mode.Redirects()
	var faults Errors
	report := func(e *Error) {
		if e != nil {
			faults = append(faults, e)
		}
	}

	unknown := unknownVariables(env.Names, Variables())
	grammar := c.parseGrammar(env.Grammar)
	known := slices.Contains(Modes, c.Mode)
	if c.Object = env.ConfigFile != ""; c.Object {
		faults = append(faults, c.parseObject(env, readFile)...)
	} else {
		inSource, inGateway := c.parseSides(env.Source, env.Gateway)
		report(inSource)
		report(inGateway)
		if c.Grammar == rules.Extended && !c.Mode.Redirects() && known && len(c.Sources) == 1 && c.Sources[0].Prefix.Addr().Is4() {
			c.Warnings = append(c.Warnings, fmt.Sprintf("EGRESS_GRAMMAR=extended has no effect in mode %s: nothing is redirected", c.Mode))
		}
	}
	switch {
	case !known:
		report(&Error{"EGRESS_ROUTER_MODE", fmt.Sprintf("Unrecognized EGRESS_ROUTER_MODE '%s'", c.Mode), modeHint(env.Mode)})
	case c.Mode.Redirects() && grammar == nil && !c.Object:
		report(c.parseDestinations(env, readFile))
	}
	report(grammar)
	report(c.parseBackend(env.Backend))
	report(c.parseForward(env.Forward))
	report(c.parseHelpers(env.Helpers))
	faults = append(faults, c.parseReply(env)...)
	faults = append(faults, c.parseClusterCIDRs(env.ClusterCIDRs)...)
	report(checkInterface("EGRESS_INTERFACE", c.Egress))
	report(checkInterface("EGRESS_CLUSTER_INTERFACE", c.Cluster))
	if c.Egress == c.Cluster {
		report(&Error{"EGRESS_CLUSTER_INTERFACE", fmt.Sprintf("EGRESS_INTERFACE and EGRESS_CLUSTER_INTERFACE are both %s", quote(c.Egress)),
			"hint: the cluster side and the egress side need an interface each"})
	}
	for _, e := range c.parseMacvlan(env) {
		report(e)
	}
	c.parseHealth(env, readFile, report)
	report(c.parseFlowtable(env.Flowtable))
	c.Log.parse(env.LogEnvironment, report)
	if env.Debug != "" {
		c.Log.Level = slog.LevelDebug
	}
	c.Warnings = append(c.Warnings, debugWarning("EGRESS_ROUTER_DEBUG", env.Debug)...)
	if len(faults) > 0 {
		faults.explain(env)
		return Config{}, faults.with(unknown)
	}
	c.Warnings = append(unknown, c.Warnings...)
	return c, nil
}

func orDefault(value, unset string) string {
	if value == "" {
		return unset
	}
	return value
}

// modeHint returns the modes, and the one that a value probably means.
func modeHint(value string) string {
	var names []string
	for _, m := range Modes {
		names = append(names, string(m))
	}
	hint := "the modes are " + strings.Join(names, ", ")
	if write := meant(value, names...); write != "" {
		return write + "; " + hint
	}
	return remedy("%s", hint)
}

func (c *Config) parseSource(s string) *Error {
	bad := func(hint string) *Error {
		return &Error{"EGRESS_SOURCE", "EGRESS_SOURCE unspecified or invalid", "hint: " + hint}
	}
	address, length, given := strings.Cut(s, "/")
	a, ok := rules.ParseIPv4(address)
	if !ok || strings.ContainsFunc(s, unicode.IsSpace) {
		return bad(addressHint("EGRESS_SOURCE", s, "the reserved address, for example 192.168.12.99/24"))
	}
	bits := a.BitLen()
	if given {
		var why string
		if bits, why = spec.ParseLength(length, bits); why != "" {
			return bad(fmt.Sprintf("EGRESS_SOURCE is %s: %s", quote(s), why))
		}
	}
	c.Sources = spec.Sources{{Prefix: netip.PrefixFrom(a, bits)}}
	return nil
}

func (c *Config) parseGateway(s string) *Error {
	bad := func(hint string) *Error {
		return &Error{"EGRESS_GATEWAY", "EGRESS_GATEWAY unspecified or invalid", "hint: " + hint}
	}
	a, ok := rules.ParseIPv4(s)
	if !ok {
		return bad(addressHint("EGRESS_GATEWAY", s, "the address of the physical network's gateway, for example 192.168.12.1"))
	}
	for i := range c.Sources {
		c.Sources[i].Gateway = a
	}
	return nil
}

// addressHint returns the reason why value is not the IPv4 address of variable.
func addressHint(variable, value, expected string) string {
	found := fmt.Sprintf("%s is %s: ", variable, quote(value))
	m := mistake(value)
	switch {
	case value == "":
		return fmt.Sprintf("%s is not set: set it to %s", variable, expected)
	case m != "" && strings.TrimSpace(value) == value:
		return found + m
	case strings.ContainsFunc(value, unicode.IsSpace):
		return found + "white space is not allowed in it"
	case strings.Contains(value, ":"):
		return found + "IPv6 is not supported, give " + expected
	case variable == "EGRESS_GATEWAY" && strings.Contains(value, "/"):
		return found + "the gateway is one address, without a length"
	case strings.Trim(value, "0123456789./") == "":
		return found + "an IPv4 address is four numbers from 0 to 255, without leading zeros"
	}
	return found + "expected " + expected
}

// parseDestinations reads the destination list from the variable or the file.
func (c *Config) parseDestinations(env Environment, readFile func(string) ([]byte, error)) *Error {
	l := list{"EGRESS_DESTINATION", env.Destination, env.DestinationFile,
		rules.ParseError{Sentence: "EGRESS_DESTINATION unspecified", Hint: `set EGRESS_DESTINATION to one line for each destination, for example "80 tcp 203.0.113.25"`}}
	var suspects []string
	warning, fault := l.read(readFile, func(text string) (err error) {
		if c.Set, err = c.Grammar.Parse(text, Names{}); err == nil {
			suspects, err = c.checkDestinations(l, text)
		}
		return err
	})
	if fault != nil {
		return fault
	}
	if warning != "" {
		c.Warnings = append(c.Warnings, warning)
	}
	c.Warnings = append(c.Warnings, suspects...)
	if len(c.Set.Redirects) == 0 && !c.Set.Fallback.IsValid() {
		c.Warnings = append(c.Warnings, l.from()+" contains no destination: nothing is redirected")
	}
	return nil
}

// mostSuspects is the number of warnings about destinations. A list may have thousands.
const mostSuspects = 10

// checkDestinations returns the first fault of a list, or the warnings about it.
func (c *Config) checkDestinations(l list, text string) (warnings []string, err error) {
	more := 0
	var entries []rules.Line // only needed for a message
	for _, f := range c.ValidateDestinations() {
		if f.Field != wording.Destinations {
			continue
		}
		if entries == nil {
			entries = c.Grammar.Entries(text)
		}
		line := entries[f.Index]
		switch {
		case !f.Warning:
			return nil, &rules.ParseError{Line: line, Sentence: fmt.Sprintf("EGRESS_DESTINATION value '%s' %s", line.Text, strings.TrimPrefix(f.Why.In(Names{}), "it ")), Hint: f.Hint.In(Names{})}
		case len(warnings) == mostSuspects:
			more++
		default:
			warnings = append(warnings, fmt.Sprintf("%s: %s", l.place(line.Number), f.Why.In(Names{})))
		}
	}
	if more > 0 {
		warnings = append(warnings, fmt.Sprintf("%s has %d more destinations of that kind", l.from(), more))
	}
	return warnings, nil
}

// grammars are the values of EGRESS_GRAMMAR.
var grammars = map[string]rules.Grammar{"legacy": rules.Legacy, "extended": rules.Extended}

// parseGrammar parses the form of the destinations.
func (c *Config) parseGrammar(s string) *Error {
	var known bool
	if c.Grammar, known = grammars[orDefault(s, "legacy")]; !known {
		return choose("EGRESS_GRAMMAR", s, "legacy", "extended")
	}
	return nil
}

// checkInterface accepts the name of an interface that leads to a network.
func checkInterface(variable, name string) *Error {
	if name == spec.Loopback && variable != "EGRESS_MACVLAN_PARENT" { // which names the usable NICs
		return &Error{variable, fmt.Sprintf("%s %q is the loopback interface: expected one that leads to a network", variable, name), ""}
	}
	if why := spec.FaultOfInterface(name); why != "" {
		return &Error{variable, fmt.Sprintf("%s %s is not an interface name: %s", variable, quote(name), why), ""}
	}
	return nil
}
