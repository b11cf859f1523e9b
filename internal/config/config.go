package config

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/egress-router/egress-router/internal/spec"
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

// The defaults of the reply path. Marks and tables belong to the pod's network
// namespace, which CNI plugins and service meshes may use too. The mark is
// bit 12: kube-proxy has 14 and 15, the portmap plugin 13, Cilium 8 to 11, the
// AWS plugin 7, Calico 16 to 31, Istio 0 to 10. No plugin counts up to the table
// (from 100, as source-based routing does) or uses it (133 Istio, 2004 and 2005
// Cilium).
const (
	DefaultReplyMark  rules.Mark = 0x1000
	DefaultReplyTable int        = 4711
)

// A Config is the complete and valid configuration of a run.
type Config struct {
	Mode    Mode
	Sources spec.Sources
	Grammar rules.Grammar // of the destinations
	Set     rules.Set     // empty if the mode does not redirect
	Egress  string        // interface on the physical network
	Cluster string        // interface by which clients connect
	Macvlan *Macvlan      // nil: another program creates the egress interface
	Log     Log

	Conflict Conflict // what to do if another host has the reserved address
	Health   Health   // settings of a mode that stays

	Backend  Backend
	Crossing rules.Crossing // connections that cross from the cluster side
	Helpers  []rules.Helper // helpers of conntrack to attach

	ReplyMark           rules.Mark     // mark of connections from the cluster side
	ReplyTable          int            // routing table of their replies
	ClusterDestinations []netip.Prefix // other networks to reach by the cluster side

	// Warnings are about accepted but probably unintended input, one line each.
	Warnings []string
}

// Sides returns the input of a rule plan.
func (c Config) Sides() rules.Sides {
	sides := rules.Sides{Cluster: c.Cluster, Egress: c.Egress, Sources: c.Sources.Addresses(), Mark: c.ReplyMark, Crossing: c.Crossing, Helpers: c.Helpers}
	if c.Mode != UnitTest { // it prints the rules of the original
		sides.Health = rules.Port(c.Health.Listen.Port())
	}
	return sides
}

// Plan returns the rules of the mode.
func (c Config) Plan() rules.Plan {
	if c.Mode.Redirects() {
		plan := rules.NewPlan(c.Set, c.Sides())
		if c.Health.LogDrops {
			plan = plan.WithDropLog()
		}
		return plan
	}
	return rules.NewProxyPlan(c.Sides())
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
	c := Config{
		Mode:    Mode(orDefault(env.Mode, string(Legacy))),
		Egress:  orDefault(env.Interface, DefaultInterface),
		Cluster: orDefault(env.ClusterInterface, DefaultClusterInterface),
	}
	var faults Errors
	report := func(e *Error) {
		if e != nil {
			faults = append(faults, e)
		}
	}

	unknown := unknownVariables(env.Names, Variables())
	grammar := c.parseGrammar(env.Grammar)
	inSource, inGateway := c.parseSides(env.Source, env.Gateway)
	report(inSource)
	report(inGateway)
	if c.Grammar == rules.Extended && !c.Mode.Redirects() && slices.Contains(Modes, c.Mode) && len(c.Sources) == 1 && c.Sources[0].Prefix.Addr().Is4() {
		c.Warnings = append(c.Warnings, fmt.Sprintf("EGRESS_GRAMMAR=extended has no effect in mode %s: nothing is redirected", c.Mode))
	}
	switch {
	case !slices.Contains(Modes, c.Mode):
		report(&Error{"EGRESS_ROUTER_MODE", fmt.Sprintf("Unrecognized EGRESS_ROUTER_MODE '%s'", c.Mode), modeHint(env.Mode)})
	case c.Mode.Redirects() && grammar == nil:
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
	c.parseHealth(env, report)
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
		n, err := parseLength(length, bits)
		if err != nil {
			return bad(fmt.Sprintf("EGRESS_SOURCE is %s: the length after the slash is a number from 0 to 32", quote(s)))
		}
		bits = n
	}
	source := netip.PrefixFrom(a, bits)
	if why := unusable(a, source); why != "" && c.Mode != UnitTest {
		return bad(fmt.Sprintf("EGRESS_SOURCE is %q: %s cannot be the source of connections", s, why))
	}
	c.Sources = spec.Sources{{Prefix: source}}
	return nil
}

