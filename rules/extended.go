package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unique"

	"github.com/egress-router/egress-router/internal/wording"
)

// A Grammar is a form of destination lists.
type Grammar uint8

// The grammars.
const (
	Legacy   Grammar = iota // the original's
	Extended                // see ParseExtended
)

// Parse reads a destination list in the grammar.
func (g Grammar) Parse(value string, names wording.Names) (Set, error) {
	if g == Extended {
		return ParseExtended(value, names)
	}
	return Parse(value, names)
}

// Entries returns the lines of a valid list, for each redirect that of it, and then those
// of the fallbacks, that of IPv4 first.
func (g Grammar) Entries(value string) []Line {
	var entries, fallback6 []Line
	for _, line := range Lines(value) {
		if g == Extended {
			line.Text = withoutComment(line.Text)
		}
		if line.isSkipped() {
			continue
		}
		n := 1
		if f, ok := parseExtendedLine(line.Text); ok && g == Extended {
			if n = max(1, len(f.protocols)); f.has(IPv4) && f.has(IPv6) {
				n *= 2
			}
			if f.local == "" && FamilyOf(f.to) == IPv6 {
				fallback6 = []Line{line}
				continue
			}
		}
		entries = append(entries, slices.Repeat([]Line{line}, n)...)
	}
	return append(entries, fallback6...)
}

// ParseExtended reads a destination list in the extended grammar. It accepts every list
// that Parse accepts, with the same meaning, and in a line also
//
//   - several protocols: 53 tcp,udp 203.0.113.53
//   - the protocol sctp (RFC 9260)
//   - a range of local ports, to the same ports of the server, to a range of the same
//     length, or to one port: 30000-30100 udp 203.0.113.9 40000-40100
//   - an IPv6 address: 443 tcp 2001:db8::25
//   - several addresses, up to MaxAddresses: 443 tcp 203.0.113.25,203.0.113.26; those of
//     each family are a redirect
//   - a comment at its end: a # behind a space
//   - a name in place of addresses, which Set.Resolve needs: 443 tcp db.example.com 5432
//   - options behind the ports, each KEY=VALUE: see [options]
//
// A line with several protocols is short for one for each of them, also with its options.
// A local port may stand once for each protocol and family, and each family may have a
// fallback. The first invalid line ends the parse
// with a *ParseError, as in Parse.
func ParseExtended(value string, names wording.Names) (Set, error) {
	var set Set
	var fallback Line
	seen := make(map[service][]int32) // by local port, which the services lack: the line; zero: unused
	for _, line := range Lines(value) {
		if line.Text = withoutComment(line.Text); line.isSkipped() {
			continue
		}
		f, ok := parseExtendedLine(line.Text)
		if (set.Fallback.IsValid() || set.Fallback6.IsValid()) && (!ok || f.local != "" || set.FallbackOf(FamilyOf(f.to)).IsValid()) {
			return Set{}, &ParseError{line, wording.Textf("%s fallback IP must be the last line", wording.Destinations).In(names),
				fmt.Sprintf("line %d (%q) is the fallback: move it to the end", fallback.Number, fallback.Text)}
		}
		if !ok {
			return Set{}, invalid(line, names, extendedHint(line.Text, names))
		}
		if f.local == "" {
			if len(f.options) > 0 {
				return Set{}, invalid(line, names, "the fallback has no options")
			}
			if fallback = line; FamilyOf(f.to) == IPv6 {
				set.Fallback6 = f.to
			} else {
				set.Fallback = f.to
			}
			continue
		}
		r, err := f.redirect(line, names)
		if err != nil {
			return Set{}, err
		}
		for _, r.Protocol = range f.protocols {
			for _, family := range []Family{IPv4, IPv6} {
				if f.name == "" && !f.has(family) {
					continue
				}
				of := service{family, r.Protocol, 0}
				if seen[of] == nil {
					seen[of] = make([]int32, 1<<16)
				}
				if err := r.claim(seen[of], line, names); err != nil {
					return Set{}, err
				}
			}
			if f.more == nil {
				set.Redirects = append(set.Redirects, r)
			} else {
				set.Redirects = append(set.Redirects, f.spread(r)...)
			}
		}
	}
	return set, nil
}

// invalid returns the error about a line that does not have the form of one.
func invalid(line Line, names wording.Names, hint string) error {
	return &ParseError{line, wording.Textf("%s value '%s' is invalid", wording.Destinations, line.Text).In(names), hint}
}

