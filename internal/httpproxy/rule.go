package httpproxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// A Rule allows or denies what it matches. Exactly one of Network, Name and Any
// is set.
type Rule struct {
	Number  int          // counts the rules, from 1
	Deny    bool         // the line began with !
	Network netip.Prefix // matches the addresses in it
	Name    string       // matches this host; lower case, no dot at its end
	Below   bool         // and all below it: the line began with *.
	Any     bool         // matches everything; the last rule, and never a Deny

	written string // without the !
}

// String returns the rule as it was written.
func (r Rule) String() string {
	if r.Deny {
		return "!" + r.written
	}
	return r.written
}

// Rules are what one list says, in its order. The first rule that matches
// decides, and what none matches is denied.
type Rules []Rule

// Equal reports whether both lists are written the same, comments aside.
func (r Rules) Equal(other Rules) bool { return slices.Equal(r, other) }

// Squid returns the rules in the notation in which the original hands them to
// squid, byte for byte as it prints them in its unit-test mode.
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

// MaxHostLength is how many bytes a host's name may have (RFC 1035 section
// 2.3.4, without the final dot).
const MaxHostLength = 253

// Parse reads a list of rules, one a line, which are split as the shell's read
// splits them. The first line that is not right ends it with a *rules.ParseError. A
// list of comments and blank lines holds no rule and denies everything.
func Parse(value string) (Rules, error) {
	if value == "" {
		return nil, &rules.ParseError{Sentence: "No EGRESS_HTTP_PROXY_DESTINATION specified",
			Hint: `write one rule per line, for example "*.example.com"; a line "*" allows everything`}
	}
	var list Rules
	wildcard := false
	for _, line := range rules.Lines(value) {
		text := line.Text
		switch {
		case isBlank(text) || text[0] == '#':
			continue
		case text == "*": // also a second time, as with the original
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

// isBlank reports whether s holds white space only, as [[:space:]] of the
// POSIX locale has it.
func isBlank(s string) bool { return strings.Trim(s, " \t\n\v\f\r") == "" }

// parseRule reads a rule without its exclamation mark, and not the wildcard.
func parseRule(s string) (Rule, bool) {
	if network, ok := parseNetwork(s); ok {
		return Rule{Network: network, written: s}, true
	}
	name, below := strings.CutPrefix(s, "*.")
	name, ok := parseName(name)
	// The original takes letters, digits, hyphens and dots only.
	if !ok || strings.Contains(name, "_") {
		return Rule{}, false
	}
	return Rule{Name: name, Below: below, written: s}, true
}

// parseNetwork accepts an address, or one with a length. As with squid, bits
// beyond the length do not count, and an IPv4 address in IPv6 clothes (RFC 4291
// section 2.5.5.2) is that IPv4 address.
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

// parseName accepts the name of a host and returns it in lower case, without a
// final dot. Labels are of letters, digits, hyphens and underscores, the last
// of which names out there have although RFC 1123 section 2.1 does not. One
// whose last label is a number is none: to some programs it is an IPv4 address
// in an old notation (inet_aton(3): 127.1, 0x7f000001).
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

// isNumber reports whether inet_aton(3) takes s, in lower case, for a number.
func isNumber(s string) bool {
	if hex, ok := strings.CutPrefix(s, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return strings.Trim(s, "0123456789") == ""
}

// ruleHint says what is probably wrong with a line.
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
