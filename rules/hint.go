package rules

import (
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"

	"github.com/egress-router/egress-router/internal/wording"
)

// hint returns the probable cause of a parse error of a line. It checks the
// mistakes that users of the original made, the most specific first.
func hint(text string, names wording.Names) string {
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '\t':
			return "a tab is between fields: separate them with spaces"
		case c == '\r':
			return "the line ends with a carriage return (\\r): save the list with Unix line ends"
		case c < ' ' || c == 0x7f:
			return fmt.Sprintf("the line contains the control character %U: type the line again", rune(c))
		case c >= utf8.RuneSelf:
			r, _ := utf8.DecodeRuneInString(text[i:])
			return fmt.Sprintf("the line contains %U, which is not ASCII: type the line again with plain spaces and digits", r)
		}
	}
	if strings.Contains(text, "#") {
		return "a comment needs a line of its own, with # as its first character"
	}
	words := strings.Fields(text)
	for i, w := range words {
		words[i] = clip(w)
	}
	if several(words) {
		return `several destinations are on one line: write one a line (in YAML, "|" keeps line ends and ">" does not)`
	}
	if len(words) > 2 && strings.Contains(words[1], ",") && isDigits(words[0]) {
		return `a line has one protocol: "tcp" or "udp"`
	}
	if strings.ContainsAny(text, ",;") {
		return "fields are separated by spaces, destinations by line ends"
	}
	switch {
	case len(words) == 1:
		return addressHint(words[0], names)
	case len(words) == 2 && isDigits(words[0]):
		if _, ok := parseProtocol(words[1]); ok {
			return fmt.Sprintf(`the address is missing: write "%s %s IP"`, words[0], words[1])
		}
		return fmt.Sprintf(`the protocol is missing: write "%s tcp %s" or "%[1]s udp %[2]s"`, words[0], words[1])
	case len(words) == 3 || len(words) == 4:
		return redirectHint(words, names)
	}
	return forms
}

// clip limits a word of a hint. The sentence below it contains the whole line.
func clip(word string) string {
	const most = 60
	if len(word) <= most {
		return word
	}
	return word[:most] + "..."
}

const forms = `a line is "IP", "PORT PROTO IP" or "PORT PROTO IP PORT", for example "8080 tcp 203.0.113.26 80"`

// several reports whether words look like more than one destination.
func several(words []string) bool {
	addresses := 0
	for _, w := range words {
		if _, ok := ParseIPv4(w); ok {
			addresses++
		}
	}
	return addresses > 1
}

func redirectHint(words []string, names wording.Names) string {
	if !isDigits(words[0]) {
		return fmt.Sprintf("%q is not a port: the first field is one number from 1 to 65535", words[0])
	}
	if lower := strings.ToLower(words[1]); lower != words[1] {
		if _, ok := parseProtocol(lower); ok {
			return fmt.Sprintf("the protocol is written in lower case: %q", lower)
		}
	}
	if _, ok := parseProtocol(words[1]); !ok {
		return fmt.Sprintf(`%q is not a protocol that can be redirected: "tcp" and "udp" are`, words[1])
	}
	if ap, err := netip.ParseAddrPort(words[2]); err == nil && ap.Addr().Is4() && len(words) == 3 {
		return fmt.Sprintf(`the remote port is a field of its own: "%s %s %s %d"`, words[0], words[1], ap.Addr(), ap.Port())
	}
	if _, ok := ParseIPv4(words[2]); !ok {
		return addressHint(words[2], names)
	}
	if len(words) == 4 && !isDigits(words[3]) {
		return fmt.Sprintf("%q is not a port: the last field is one number from 1 to 65535", words[3])
	}
	return forms
}

// addressHint returns the reason why s is not an IPv4 address.
func addressHint(s string, names wording.Names) string {
	if ap, err := netip.ParseAddrPort(s); err == nil && ap.Addr().Is4() {
		return fmt.Sprintf(`the remote port is a field of its own: "PORT PROTO %s %d"`, ap.Addr(), ap.Port())
	}
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil && a.Is6() {
		return "IPv6 destinations are not supported: give an IPv4 address"
	}
	if _, err := netip.ParsePrefix(s); err == nil {
		return "a destination is one address, not a network"
	}
	if strings.Trim(s, "0123456789.") == "" {
		return fmt.Sprintf("%q is not an IPv4 address: four numbers from 0 to 255, without leading zeros", s)
	}
	if strings.HasPrefix(s, "[") || strings.Count(s, ":") > 1 {
		return "IPv6 destinations are not supported: give an IPv4 address"
	}
	return wording.Textf("%q is a name: redirects take an IPv4 address (%s serves names)", s, wording.Set(wording.Mode, "dns-proxy")).In(names)
}
