package httpproxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// A Rule allows or denies the destinations that it matches. Exactly one of Network,
// Name and Any is set.
type Rule struct {
	Number  int          // position in the list, from 1
	Deny    bool         // the line began with !
	Network netip.Prefix // matches the addresses in it
	Name    string       // matches this host; lower case, no dot at its end
	Below   bool         // matches also all hosts below Name; the line began with *.
	Any     bool         // matches every destination; only the last rule, never with Deny

	written string // without the !
}

// String returns the rule as written in the list.
func (r Rule) String() string {
	if r.Deny {
		return "!" + r.written
	}
	return r.written
}

// Rules are the rules of a list in their order. The first rule that matches decides; a
// destination without a match is denied.
type Rules []Rule

// Equal reports whether both lists have the same rules as written.
func (r Rules) Equal(other Rules) bool { return slices.Equal(r, other) }

// Squid returns the rules in squid's notation, byte for byte as the original prints
// them in its unit-test mode.
func (r Rules) Squid() string {
	var b strings.Builder
	last := "deny"
	for _, rule := range r {
		if rule.Any {
			last = "allow"
			continue
		}
		kind, value, access := "dstdomain", rule.written, "allow"
		if rule.Network.IsValid() {
			kind = "dst"
		}
		if rule.Below {
			value = strings.TrimPrefix(value, "*")
		}
		if rule.Deny {
			access = "deny"
		}
		fmt.Fprintf(&b, "\nacl dest%d %s %s\nhttp_access %s dest%[1]d\n", rule.Number, kind, value, access)
	}
	fmt.Fprintf(&b, "\nhttp_access %s all\n", last)
	return b.String()
}

// MaxHostLength is the length limit of a host's name in bytes, without the final dot
// (RFC 1035 section 2.3.4).
const MaxHostLength = 253

// Parse parses a list of rules, one per line, with lines as of the shell's read. The
// first invalid line ends the parse with a *rules.ParseError. A list of comments and
// blank lines has no rule and denies every destination.
func Parse(value string) (Rules, error) {
	var list Rules
	wildcard := false
	for _, line := range rules.Lines(value) {
		text := line.Text
		switch {
		case isBlank(text) || text[0] == '#':
			continue
		case text == "*": // also a second time, as in the original
			if !wildcard {
				list = append(list, Rule{Number: len(list) + 1, Any: true, written: text})
			}
			wildcard = true
			continue
		case wildcard:
			return nil, &rules.ParseError{Line: line, Sentence: "Wildcard must be last rule, if present",
				Hint: `the first rule that matches decides, and "*" matches everything: move it to the end`}
		}
		written, deny := strings.CutPrefix(text, "!")
		rule, ok := parseRule(written)
		if !ok {
			return nil, &rules.ParseError{Line: line, Sentence: fmt.Sprintf("Bad destination '%s'", written), Hint: ruleHint(text)}
		}
		rule.Number, rule.Deny = len(list)+1, deny
		list = append(list, rule)
	}
	return list, nil
}

// isBlank reports whether s contains only white space, [[:space:]] of the POSIX locale.
func isBlank(s string) bool { return strings.Trim(s, " \t\n\v\f\r") == "" }

// parseRule parses a rule without its exclamation mark, other than the wildcard.
func parseRule(s string) (Rule, bool) {
	if network, ok := parseNetwork(s); ok {
		return Rule{Network: network, written: s}, true
	}
	name, below := strings.CutPrefix(s, "*.")
	name, ok := parseName(name)
	// The original accepts letters, digits, hyphens and dots only.
	if !ok || strings.Contains(name, "_") {
		return Rule{}, false
	}
	return Rule{Name: name, Below: below, written: s}, true
}

// parseNetwork parses an address or a prefix. As in squid, bits beyond the prefix
// length are ignored, and an IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2) is
// the IPv4 address.
func parseNetwork(s string) (netip.Prefix, bool) {
	a, err := netip.ParseAddr(s)
	if err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, false
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), true
}

// parseName parses the name of a host and returns it in lower case, without a final
// dot. Labels consist of letters, digits, hyphens and underscores, which existing names
// contain in spite of RFC 1123 section 2.1. A name whose last label is a number is
// invalid: some programs take it for an IPv4 address in an old notation (inet_aton(3):
// 127.1, 0x7f000001).
func parseName(s string) (string, bool) {
	s = strings.TrimSuffix(strings.ToLower(s), ".")
	if s == "" || len(s) > MaxHostLength || s[0] == '-' {
		return "", false
	}
	last := ""
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 {
			return "", false
		}
		for i := range len(label) {
			c := label[i]
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return "", false
			}
		}
		last = label
	}
	return s, !isNumber(last)
}

// isNumber reports whether s, in lower case, is a number for inet_aton(3).
func isNumber(s string) bool {
	if hex, ok := strings.CutPrefix(s, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return strings.Trim(s, "0123456789") == ""
}

// ruleHint returns the probable fault of an invalid line.
func ruleHint(text string) string {
	s := strings.TrimPrefix(text, "!")
	switch {
	case s == "*":
		return `everything that no rule allows is denied: remove "!*"`
	case strings.HasSuffix(s, "\r"):
		return "the line ends with a carriage return (\\r): save the list with Unix line endings"
	case strings.Contains(s, "://"):
		return "a rule has no scheme, port or path: write the host alone"
	case strings.Contains(s, "#"):
		return "a comment must be on its own line and begin with #"
	case strings.ContainsAny(s, " \t,;"):
		return "write one rule per line, without blanks"
	case strings.Trim(s, "0123456789./") == "":
		return "expected an IPv4 address of four numbers from 0 to 255 without leading zeros, optionally followed by a prefix length from 0 to 32"
	case strings.Contains(s, "/"):
		return "a network is an address, a slash and a prefix length, such as 192.168.1.0/24 or 2001:db8::/32; names have no slash"
	case strings.HasPrefix(s, "."):
		return fmt.Sprintf("to match the host and everything below it, write *%s", s)
	case strings.Contains(s, "*"):
		return `"*" is valid only alone or as *. before a name`
	case strings.ContainsFunc(s, func(r rune) bool { return r > '~' }):
		return "write an internationalized name in its ASCII form (xn--...)"
	case strings.Contains(s, ":"):
		return "a rule matches every port: write the host alone"
	}
	return `expected IP, IP/LENGTH, NAME, *.NAME or *; all but the last may begin with !`
}