// claim records that a line has the local ports of r.
func (r Redirect) claim(used []int32, line Line, names wording.Names) error {
	for port := int(r.Port); port <= int(r.last()); port++ {
		if first := used[port]; first != 0 {
			return &ParseError{line,
				wording.Textf("%s localport %d is already used for %s, must be unique for each protocol", wording.Destinations, port, r.Protocol).In(names),
				fmt.Sprintf("line %d uses it first", first)}
		}
		used[port] = int32(line.Number) //nolint:gosec // a list has fewer lines
	}
	return nil
}

// withoutComment returns a line without the comment at its end.
func withoutComment(text string) string {
	if before, _, found := strings.Cut(text, " #"); found {
		return strings.TrimRight(before, " ")
	}
	return text
}

// parseExtendedLine accepts "IP", "PORTS PROTOCOLS IP" and "PORTS PROTOCOLS IP PORTS",
// PORTS being PORT or PORT-PORT, with words of the form KEY=VALUE behind them.
func parseExtendedLine(text string) (f extendedFields, ok bool) {
	if strings.Trim(text, " ") != text { // a backslash protected a space
		return f, false
	}
	words, options := cutOptions(strings.FieldsFunc(text, func(c rune) bool { return c == ' ' }))
	f.options = options
	switch len(words) {
	case 1:
		f.to, ok = parseAddress(words[0])
		return f, ok
	case 4:
		f.remote = words[3]
	case 3:
	default:
		return f, false
	}
	f.local = words[0]
	if f.to, f.more, ok = parseAddresses(words[2]); !ok && isName(words[2]) {
		f.name, ok = words[2], true
	}
	if !ok || !isPorts(f.local) || f.remote != "" && !isPorts(f.remote) {
		return f, false
	}
	for name := range strings.SplitSeq(words[1], ",") {
		p, ok := parseExtendedProtocol(name)
		if !ok || slices.Contains(f.protocols, p) {
			return f, false
		}
		f.protocols = append(f.protocols, p)
	}
	return f, true
}

// extendedFields are the fields of one line, with its ports as text.
type extendedFields struct {
	local     string // empty: the line is the fallback
	protocols []Protocol
	to        netip.Addr
	more      []netip.Addr // all of them if there are several
	name      string       // in place of addresses
	remote    string       // empty: no remote port
	options   []string
}

// An option is a KEY=VALUE of a line.
type option struct {
	key string
	// set reads the value. Its fault is the hint about a value that it refuses.
	set func(r *Redirect, value string) (fault string)
}

// options are the options of a line, in the order in which String writes them.
var options = []option{
	{"drain", func(r *Redirect, value string) string {
		if r.Name() == "" {
			return "drain is for lines with a name: connections to an address that is no longer in the list end"
		}
		if value != "no" && value != "yes" {
			return fmt.Sprintf("drain is yes or no, not %q: whether connections to an address that the name no longer has go on", clip(value))
		}
		more := r.More.get()
		more.ends = value == "no"
		r.More.handle = unique.Make(more)
		return ""
	}},
	{"limit", func(r *Redirect, value string) string {
		return r.Limits.set(func(l *Limit) string { return l.setRate(value) })
	}},
	{"burst", setNumber("burst", func(l *Limit) *uint32 { return &l.Burst })},
	{"max", setNumber("max", func(l *Limit) *uint32 { return &l.Max })},
}

// cutOptions returns the words of a line and, without them, its options at the end.
func cutOptions(words []string) (fields, options []string) {
	n := len(words)
	for n > 0 && strings.Contains(words[n-1], "=") {
		n--
	}
	return words[:n], words[n:]
}

// setOptions reads the options of a line. The fault is the hint about the first invalid
// one.
func (r *Redirect) setOptions(words []string) (fault string) {
	seen := make(map[string]bool)
	for _, word := range words {
		key, value, _ := strings.Cut(word, "=")
		at := slices.IndexFunc(options, func(o option) bool { return o.key == key })
		switch {
		case at < 0:
			return fmt.Sprintf("%q is not an option%s", clip(key), knownOptions())
		case seen[key]:
			return fmt.Sprintf("the option %q stands twice", key)
		}
		seen[key] = true
		if fault := options[at].set(r, value); fault != "" {
			return fault
		}
	}
	return r.Limits.set((*Limit).complete)
}

// knownOptions returns the end of a hint about an unknown option.
func knownOptions() string {
	var keys []string
	for _, o := range options {
		keys = append(keys, o.key)
	}
	return ": " + strings.Join(keys, ", ") + " are"
}

// spread returns r to the addresses of a line with several: a redirect for each family of
// them.
func (f extendedFields) spread(r Redirect) []Redirect {
	var redirects []Redirect
	for _, family := range []Family{IPv4, IPv6} {
		if to := slices.DeleteFunc(slices.Clone(f.more), func(a netip.Addr) bool { return FamilyOf(a) != family }); len(to) > 0 {
			redirects = append(redirects, r.Spread(to))
		}
	}
	return redirects
}

