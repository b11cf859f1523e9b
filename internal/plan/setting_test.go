package plan

import (
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// defaults are the kernel's own values, without IPv6 and before connection tracking.
func defaults() Sysctls {
	s := Sysctls{}
	for _, name := range []string{"all", "macvlan0", "eth0"} {
		for key, value := range map[string]int{"accept_redirects": 1, "arp_ignore": 0, "arp_announce": 0, "proxy_arp": 0, "rp_filter": 0, "src_valid_mark": 0} {
			s[conf4(name, key)] = value
		}
	}
	return s
}

func TestSet(t *testing.T) {
	clustered := want
	clustered.Cluster.Interface = "eth0"
	const timeout = "net/netfilter/nf_conntrack_tcp_timeout_"
	right := Sysctls{
		"net/ipv4/conf/all/accept_redirects": 0, "net/ipv4/conf/macvlan0/accept_redirects": 0, "net/ipv4/conf/eth0/accept_redirects": 0,
		"net/ipv4/conf/all/arp_ignore": 1, "net/ipv4/conf/all/arp_announce": 2,
	}
	for name, test := range map[string]struct {
		have Sysctls
		want []string
	}{
		"no sysctls": {nil, nil},
		"the kernel's defaults": {Sysctls{}, []string{
			"set net/ipv4/conf/all/accept_redirects = 0",
			"set net/ipv4/conf/macvlan0/accept_redirects = 0",
			"set net/ipv4/conf/macvlan0/arp_ignore = 1",
			"set net/ipv4/conf/macvlan0/arp_announce = 1",
			"set net/ipv4/conf/eth0/accept_redirects = 0",
			"set net/ipv4/conf/eth0/arp_ignore = 1",
			"set net/ipv4/conf/eth0/arp_announce = 2",
		}},
		"values of all interfaces that suffice": {right, nil},
		"IPv6": {merged(right, Sysctls{conf6("macvlan0", "accept_ra"): 2, conf6("macvlan0", "autoconf"): 0, conf6("eth0", "accept_redirects"): 1}), []string{
			"set net/ipv6/conf/macvlan0/accept_ra = 0",
			"set net/ipv6/conf/eth0/accept_redirects = 0",
		}},
		"strict filters": {merged(right, Sysctls{conf4("all", "rp_filter"): 1}), []string{"set net/ipv4/conf/eth0/rp_filter = 2"}},
		"strict filters with marks": {merged(right, Sysctls{conf4("all", "rp_filter"): 1, conf4("macvlan0", "src_valid_mark"): 1}), []string{
			"set net/ipv4/conf/macvlan0/rp_filter = 2",
			"set net/ipv4/conf/eth0/rp_filter = 2",
		}},
		"loose filters": {merged(right, Sysctls{conf4("all", "rp_filter"): 2, conf4("macvlan0", "rp_filter"): 1, conf4("all", "src_valid_mark"): 1}), nil},
		"the kernel's times": {merged(right, Sysctls{timeout + "established": 432000, timeout + "close_wait": 60, timeout + "fin_wait": 120, timeout + "last_ack": 30}), []string{
			"set net/netfilter/nf_conntrack_tcp_timeout_close_wait = 7440",
			"set net/netfilter/nf_conntrack_tcp_timeout_fin_wait = 240",
			"set net/netfilter/nf_conntrack_tcp_timeout_last_ack = 240",
		}},
		"longer times": {merged(right, Sysctls{timeout + "established": 1000000, timeout + "close_wait": 10000, timeout + "fin_wait": 10000, timeout + "last_ack": 240}), nil},
	} {
		t.Run(name, func(t *testing.T) {
			have := State{Up: true}
			if test.have != nil {
				have.Sysctls = merged(defaults(), test.have)
			}
			var got []string
			for _, s := range prepare(clustered, have) {
				if !s.Optional || s.Effect == "" {
					t.Errorf("%s: optional %v, effect %q; want an optional step with an effect", s, s.Optional, s.Effect)
				}
				got = append(got, s.String())
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
		})
	}
}

// merged returns a with the values of b in place of its own.
func merged(a, b Sysctls) Sysctls {
	c := maps.Clone(a)
	maps.Copy(c, b)
	return c
}

// The README of the router lists each sysctl.
func TestREADMEListsSysctls(t *testing.T) {
	text, err := os.ReadFile("../router/README.md")
	if err != nil {
		t.Fatal(err)
	}
	clustered := want
	clustered.Cluster.Interface = "eth0"
	for _, s := range clustered.settings() {
		for _, name := range slices.Concat([]string{s.sysctl}, s.reads) {
			if key := path.Base(name); !strings.Contains(string(text), key+"`") {
				t.Errorf("README.md lacks %q", key)
			}
		}
	}
}

// On a kernel that cannot hold back ARP, the kernel of a router with the addresses of others leaves
// requests for them unanswered, in any role: its process answers. On others it answers, also after
// a run that had it silent.
func TestSilentStandby(t *testing.T) {
	const ignore = "net/ipv4/conf/macvlan0/arp_ignore"
	for _, c := range []struct {
		role    Role
		partial bool
		have    int
		want    string
	}{
		{Standby, false, 1, ""}, {Standby, false, 0, "1"}, {Standby, true, 1, "8"}, {Standby, true, 8, ""},
		{Claiming, true, 8, ""}, {Active, true, 8, ""}, {Active, true, 1, "8"}, {Active, false, 8, "1"},
	} {
		goal := Want{Network: want, Gate: &Gate{Partial: c.partial}}.WithRole(c.role)
		goal.Network.Shared = true
		have := State{Sysctls: Sysctls{ignore: c.have, "net/ipv4/conf/all/arp_ignore": 0}}
		got := ""
		for _, s := range set(goal.Network, have) {
			if s.Sysctl == ignore {
				got = s.Value
			}
		}
		if got != c.want {
			t.Errorf("role %d, partial %t, %d: expected %q, found %q", c.role, c.partial, c.have, c.want, got)
		}
	}
}
