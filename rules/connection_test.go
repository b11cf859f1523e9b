package rules

import (
	"net/netip"
	"testing"
)

func TestStale(t *testing.T) {
	stale := NewPlan(exampleSet, sides).Stale([]netip.Addr{ip("10.128.0.98")})
	withoutFallback := NewPlan(Set{Redirects: exampleSet.Redirects}, sides).Stale([]netip.Addr{ip("10.128.0.98")})
	six := NewPlan(exampleSet, sides)
	six.Redirects = append(six.Redirects, Redirect{Protocol: TCP, Port: 80, To: ip("2001:db8::25"), ToPort: 8080})
	six.Chains = append(six.Chains, Chain{IPv6, NAT, Postrouting, []Rule{{Target: SNAT, To: ip("2001:db8:12::99")}}})
	both := six.Stale([]netip.Addr{ip("10.128.0.98"), ip("fd00::98")})
	standby := sides
	standby.Health, standby.Peers, standby.Carry = 9465, 9467, Carry{Interface: "egress-carry", UDP: 9468, First: 1024, Last: 30000}
	serving := NewPlan(exampleSet, standby).Stale([]netip.Addr{ip("10.128.0.98")})
	at := netip.MustParseAddrPort
	client, reserved := ip("10.128.0.71"), ip("192.168.12.99")
	for name, test := range map[string]struct {
		stale func(Connection) bool
		c     Connection
		want  bool
	}{
		"as planned":                   {stale, Connection{TCP, client, at("10.128.0.98:8080"), at("203.0.113.26:80"), reserved}, false},
		"same port":                    {stale, Connection{TCP, client, at("10.128.0.98:80"), at("203.0.113.25:80"), reserved}, false},
		"fallback":                     {stale, Connection{UDP, client, at("10.128.0.98:53"), at("203.0.113.27:53"), reserved}, false},
		"fallback of a redirect's UDP": {stale, Connection{UDP, client, at("10.128.0.98:80"), at("203.0.113.27:80"), reserved}, false},
		"fallback, ICMP":               {stale, Connection{1, client, at("10.128.0.98:0"), at("203.0.113.27:0"), reserved}, false},
		"another server":               {stale, Connection{TCP, client, at("10.128.0.98:80"), at("203.0.113.99:80"), reserved}, true},
		"another port":                 {stale, Connection{TCP, client, at("10.128.0.98:8080"), at("203.0.113.26:8080"), reserved}, true},
		"another source":               {stale, Connection{UDP, client, at("10.128.0.98:53"), at("203.0.113.27:53"), ip("192.168.12.98")}, true},
		"the client as the source":     {stale, Connection{UDP, client, at("10.128.0.98:53"), at("203.0.113.27:53"), client}, true},
		"never redirected":             {stale, Connection{UDP, client, at("10.128.0.98:53"), at("10.128.0.98:53"), client}, true},
		"to the pod itself":            {withoutFallback, Connection{TCP, client, at("10.128.0.98:22"), at("10.128.0.98:22"), client}, false},
		"redirected no longer":         {withoutFallback, Connection{TCP, client, at("10.128.0.98:22"), at("203.0.113.27:22"), reserved}, true},
		"health":                       {serving, Connection{TCP, client, at("10.128.0.98:9465"), at("10.128.0.98:9465"), client}, false},
		"health, redirected before":    {serving, Connection{TCP, client, at("10.128.0.98:9465"), at("203.0.113.27:9465"), reserved}, true},
		"health's port with UDP":       {serving, Connection{UDP, client, at("10.128.0.98:9465"), at("10.128.0.98:9465"), client}, true},
		"heartbeat":                    {serving, Connection{UDP, client, at("10.128.0.98:9467"), at("10.128.0.98:9467"), client}, false},
		"tunnel":                       {serving, Connection{UDP, client, at("10.128.0.98:9468"), at("10.128.0.98:9468"), client}, false},
		"beside the tunnel":            {serving, Connection{UDP, client, at("10.128.0.98:9469"), at("10.128.0.98:9469"), client}, true},
		"not to the pod":               {stale, Connection{TCP, ip("10.128.0.98"), at("10.96.0.10:53"), at("10.96.0.10:53"), ip("10.128.0.98")}, false},
		"through the pod":              {stale, Connection{TCP, client, at("198.51.100.7:80"), at("203.0.113.25:80"), reserved}, false},
		"through it, another server":   {stale, Connection{TCP, client, at("198.51.100.7:80"), at("203.0.113.99:80"), reserved}, true},
		"through it, not redirected":   {stale, Connection{TCP, client, at("198.51.100.7:80"), at("198.51.100.7:80"), reserved}, false},
		"of the pod, by others":        {stale, Connection{UDP, ip("127.0.0.1"), at("127.0.0.11:53"), at("127.0.0.11:40000"), ip("127.0.0.1")}, false},
		"of the pod, translated":       {stale, Connection{TCP, ip("10.128.0.98"), at("198.51.100.7:80"), at("198.51.100.8:80"), reserved}, false},
		"IPv4 of both":                 {both, Connection{TCP, client, at("10.128.0.98:80"), at("203.0.113.25:80"), reserved}, false},
		"IPv6":                         {both, Connection{TCP, ip("fd00::71"), at("[fd00::98]:80"), at("[2001:db8::25]:8080"), ip("2001:db8:12::99")}, false},
		"IPv6, another server":         {both, Connection{TCP, ip("fd00::71"), at("[fd00::98]:80"), at("[2001:db8::26]:8080"), ip("2001:db8:12::99")}, true},
		"IPv6, another source":         {both, Connection{TCP, ip("fd00::71"), at("[fd00::98]:80"), at("[2001:db8::25]:8080"), ip("fd00::71")}, true},
		"IPv6, no fallback":            {both, Connection{TCP, ip("fd00::71"), at("[fd00::98]:8080"), at("[fd00::98]:8080"), ip("fd00::71")}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := test.stale(test.c); got != test.want {
				t.Errorf("%v", got)
			}
		})
	}
}
