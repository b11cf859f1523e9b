package tcpproxy

import (
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"
)

const forms = `expected "PORT HOST" or "PORT HOST REMOTEPORT", for example "8443 www.example.com 443"`

// hint returns the probable fault of an invalid line, the most specific one first.
func hint(text string) string {
	for i := range len(text) {
		switch c := text[i]; {
		case c == '\t':
			return "fields are separated by a tab: use spaces"
		case c == '\r':
			return "the line ends with a carriage return (\\r): save the list with Unix line endings"
		case c >= utf8.RuneSelf:
			r, _ := utf8.DecodeRuneInString(text[i:])
			return fmt.Sprintf("the line contains %U, which is not ASCII: write an internationalized name in its ASCII form (xn--...)", r)
		}
	}
	words := strings.Fields(text)
	switch {
	case strings.Contains(text, "#"):
		return "a comment must be on its own line and begin with #"
	case strings.ContainsAny(text, ",;"):
		return "separate fields with spaces and destinations with newlines"
	case strings.Contains(text, "://"):
		return "a host has no scheme or path: " + forms
	case len(words) >= 3 && (words[1] == "tcp" || words[1] == "udp"):
		return "the DNS proxy is TCP only, its lines have no protocol: " + forms
	case len(words) > 3:
		return `several destinations on one line: write one per line (in YAML, "|" keeps newlines and ">" does not)`
	case len(words) == 1 && isHost(words[0]):
		return fmt.Sprintf(`the port is missing: write "443 %s"`, words[0])
	case len(words) < 2:
		return forms
	case !isDigits(words[0]):
		return fmt.Sprintf("%q is not a port: the first field must be a number from 1 to 65535", words[0])
	case !isHost(words[1]):
		return hostHint(words)
	case len(words) == 3 && !isDigits(words[2]):
		return fmt.Sprintf("%q is not a port: the last field must be a number from 1 to 65535", words[2])
	}
	return forms
}

// hostHint returns why the second field is no host.
func hostHint(words []string) string {
	s := words[1]
	host, port, colon := strings.Cut(s, ":")
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil && a.Is6() {
		return "IPv6 addresses are not supported: use an IPv4 address or a name"
	}
	switch {
	case colon && isHost(host) && isDigits(port) && len(words) == 2:
		return fmt.Sprintf(`the remote port is a separate field: "%s %s %s"`, words[0], host, port)
	case strings.Contains(s, "/"):
		return "a host has no prefix length or path: " + forms
	case strings.Trim(s, "0123456789.") == "":
		return fmt.Sprintf("%q is not an IPv4 address: expected four numbers from 0 to 255 without leading zeros", s)
	case !strings.Contains(strings.TrimSuffix(s, "."), "."):
		return fmt.Sprintf("%q has no dot: use the full name, such as %s.example.com", s, strings.TrimSuffix(s, "."))
	}
	return fmt.Sprintf("%q is not a domain name: expected labels of 1 to %d letters, digits, - and _, separated by dots, at most %d characters in all", s, maxLabel, maxName)
}
