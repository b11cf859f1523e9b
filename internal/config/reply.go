package config

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// parseReply parses the mark and the table of the reply path.
func (c *Config) parseReply(env Environment) Errors {
	var faults Errors
	c.ReplyMark, c.ReplyTable = spec.DefaultReplyMark, spec.DefaultReplyTable
	if env.ReplyMark != "" {
		n, err := parseMark(env.ReplyMark)
		if err != nil || n == 0 {
			faults = append(faults, &Error{"EGRESS_REPLY_MARK",
				fmt.Sprintf("EGRESS_REPLY_MARK %s is not a mark: expected a number from 1 to 4294967295, or from 0x1 to 0xffffffff", quote(env.ReplyMark)), ""})
		}
		c.ReplyMark = rules.Mark(n)
	}
	if env.ReplyTable != "" {
		n, err := strconv.ParseUint(env.ReplyTable, 10, 31)
		if err != nil || !spec.UsableTable(int(n)) {
			faults = append(faults, &Error{"EGRESS_REPLY_TABLE",
				fmt.Sprintf("EGRESS_REPLY_TABLE %s is not a table to use: expected a decimal number from 1 to %d, other than 253, 254 and 255", quote(env.ReplyTable), math.MaxInt32), ""})
		}
		c.ReplyTable = int(n)
	}
	return faults
}

// parseMark parses a decimal or hexadecimal number. A leading zero does not mean
// octal.
func parseMark(s string) (uint64, error) {
	if hex, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		return strconv.ParseUint(hex, 16, 32)
	}
	return strconv.ParseUint(s, 10, 32)
}

// parseClusterCIDRs parses the networks of the cluster side.
func (c *Config) parseClusterCIDRs(list string) Errors {
	const variable = "EGRESS_CLUSTER_CIDRS"
	var faults Errors
	words := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || unicode.IsSpace(r) })
	for _, word := range words {
		p, _ := netip.ParsePrefix(word) // the zero Prefix is invalid
		c.ClusterDestinations = append(c.ClusterDestinations, p)
	}
	for _, f := range c.ValidateClusterDestinations() {
		hint := f.Hint.In(Names{})
		if hint != "" {
			hint = remedy("%s", hint)
		} else {
			hint = cidrHint(words[f.Index])
		}
		faults = append(faults, &Error{variable, fmt.Sprintf("%s %s: %s", variable, quote(words[f.Index]), f.Why.In(Names{})), hint})
	}
	if list != "" && len(words) == 0 {
		c.Warnings = append(c.Warnings, fmt.Sprintf("%s %s contains no network", variable, quote(list)))
	}
	return faults
}

// cidrHint returns a hint for a word that is not an IPv4 network.
func cidrHint(word string) string {
	address, length, slash := strings.Cut(word, "/")
	a, ok := rules.ParseIPv4(address)
	switch {
	case strings.ContainsAny(word, ";|"):
		return remedy("separate networks by commas or spaces")
	case strings.Contains(word, ":"):
		return remedy("IPv6 does not cross the router without an IPv6 address in EGRESS_SOURCE: write the IPv4 networks only")
	case ok && !slash:
		return remedy("write the network's length behind a slash; %s/32 is that address alone", a)
	case ok && length == "0":
		return remedy("0.0.0.0/0 is every address, also those of the physical network: write the networks of the cluster")
	case ok && strings.Contains(length, "."):
		return remedy("write the network's length as a number of bits: /255.240.0.0 is /12")
	case ok:
		return remedy("the length after the slash is a number from 1 to 32")
	}
	return ""
}

// KeepNameServers adds the name servers of a resolv.conf(5) to the destinations of
// the cluster side, by which the pod reached them so far: otherwise a proxy in the
// pod would use the reserved address for its look-ups. It leaves out addresses that
// need no route (loopback, used by container engines), and those of the physical
// network: the gateway, its subnet, destinations.
func (c *Config) KeepNameServers(resolvConf []byte) {
	for line := range strings.Lines(string(resolvConf)) {
		words := strings.Fields(line)
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		a, err := netip.ParseAddr(words[1])
		ok := err == nil && (a.Is4() || len(c.Sources.Of(true)) > 0 && !a.Is4In6() && !a.IsLinkLocalUnicast())
		near := func(s spec.Source) bool {
			return spec.Unusable(a, s.Prefix) != "" || a == s.Gateway || s.Prefix.Contains(a)
		}
		if !ok || slices.ContainsFunc(c.Sources, near) || c.Set.Have(a) {
			continue
		}
		if p := netip.PrefixFrom(a, a.BitLen()); !slices.Contains(c.ClusterDestinations, p) {
			c.ClusterDestinations = append(c.ClusterDestinations, p)
		}
	}
}
