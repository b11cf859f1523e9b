package tcpproxy

import (
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"
)

const forms = `a line is "PORT HOST" or "PORT HOST REMOTEPORT", for example "8443 www.example.com 443"`

// hint says what is probably wrong with a line that the grammar refuses, most
// telling first.
func hint(text string) string {
	for i := range len(text) {
		switch c := text[i]; {
		case c == '\t':
			return "a tab stands between fields: separate them with spaces"
		case c == '\r':
			return "the line ends with a carriage return (\\r): save the list with Unix line ends"
		case c >= utf8.RuneSelf:
			r, _ := utf8.DecodeRuneInString(text[i:])
			return fmt.Sprintf("the line holds %U, which is not ASCII: a name of other letters is written in its ASCII form (xn--...)", r)
		}
	}
	words := strings.Fields(text)
	switch {
	case strings.Contains(text, "#"):
		return "a comment stands on a line of its own, with # as its first character"
	case strings.ContainsAny(text, ",;"):
		return "fields are separated by spaces, destinations by line ends"
	case strings.Contains(text, "://"):
		return "a host has no scheme and no path: " + forms
	case len(words) >= 3 && (words[1] == "tcp" || words[1] == "udp"):
		return "this proxy is for TCP only and its lines name no protocol: " + forms
	case len(words) > 3:
		return `several destinations stand on one line: write one a line (in YAML, "|" keeps line ends and ">" does not)`
	case len(words) == 1 && isHost(words[0]):
		return fmt.Sprintf(`the port is missing: write "443 %s"`, words[0])
	case len(words) < 2:
		return forms
	case !isDigits(words[0]):
		return fmt.Sprintf("%q is not a port: the first field is one number from 1 to 65535", words[0])
	case !isHost(words[1]):
		return hostHint(words)
	case len(words) == 3 && !isDigits(words[2]):
		return fmt.Sprintf("%q is not a port: the last field is one number from 1 to 65535", words[2])
	}
	return forms
}

// hostHint says why the second field is no host.
func hostHint(words []string) string {
	s := words[1]
	host, port, colon := strings.Cut(s, ":")
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil && a.Is6() {
		return "IPv6 addresses are not supported: give an IPv4 address or a name"
	}
	switch {
	case colon && isHost(host) && isDigits(port) && len(words) == 2:
		return fmt.Sprintf(`the remote port is a field of its own: "%s %s %s"`, words[0], host, port)
	case strings.Contains(s, "/"):
		return "a host has no length and no path: " + forms
	case strings.Trim(s, "0123456789.") == "":
		return fmt.Sprintf("%q is not an IPv4 address: four numbers from 0 to 255, without leading zeros", s)
	case !strings.Contains(strings.TrimSuffix(s, "."), "."):
		return fmt.Sprintf("%q has no dot: give the whole name, such as %s.example.com", s, strings.TrimSuffix(s, "."))
	}
	return fmt.Sprintf("%q is not a domain name: labels of 1 to %d letters, digits, - and _, separated by dots, %d characters in all", s, maxLabel, maxName)
}