// parseLength parses the length of a subnet, in bits.
func parseLength(s string, most int) (int, error) {
	n, err := strconv.Atoi(s)
	if err == nil && (n < 0 || n > most || strconv.Itoa(n) != s) {
		err = strconv.ErrRange
	}
	return n, err
}

// source returns the first source; the zero one after an error.
func (c *Config) source() spec.Source {
	if len(c.Sources) == 0 {
		return spec.Source{}
	}
	return c.Sources[0]
}

func (c *Config) parseGateway(s string) *Error {
	bad := func(hint string) *Error {
		return &Error{"EGRESS_GATEWAY", "EGRESS_GATEWAY unspecified or invalid", "hint: " + hint}
	}
	a, ok := rules.ParseIPv4(s)
	if !ok {
		return bad(addressHint("EGRESS_GATEWAY", s, "the address of the physical network's gateway, for example 192.168.12.1"))
	}
	if source := c.source().Prefix; c.Mode != UnitTest {
		if why := unusable(a, source); why != "" {
			return bad(fmt.Sprintf("EGRESS_GATEWAY is %q: %s cannot be a gateway", s, why))
		}
		if a == source.Addr() {
			return bad(fmt.Sprintf("EGRESS_GATEWAY is %q, the same as EGRESS_SOURCE: the gateway is another host", s))
		}
		// Legal, because the router adds a /32 route to the gateway, and probably a mistake.
		if source.IsValid() && !source.IsSingleIP() && !source.Contains(a) {
			c.Warnings = append(c.Warnings, fmt.Sprintf("EGRESS_GATEWAY %s is outside of the subnet of EGRESS_SOURCE, %s: check both, and the length", a, source.Masked()))
		}
	}
	for i := range c.Sources {
		c.Sources[i].Gateway = a
	}
	return nil
}

// last returns the last address of an IPv4 network, its broadcast address
// (RFC 919).
func last(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	n := binary.BigEndian.Uint32(a[:]) | uint32(1<<(32-p.Bits())-1)
	binary.BigEndian.PutUint32(a[:], n)
	return netip.AddrFrom4(a)
}

// unusable returns the reason why no host of the physical network can have an
// address (RFC 6890; RFC 1122, 3.2.1.3); empty: none. A subnet of 31 or 32 bits has
// neither network nor broadcast address (RFC 3021). The original accepted such
// addresses and failed half-way, or never sent a packet. Like the original,
// unit-test does not check.
func unusable(a netip.Addr, subnet netip.Prefix) string {
	switch {
	case a.IsUnspecified():
		return "the unspecified address"
	case a.Is4() && a.As4()[0] == 0:
		return "an address of 0.0.0.0/8"
	case a.IsLoopback():
		return "a loopback address"
	case a.IsMulticast():
		return "a multicast address"
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "the broadcast address"
	case a.Is6() || subnet.Bits() >= 31 || !subnet.Contains(a):
		return ""
	case a == subnet.Masked().Addr():
		return "the network address of " + subnet.Masked().String()
	case a == last(subnet):
		return "the broadcast address of " + subnet.Masked().String()
	}
	return ""
}

// Unusable returns why no external server has an address, empty if one may have it.
func (c Config) Unusable(a netip.Addr) string {
	if c.Sources.Have(a) {
		return "the reserved address"
	}
	if a.Is6() && a.IsLinkLocalUnicast() {
		return "a link-local address"
	}
	for _, s := range c.Sources {
		if why := unusable(a, s.Prefix); why != "" {
			return why
		}
	}
	return ""
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
	var unreachable []string
	warning, fault := l.read(readFile, func(text string) (err error) {
		if c.Set, err = c.Grammar.Parse(text, Names{}); err == nil {
			err = c.checkFamilies(text)
		}
		if err == nil {
			unreachable = c.unreachable(l, text)
		}
		return err
	})
	if fault != nil {
		return fault
	}
	if warning != "" {
		c.Warnings = append(c.Warnings, warning)
	}
	c.Warnings = append(c.Warnings, unreachable...)
	if len(c.Set.Redirects) == 0 && !c.Set.Fallback.IsValid() {
		c.Warnings = append(c.Warnings, l.from()+" contains no destination: nothing is redirected")
	}
	return nil
}

