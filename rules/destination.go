package rules

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/egress-router/egress-router/internal/wording"
)

// A Protocol is a protocol above IP by its IANA number. The grammar yields TCP and UDP, the
// extended one also SCTP.
type Protocol uint8

// The protocols of the grammar, and those that only rules use. The zero Protocol
// matches every protocol.
const (
	ICMP   Protocol = 1
	TCP    Protocol = 6
	UDP    Protocol = 17
	ICMPv6 Protocol = 58
	SCTP   Protocol = 132
)

// String returns the protocol's name as the grammar and iptables write it.
func (p Protocol) String() string {
	switch p {
	case 0:
		return "all"
	case ICMP:
		return "icmp"
	case ICMPv6:
		return "ipv6-icmp"
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return strconv.Itoa(int(p))
}

// hasPorts reports whether packets of the protocol have ports, which rules match.
func (p Protocol) hasPorts() bool { return p == TCP || p == UDP || p == SCTP }

// parseProtocol accepts the names that the original accepts: lower case only.
func parseProtocol(s string) (Protocol, bool) {
	switch s {
	case "tcp":
		return TCP, true
	case "udp":
		return UDP, true
	}
	return 0, false
}

// A Port is a TCP or UDP port, 1 to 65535. The zero Port is an unspecified port.
type Port uint16

// parsePort accepts a decimal number from 1 to 65535. It refuses leading
// zeros, which the original let through and iptables then read as octal.
func parsePort(s string) (Port, bool) {
	if strings.HasPrefix(s, "0") {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return Port(n), err == nil
}

// ParseIPv4 accepts a dotted quad as RFC 6943 section 3.1.1 calls strict: four
// decimal numbers up to 255, without leading zeros, without white space.
func ParseIPv4(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	return a, err == nil && a.Is4()
}

// A Redirect sends the connections to one port of the pod, or to a range of ports, to one
// address, or each to one of several.
type Redirect struct {
	Protocol Protocol
	Shifts   bool       // ToPort is for Port, and the next ones are for the rest of the range
	Port     Port       // local port, on the pod; the first one of a range
	Last     Port       // the last port of a range; zero: there is only Port
	ToPort   Port       // remote port; zero: the same as the local one
	To       netip.Addr // the first address
	More     Addresses  // the other ones, see Spread
	Limits   Limited    // zero: none
}

// last returns the last local port.
func (r Redirect) last() Port { return max(r.Port, r.Last) }

// Contains reports whether r redirects a local port.
func (r Redirect) Contains(p Protocol, local Port) bool {
	return r.Protocol == p && r.Port <= local && local <= r.last()
}

// Server returns the server for a local port of r, with the first address.
func (r Redirect) Server(local Port) netip.AddrPort {
	to := local
	switch {
	case r.Shifts:
		to = r.ToPort + (local - r.Port)
	case r.ToPort != 0:
		to = r.ToPort
	}
	return netip.AddrPortFrom(r.To, uint16(to))
}

// ToOnePort reports whether all connections go to one port of the server.
func (r Redirect) ToOnePort() bool { return r.Last == 0 || r.ToPort != 0 && !r.Shifts }

// Halves returns two redirects in place of a range.
func (r Redirect) Halves() (low, high Redirect) {
	middle := r.Port + (r.Last-r.Port)/2
	return r.part(r.Port, middle), r.part(middle+1, r.Last)
}

// part returns the redirect of a part of the range.
func (r Redirect) part(first, last Port) Redirect {
	if r.ToPort != 0 {
		r.ToPort = Port(r.Server(first).Port())
	}
	r.Port, r.Last = first, last
	if first == last {
		r.Last = 0
	}
	r.Shifts = r.Shifts && r.Last != 0
	return r
}

// portsTo returns the local ports whose server has a port, like Port and Last, if there are
// any.
func (r Redirect) portsTo(remote Port) (first, last Port, ok bool) {
	switch {
	case r.ToPort == 0:
		return remote, 0, r.Contains(r.Protocol, remote)
	case !r.Shifts:
		return r.Port, r.Last, r.ToPort == remote
	}
	local := r.Port + (remote - r.ToPort) // wraps around outside of the range
	return local, 0, r.Contains(r.Protocol, local)
}

// String returns the redirect as a line of the grammar.
func (r Redirect) String() string {
	s := fmt.Sprintf("%s %s %s", r.LocalPorts(), r.Protocol, r.Destination())
	if r.ToPort != 0 {
		s += " " + r.ToPorts()
	}
	if r.More.get().ends {
		s += " drain=no"
	}
	return s + r.Limits.Value().String()
}

// LocalPorts returns the local ports as the grammar writes them.
func (r Redirect) LocalPorts() string { return ports(r.Port, r.last()) }

// ToPorts returns the remote ports as the grammar writes them.
func (r Redirect) ToPorts() string {
	return ports(Port(r.Server(r.Port).Port()), Port(r.Server(r.last()).Port()))
}

func ports(first, last Port) string {
	s := strconv.Itoa(int(first))
	if last != first {
		s += "-" + strconv.Itoa(int(last))
	}
	return s
}

// A Set is the content of a destination list.
type Set struct {
	Redirects []Redirect // in the order written; no two of a family have the same protocol and port
	Fallback  netip.Addr // destination of all other ports with IPv4; the zero Addr: none
	Fallback6 netip.Addr // the same with IPv6
}

// FallbackOf returns the fallback of a family.
func (s Set) FallbackOf(f Family) netip.Addr {
	if f == IPv6 {
		return s.Fallback6
	}
	return s.Fallback
}

// Fallbacks returns the fallbacks that there are, that of IPv4 first.
func (s Set) Fallbacks() []netip.Addr {
	return slices.DeleteFunc([]netip.Addr{s.Fallback, s.Fallback6}, func(a netip.Addr) bool { return !a.IsValid() })
}

// All returns the addresses of all destinations, each with the index of its entry
// (Grammar.Entries): the redirects and then the fallbacks.
func (s Set) All() iter.Seq2[int, netip.Addr] {
	return func(yield func(int, netip.Addr) bool) {
		for i, r := range s.Redirects {
			for a := range r.All() {
				if !yield(i, a) {
					return
				}
			}
		}
		for i, a := range s.Fallbacks() {
			if !yield(len(s.Redirects)+i, a) {
				return
			}
		}
	}
}

// Have reports whether a is the address of a destination.
func (s Set) Have(a netip.Addr) bool {
	for _, to := range s.All() {
		if to == a {
			return true
		}
	}
	return false
}

// Families returns the families of the destinations, IPv4 first.
func (s Set) Families() []Family {
	return slices.DeleteFunc([]Family{IPv4, IPv6}, func(f Family) bool {
		return !s.FallbackOf(f).IsValid() && !slices.ContainsFunc(s.Redirects, func(r Redirect) bool { return FamilyOf(r.To) == f })
	})
}

// Equal reports whether both sets redirect the same things in the same order.
func (s Set) Equal(other Set) bool {
	return s.Fallback == other.Fallback && s.Fallback6 == other.Fallback6 && slices.Equal(s.Redirects, other.Redirects)
}

// String returns the set as a destination list, one line for each redirect,
// which Parse reads back as an equal set.
func (s Set) String() string {
	var b strings.Builder
	for _, r := range s.Redirects {
		b.WriteString(r.String())
		b.WriteByte('\n')
	}
	for _, a := range s.Fallbacks() {
		b.WriteString(a.String())
		b.WriteByte('\n')
	}
	return b.String()
}

// A ParseError reports an invalid line of a destination list. Its text is the
// original's sentence, which users search their logs for.
type ParseError struct {
	Line     Line
	Sentence string // sentence of the original
	Hint     string // advice for the user; may be empty
}

// Error returns the original's sentence.
func (e *ParseError) Error() string { return e.Sentence }

// Parse reads a destination list. The grammar is that of the original router,
// including the order of its checks: the first invalid line ends the parse with a
// *ParseError. Its sentences begin with the name of the list, in names, and are those of
// the original if that is the name of its variable. A list of only comments and blank
// lines is an empty Set.
func Parse(value string, names wording.Names) (Set, error) {
	var set Set
	var fallback Line
	seen := make([]int32, 1<<16) // local port -> line; zero: unused
	lines := Lines(value)
	set.Redirects = make([]Redirect, 0, len(lines))
	for _, line := range lines {
		if line.isSkipped() {
			continue
		}
		if set.Fallback.IsValid() {
			return Set{}, &ParseError{line, wording.Textf("%s fallback IP must be the last line", wording.Destinations).In(names),
				fmt.Sprintf("line %d (%q) is the fallback: move it to the end", fallback.Number, fallback.Text)}
		}
		f, ok := parseLine(line.Text)
		if !ok {
			return Set{}, invalid(line, names, hint(line.Text, names)+orExtended("line", line.Text, names))
		}
		if f.port == "" {
			set.Fallback, fallback = f.to, line
			continue
		}
		r := Redirect{Protocol: f.protocol, To: f.to}
		// The original checks the remote port first.
		if f.toPort != "" {
			if r.ToPort, ok = parsePort(f.toPort); !ok {
				return Set{}, badPort(line, f.toPort)
			}
		}
		if r.Port, ok = parsePort(f.port); !ok {
			return Set{}, badPort(line, f.port)
		}
		if first := seen[r.Port]; first != 0 {
			return Set{}, &ParseError{line,
				wording.Textf("%s localport %d is already used, must be unique for each destination", wording.Destinations, r.Port).In(names),
				fmt.Sprintf("line %d uses it first; a local port is allowed once, whatever the protocol", first) + orExtended("list", value, names)}
		}
		seen[r.Port] = int32(line.Number)
		set.Redirects = append(set.Redirects, r)
	}
	return set, nil
}

func badPort(line Line, port string) error {
	e := &ParseError{Line: line, Sentence: fmt.Sprintf("Invalid port: %s, must be in the range 1 to 65535", port)}
	if strings.HasPrefix(port, "0") && strings.Trim(port, "0") != "" {
		e.Hint = "write the port without leading zeros: iptables would read it as octal"
	}
	return e
}

// isBlank reports whether s contains only white space, [[:space:]] of the POSIX
// locale.
func isBlank(s string) bool { return strings.Trim(s, " \t\n\v\f\r") == "" }

// fields are the fields of one line, with its ports as text: the form of the line
// is checked before the range of its ports.
type fields struct {
	port     string // empty: the line is the fallback
	protocol Protocol
	to       netip.Addr
	toPort   string // empty: no remote port
}

// parseLine accepts "IP", "PORT PROTO IP" and "PORT PROTO IP PORT", with one or
// more spaces between the fields and nothing else.
func parseLine(text string) (fields, bool) {
	if strings.HasPrefix(text, " ") || strings.HasSuffix(text, " ") { // a backslash protected it
		return fields{}, false
	}
	var f fields
	var ok bool
	words := make([]string, 0, 4)
	for word := range strings.SplitSeq(text, " ") {
		if word == "" {
			continue
		}
		if len(words) == cap(words) {
			return fields{}, false
		}
		words = append(words, word)
	}
	if len(words) == 1 {
		f.to, ok = ParseIPv4(words[0])
		return f, ok
	}
	if len(words) != 3 && len(words) != 4 {
		return fields{}, false
	}
	if f.port = words[0]; !isDigits(f.port) {
		return fields{}, false
	}
	if f.protocol, ok = parseProtocol(words[1]); !ok {
		return fields{}, false
	}
	if f.to, ok = ParseIPv4(words[2]); !ok {
		return fields{}, false
	}
	if len(words) == 4 {
		if f.toPort = words[3]; !isDigits(f.toPort) {
			return fields{}, false
		}
	}
	return f, true
}

func isDigits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
