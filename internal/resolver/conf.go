package resolver

import (
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// A conf is the content of a resolv.conf(5).
type conf struct {
	servers  []string // address:port, at least one
	search   []string // domains, absolute
	ndots    int      // 0: a name without a dot is tried as it is first, too
	timeout  time.Duration
	attempts int // rounds through all servers
	rotate   bool
}

// maxServers is the number of name servers that are used, MAXNS of resolv.h.
const maxServers = 3

// parseConf parses a resolv.conf(5). As in the system's resolver, invalid lines are
// ignored, values are bounded, the last search list wins, and the default server is
// 127.0.0.1.
func parseConf(text []byte) *conf {
	c := &conf{ndots: 1, timeout: 5 * time.Second, attempts: 2}
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) < 2 || strings.ContainsAny(line[:1], "#;") {
			continue
		}
		switch words[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(words[1]); err == nil && len(c.servers) < maxServers {
				c.servers = append(c.servers, net.JoinHostPort(a.String(), "53"))
			}
		case "domain", "search":
			c.search = nil
			for _, domain := range words[1:] {
				if name, ok := normal(domain); ok {
					c.search = append(c.search, dns.Fqdn(name))
				}
				if words[0] == "domain" {
					break
				}
			}
		case "options":
			for _, option := range words[1:] {
				c.option(option)
			}
		}
	}
	if len(c.servers) == 0 {
		c.servers = []string{"127.0.0.1:53"}
	}
	return c
}

// option parses one option. The bounds are RES_MAXNDOTS, RES_MAXRETRANS and
// RES_MAXRETRY of resolv.h.
func (c *conf) option(s string) {
	name, value, _ := strings.Cut(s, ":")
	n, err := strconv.Atoi(value)
	bounded := func(least, most int) int { return min(max(n, least), most) }
	switch {
	case name == "rotate":
		c.rotate = true
	case err != nil:
	case name == "ndots":
		c.ndots = bounded(0, 15)
	case name == "timeout":
		c.timeout = time.Duration(bounded(1, 30)) * time.Second
	case name == "attempts":
		c.attempts = bounded(1, 5)
	}
}

// A candidate is an absolute name to try for a name.
type candidate struct {
	name string
	asIs bool
}

// candidates returns the absolute names to try for a name, in their order. A name with
// a final dot is its only candidate.
//
// A name with a dot is tried as it is first, whatever ndots: with the five of
// Kubernetes, an owner of a name below the search list could take over any name of the
// Internet (RFC 1535), and each look-up would take several queries more. The other
// proxies, squid and haproxy, look it up as it is alone.
func (c *conf) candidates(name string) []candidate {
	asIs := candidate{dns.Fqdn(name), true}
	if dns.IsFqdn(name) {
		return []candidate{asIs}
	}
	var list []candidate
	for _, domain := range c.search {
		if full := name + "." + domain; len(full) <= maxName {
			list = append(list, candidate{full, false})
		}
	}
	if c.ndots == 0 || strings.Contains(name, ".") {
		return append([]candidate{asIs}, list...)
	}
	return append(list, asIs)
}

// maxName is the length of the longest name with its final dot, which takes 255 octets
// in a message (RFC 1035 section 2.3.4).
const maxName = 254
