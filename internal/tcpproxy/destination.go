package tcpproxy

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// A Destination is the target of the connections to one port.
type Destination struct {
	Port   rules.Port // to listen on
	Host   string     // as written: an IPv4 address or a domain name
	ToPort rules.Port // at Host
}

// Target returns the host and port to connect to.
func (d Destination) Target() string {
	return net.JoinHostPort(d.Host, strconv.Itoa(int(d.ToPort)))
}

// String returns the destination as a line of the grammar.
func (d Destination) String() string {
	s := fmt.Sprintf("%d %s", d.Port, d.Host)
	if d.ToPort != d.Port {
		s += fmt.Sprintf(" %d", d.ToPort)
	}
	return s
}

// Parse parses a destination list: lines "PORT HOST" or "PORT HOST REMOTEPORT", which are
// split as those of the router's list. The first invalid line ends the parse with a
// *rules.ParseError, whose text is the sentence of the original. A list of comments and
// blank lines is valid and has no destination.
func Parse(value string) ([]Destination, error) {
	var list []Destination
	seen := map[rules.Port]int{} // port -> line
	for _, line := range rules.Lines(value) {
		if isBlank(line.Text) || line.Text[0] == '#' {
			continue
		}
		words := strings.FieldsFunc(line.Text, func(r rune) bool { return r == ' ' })
		if !wellFormed(line.Text, words) {
			return nil, &rules.ParseError{Line: line, Sentence: fmt.Sprintf("Bad destination '%s'", line.Text), Hint: hint(line.Text)}
		}
		d := Destination{Host: words[1]}
		var ok bool
		if d.Port, ok = parsePort(words[0]); !ok {
			return nil, badPort(line, words[0])
		}
		d.ToPort = d.Port
		if len(words) == 3 {
			if d.ToPort, ok = parsePort(words[2]); !ok {
				return nil, badPort(line, words[2])
			}
		}
		if first := seen[d.Port]; first != 0 {
			return nil, &rules.ParseError{Line: line,
				Sentence: fmt.Sprintf("Proxy port %d already used, must be unique for each destination", d.Port),
				Hint:     fmt.Sprintf("line %d uses it first", first)}
		}
		seen[d.Port] = line.Number
		list = append(list, d)
	}
	return list, nil
}

// wellFormed reports whether a line has the form of a destination. The range of its
// ports is checked later, since that has a sentence of its own.
func wellFormed(text string, words []string) bool {
	if text[0] == ' ' || text[len(text)-1] == ' ' { // a backslash protected it
		return false
	}
	return (len(words) == 2 || len(words) == 3 && isDigits(words[2])) && isDigits(words[0]) && isHost(words[1])
}

// isHost reports whether s is an IPv4 address, or a domain name of at least two labels
// of letters, digits, hyphens and underscores, which host names contain in spite of
// RFC 1123. A name whose last label is a number is an invalid address (RFC 3696
// section 2, WHATWG URL "ends in a number"). A final dot, which disables the
// resolver's search list, is allowed.
func isHost(s string) bool {
	if _, ok := rules.ParseIPv4(s); ok {
		return true
	}
	s = strings.TrimSuffix(s, ".")
	labels := strings.Split(s, ".")
	if len(labels) < 2 || len(s) > maxName || isDigits(labels[len(labels)-1]) {
		return false
	}
	for _, label := range labels {
		if label == "" || len(label) > maxLabel || label[0] == '-' || strings.ContainsFunc(label, notOfName) {
			return false
		}
	}
	return true
}

// The length limits of a name and a label (RFC 1035 section 2.3.4), in characters.
const (
	maxName  = 253
	maxLabel = 63
)

func notOfName(r rune) bool {
	switch {
	case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '-', r == '_':
		return false
	}
	return true
}

// parsePort parses a decimal number from 1 to 65535 without leading zeros, as the
// router does.
func parsePort(s string) (rules.Port, bool) {
	if strings.HasPrefix(s, "0") {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return rules.Port(n), err == nil
}

func badPort(line rules.Line, port string) error {
	e := &rules.ParseError{Line: line, Sentence: fmt.Sprintf("Invalid port: %s, must be in the range 1 to 65535", port)}
	if strings.HasPrefix(port, "0") && strings.Trim(port, "0") != "" {
		e.Hint = "write the port without leading zeros"
	}
	return e
}

// isBlank reports whether s contains only white space, [[:space:]] of the POSIX locale.
func isBlank(s string) bool { return strings.Trim(s, " \t\n\v\f\r") == "" }

func isDigits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// UnitTest returns the output of mode unit-test: for each destination
// the port to listen on, on all addresses, and the target.
func UnitTest(list []Destination) []byte {
	var b []byte
	for _, d := range list {
		b = fmt.Appendf(b, "listen *:%d dial %s\n", d.Port, d.Target())
	}
	return b
}