// has reports whether a line has an address of a family.
func (f extendedFields) has(family Family) bool {
	return FamilyOf(f.to) == family || slices.ContainsFunc(f.more, func(a netip.Addr) bool { return FamilyOf(a) == family })
}

// redirect returns the redirect of a line, without a protocol, to the first address.
func (f extendedFields) redirect(line Line, names wording.Names) (Redirect, error) {
	first, last, err := parsePorts(f.local, line, names)
	if err != nil {
		return Redirect{}, err
	}
	r := Redirect{Port: first, To: f.to}
	if f.name != "" {
		r = r.named(f.name)
	}
	if last != first {
		r.Last = last
	}
	if len(f.options) > 0 {
		with := r // most redirects have none, and stay off the heap
		if fault := with.setOptions(f.options); fault != "" {
			return Redirect{}, invalid(line, names, fault)
		}
		r = with
	}
	if f.remote == "" {
		return r, nil
	}
	toFirst, toLast, err := parsePorts(f.remote, line, names)
	switch {
	case err != nil:
		return Redirect{}, err
	case toLast == toFirst || toLast-toFirst == last-first:
	default:
		return Redirect{}, invalid(line, names, fmt.Sprintf("the ranges have %d and %d ports: write two of the same length, or one remote port", int(last-first)+1, int(toLast-toFirst)+1))
	}
	if r.Shifts = toLast != toFirst; !r.Shifts || toFirst != first {
		r.ToPort = toFirst
	} else {
		r.Shifts = false // the same ports
	}
	return r, nil
}

// parseAddresses accepts IP and IP,IP,... with up to MaxAddresses that differ.
func parseAddresses(s string) (first netip.Addr, all []netip.Addr, ok bool) {
	if !strings.Contains(s, ",") {
		first, ok = parseAddress(s)
		return first, nil, ok
	}
	for word := range strings.SplitSeq(s, ",") {
		a, ok := parseAddress(word)
		if !ok || slices.Contains(all, a) || len(all) == MaxAddresses {
			return netip.Addr{}, nil, false
		}
		all = append(all, a)
	}
	return all[0], all, true
}

// parseAddress accepts an address of either family. It refuses those of IPv6 that no host
// beyond the gateway has: of a link (RFC 4291, section 2.5.6), and those that represent
// IPv4 addresses (section 2.5.5.2).
func parseAddress(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	return a, err == nil && FamilyOf(a) != 0 && (a.Is4() || !a.IsLinkLocalUnicast())
}

// addressFault returns the reason why a word is not an address that parseAddress accepts;
// empty: it is none of IPv6, and no name with a port.
func addressFault(s string) string {
	a, err := netip.ParseAddr(s)
	if ap, withPort := netip.ParseAddrPort(s); withPort == nil && ap.Addr().Is6() {
		return fmt.Sprintf("the remote port is a field of its own: write \"%s %d\"", ap.Addr(), ap.Port())
	}
	if inside, bracketed := netip.ParseAddr(strings.Trim(s, "[]")); err != nil && bracketed == nil && inside.Is6() {
		return fmt.Sprintf("write the address without brackets: %s", inside)
	}
	host, port, _ := strings.Cut(s, ":")
	switch {
	case isName(host) && isDigits(port):
		return fmt.Sprintf("the remote port is a field of its own: write \"%s %s\"", host, port)
	case err != nil && strings.Count(s, ":") > 1 && !strings.Contains(s, "/"):
		return fmt.Sprintf("%q is not an IPv6 address", clip(s))
	case err != nil || a.Is4():
		return ""
	case a.Is4In6():
		return fmt.Sprintf("%s represents an IPv4 address: write %s", s, a.Unmap())
	case a.IsLinkLocalUnicast():
		return fmt.Sprintf("%s is an address of one link: give one that routers forward", s)
	case a.Zone() != "":
		return fmt.Sprintf("an address has no interface behind it: write %s", a.WithZone(""))
	}
	return ""
}

// isPorts reports whether a word has the form of PORT or PORT-PORT.
func isPorts(s string) bool {
	first, last, ranged := strings.Cut(s, "-")
	return isDigits(first) && (!ranged || isDigits(last))
}

// parsePorts accepts PORT and PORT-PORT, and returns the first and the last port.
func parsePorts(s string, line Line, names wording.Names) (first, last Port, err error) {
	a, b, ranged := strings.Cut(s, "-")
	first, ok := parsePort(a)
	if !ok {
		return 0, 0, badPort(line, a)
	}
	if !ranged {
		return first, first, nil
	}
	if last, ok = parsePort(b); !ok {
		return 0, 0, badPort(line, b)
	}
	if last < first {
		return 0, 0, invalid(line, names, fmt.Sprintf("the range %s ends before it begins", s))
	}
	return first, last, nil
}