// checkFamilies returns an error if the family of a destination has no source.
func (c *Config) checkFamilies(text string) error {
	sides := c.Sides()
	if !slices.ContainsFunc(sides.Sources, netip.Addr.IsValid) {
		return nil // for another error
	}
	for _, f := range c.Set.Families() {
		if len(sides.SourcesOf(f)) > 0 {
			continue
		}
		for i, a := range c.numbered() {
			if rules.FamilyOf(a) == f {
				line := c.Grammar.Entries(text)[i]
				return &rules.ParseError{Line: line, Sentence: fmt.Sprintf("EGRESS_DESTINATION value '%s' is for %s, and EGRESS_SOURCE has no %[2]s address", line.Text, f),
					Hint: "connections leave with a source of the same family: remove the line, or reserve an address for them"}
			}
		}
	}
	return nil
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

// mostUnreachable is the number of unreachable destinations with a warning each. A
// list may have thousands.
const mostUnreachable = 10

// unreachable returns a warning for each line of a valid list to an address that no
// external server has. The original accepted them.
func (c *Config) unreachable(l list, text string) (warnings []string) {
	more := 0
	var entries []rules.Line // only needed for a warning
	for i, a := range c.numbered() {
		why := "connections redirected to it fail"
		is := c.unusableDestination(a)
		if c.Sources.Have(a) {
			is, why = "the reserved address", "connections redirected to it end in the pod"
		}
		if is == "" {
			continue
		}
		if len(warnings) == mostUnreachable {
			more++
			continue
		}
		if entries == nil {
			entries = c.Grammar.Entries(text)
		}
		warnings = append(warnings, fmt.Sprintf("%s: %s is %s: %s", l.place(entries[i].Number), a, is, why))
	}
	if more > 0 {
		warnings = append(warnings, fmt.Sprintf("%s has %d more destinations of that kind", l.from(), more))
	}
	return warnings
}

// unusableDestination is unusable for a destination of either family.
func (c *Config) unusableDestination(a netip.Addr) string {
	if a.Is6() {
		return unusableSource(netip.PrefixFrom(a, a.BitLen()))
	}
	for _, s := range c.Sources.Of(false) {
		if is := unusable(a, s.Prefix); is != "" {
			return is
		}
	}
	return unusable(a, netip.Prefix{})
}

// loopback is the kernel's name of the loopback interface (drivers/net/loopback.c).
const loopback = "lo"

// checkInterface accepts the kernel's interface names (dev_valid_name in
// net/core/dev.c: 1 to 15 bytes, no slash, colon or white space) that are literal in
// a rule: for iptables, + at the end of a name is a pattern and ! a negation, and
// restore input has its own quoting.
func checkInterface(variable, name string) *Error {
	bad := func(why string) *Error {
		return &Error{variable, fmt.Sprintf("%s %s is not an interface name: %s", variable, quote(name), why), ""}
	}
	switch {
	case name == loopback && variable != "EGRESS_MACVLAN_PARENT": // which names the usable NICs
		return &Error{variable, fmt.Sprintf("%s %q is the loopback interface: expected one that leads to a network", variable, name), ""}
	case len(name) > 15:
		return bad("it has more than 15 bytes")
	case name == "." || name == "..":
		return bad("the kernel does not allow it")
	case strings.HasPrefix(name, "-") || strings.HasPrefix(name, "!"):
		return bad("it begins with " + name[:1])
	}
	for _, r := range name {
		if r <= ' ' || r > '~' || strings.ContainsRune(`/:+"'\`+"`", r) {
			return bad(fmt.Sprintf("it contains %q", r))
		}
	}
	return nil
}
