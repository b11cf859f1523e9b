package config

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// parseReply reads the mark and the table of the reply path.
func (c *Config) parseReply(env Environment) *Error {
	c.ReplyMark, c.ReplyTable = DefaultReplyMark, DefaultReplyTable
	if env.ReplyMark != "" {
		n, err := strconv.ParseUint(env.ReplyMark, 0, 32)
		if err != nil || n == 0 {
			return &Error{"EGRESS_REPLY_MARK", fmt.Sprintf("EGRESS_REPLY_MARK %q is not a mark: expected a number from 1 to 0xffffffff", env.ReplyMark), ""}
		}
		c.ReplyMark = rules.Mark(n)
	}
	if env.ReplyTable != "" {
		n, err := strconv.ParseUint(env.ReplyTable, 10, 31)
		// 253 to 255 are the kernel's own (linux/rtnetlink.h, rt_class_t).
		if err != nil || n == 0 || n >= 253 && n <= 255 {
			return &Error{"EGRESS_REPLY_TABLE", fmt.Sprintf("EGRESS_REPLY_TABLE %q is not a table to use: expected a number from 1 to %d, other than 253, 254 and 255", env.ReplyTable, math.MaxInt32), ""}
		}
		c.ReplyTable = int(n)
	}
	return nil
}

// parseClusterCIDRs reads the networks of the cluster side. One that holds the
// gateway or a destination would send redirected connections back there.
func (c *Config) parseClusterCIDRs(list string) *Error {
	for _, word := range strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' || r == '\n' || r == '\t' }) {
		bad := func(format string, args ...any) *Error {
			return &Error{"EGRESS_CLUSTER_CIDRS", fmt.Sprintf("EGRESS_CLUSTER_CIDRS %q: ", word) + fmt.Sprintf(format, args...), ""}
		}
		p, err := netip.ParsePrefix(word)
		if err != nil || !p.Addr().Is4() || p.Bits() == 0 {
			return bad("expected an IPv4 network such as 10.96.0.0/12")
		}
		if p != p.Masked() {
			return bad("the network with that length is %s", p.Masked())
		}
		if p.Contains(c.Gateway) {
			return bad("it holds EGRESS_GATEWAY (%s), which is on the physical network", c.Gateway)
		}
		for _, to := range c.destinations() {
			if p.Contains(to) {
				return bad("it holds %s, to which connections are redirected", to)
			}
		}
		c.ClusterDestinations = append(c.ClusterDestinations, p)
	}
	return nil
}

// destinations returns where connections are redirected.
func (c *Config) destinations() []netip.Addr {
	var to []netip.Addr
	for _, r := range c.Set.Redirects {
		to = append(to, r.To)
	}
	if c.Set.Fallback.IsValid() {
		to = append(to, c.Set.Fallback)
	}
	return to
}

// KeepNameServers adds the name servers of a resolv.conf(5) to what is reached
// by the cluster side, where the pod had them so far: without that, a proxy in
// the pod would ask them from the reserved address. Left out are those that no
// route is needed for (loopback, where a container engine has its own), and
// those that the physical network has: the gateway, its subnet, destinations.
func (c *Config) KeepNameServers(resolvConf []byte) {
	for line := range strings.Lines(string(resolvConf)) {
		words := strings.Fields(line)
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		a, ok := rules.ParseIPv4(words[1])
		if !ok || unusable(a) != "" || a == c.Gateway || c.Source.Contains(a) || slices.Contains(c.destinations(), a) {
			continue
		}
		if p := netip.PrefixFrom(a, a.BitLen()); !slices.Contains(c.ClusterDestinations, p) {
			c.ClusterDestinations = append(c.ClusterDestinations, p)
		}
	}
}