func parseExtendedProtocol(s string) (Protocol, bool) {
	if s == "sctp" {
		return SCTP, true
	}
	return parseProtocol(s)
}

// orExtended returns the end of a hint about what the legacy grammar refuses: that the
// extended one accepts it, if it does.
func orExtended(what, text string, names wording.Names) string {
	if _, err := ParseExtended(text, nil); err != nil {
		return ""
	}
	return wording.Textf("; %s accepts this %s", wording.Set(wording.Grammar, "extended"), what).In(names)
}

// extendedForms are the forms of a line.
const extendedForms = `a line is "IP" or "PORTS PROTOCOLS IP", with the server's ports behind it if they differ, for example "8080-8089 tcp,udp 203.0.113.26 80-89"; several addresses have commas between them, and a name may be in place of them`

// addressesHint returns the probable cause of a parse error of several addresses.
func addressesHint(words []string, names wording.Names) string {
	addresses := ""
	switch {
	case len(words) > 3 && (strings.HasSuffix(words[2], ",") || strings.HasPrefix(words[3], ",")):
		return "addresses are separated by commas without spaces"
	case len(words) == 1:
		addresses = words[0]
	case len(words) == 3 || len(words) == 4:
		addresses = words[2]
	}
	if len(words) == 1 && isName(addresses) {
		return "the fallback is an address, not a name"
	}
	if !strings.Contains(addresses, ",") {
		return addressFault(addresses)
	}
	seen := make(map[netip.Addr]bool)
	for word := range strings.SplitSeq(addresses, ",") {
		a, ok := parseAddress(word)
		if !ok && word == "" {
			return "a comma has an address at each side"
		} else if !ok && isName(word) {
			return "a line has addresses, or one name alone"
		} else if fault := addressFault(word); fault != "" {
			return fault
		} else if !ok {
			return addressHint(clip(word), names)
		} else if seen[a] {
			return fmt.Sprintf("the address %s stands twice", word)
		}
		seen[a] = true
	}
	switch {
	case len(words) == 1:
		return "the fallback is one address"
	case len(seen) > MaxAddresses:
		return fmt.Sprintf("a line has at most %d addresses, this one has %d", MaxAddresses, len(seen))
	}
	return ""
}

// extendedHint returns the probable cause of a parse error of a line.
func extendedHint(text string, names wording.Names) string {
	if i := strings.IndexByte(text, '#'); i > 0 {
		return "a comment needs a space in front of #"
	}
	words, options := cutOptions(strings.Fields(text))
	if i := slices.IndexFunc(words, func(w string) bool { return strings.Contains(w, "=") }); i >= 0 {
		return fmt.Sprintf("the option %q has to stand at the end of the line", clip(words[i]))
	}
	if len(options) > 0 && len(words) == 0 {
		return extendedForms
	}
	if h := addressesHint(words, names); h != "" {
		return h
	}
	if len(words) > 2 && (strings.HasSuffix(words[1], ",") || strings.HasPrefix(words[2], ",")) {
		return "protocols are separated by commas without spaces"
	}
	if len(words) > 0 && strings.Contains(words[0], ",") {
		return "a line has one port, or one range: write a line for each"
	}
	if len(words) == 3 || len(words) == 4 {
		for _, i := range []int{0, 3} {
			if i < len(words) && !isPorts(words[i]) {
				return fmt.Sprintf("%q is no port and no range of ports: write PORT or PORT-PORT, with numbers from 1 to 65535", clip(words[i]))
			}
		}
		seen := make(map[string]bool)
		for name := range strings.SplitSeq(words[1], ",") {
			switch _, ok := parseExtendedProtocol(name); {
			case seen[name]:
				return fmt.Sprintf("the protocol %q stands twice", name)
			case !ok && name != strings.ToLower(name):
				return "protocols are written in lower case"
			case !ok:
				return fmt.Sprintf(`%q is not a protocol: "tcp", "udp" and "sctp" are, or several with commas between them`, clip(name))
			}
			seen[name] = true
		}
	}
	if len(words) >= 3 {
		if w := words[2]; strings.Trim(w, "0123456789.") != "" && !strings.ContainsAny(w, ":/") && !isName(w) {
			return fmt.Sprintf("%q is no name: expected labels of letters, digits, - and _, at least two, separated by dots", clip(w))
		}
	}
	if len(options) > 0 {
		text, _, _ = strings.Cut(text, " "+options[0])
	}
	if h := hint(text, names); h != forms {
		return h
	}
	return extendedForms
}
