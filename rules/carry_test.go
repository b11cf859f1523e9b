package rules

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// carrying is a router that has a tunnel to others.
func carrying(sources ...string) Sides {
	s := Sides{Cluster: "eth0", Egress: "macvlan0", Mark: 0x1000, Peers: 9467, Carry: Carry{Interface: "tunnel0", UDP: 9468, First: 1024, Last: 33279}}
	for _, a := range sources {
		s.Sources = append(s.Sources, ip(a))
	}
	return s
}

// added returns the rules of all chains that a plan has with a tunnel only, one a line.
func added(t *testing.T, sides Sides) string {
	t.Helper()
	set := Set{Fallback: ip("203.0.113.27")}
	text := func(sides Sides) (lines []string) {
		plan := NewPlan(set, sides)
		if err := plan.Validate(); err != nil {
			t.Fatal(err)
		}
		for _, c := range plan.Chains {
			for _, r := range c.Rules {
				lines = append(lines, string(r.append([]byte(string(c.Table)+" "+c.Name()+" "), c.Family, true)))
			}
		}
		return lines
	}
	without := sides
	without.Carry = Carry{}
	before := text(without)
	return strings.Join(slices.DeleteFunc(text(sides), func(line string) bool { return slices.Contains(before, line) }), "\n") + "\n"
}

func TestCarry(t *testing.T) {
	const want = `mangle EGRESS-PREROUTING -i tunnel0 -m connmark --mark 0x1000/0x1000 -j MARK --set-xmark 0x1000/0x1000
nat EGRESS-PREROUTING -i eth0 -p udp -m udp --dport 9468 -j RETURN
filter EGRESS-FORWARD -i eth0 -o tunnel0 -m conntrack --ctstate DNAT --ctdir ORIGINAL -j RETURN
filter EGRESS-FORWARD -i tunnel0 -o eth0 -m conntrack --ctstate DNAT --ctdir REPLY -j RETURN
filter EGRESS-FORWARD -s 192.168.12.99/32 -i tunnel0 -o macvlan0 -m conntrack --ctstate INVALID,UNTRACKED -j RETURN
filter EGRESS-FORWARD -d 192.168.12.99/32 -i macvlan0 -o tunnel0 -m conntrack --ctstate INVALID,UNTRACKED -j RETURN
filter EGRESS-FORWARD -i tunnel0 -j DROP
filter EGRESS-INPUT -i tunnel0 -j DROP
nat EGRESS-POSTROUTING -o macvlan0 -p tcp -j SNAT --to-source 192.168.12.99:1024-33279
nat EGRESS-POSTROUTING -o macvlan0 -p udp -j SNAT --to-source 192.168.12.99:1024-33279
nat EGRESS-POSTROUTING -o macvlan0 -p sctp -j SNAT --to-source 192.168.12.99:1024-33279
nat EGRESS-POSTROUTING -o tunnel0 -p tcp -j SNAT --to-source 192.168.12.99:1024-33279
nat EGRESS-POSTROUTING -o tunnel0 -p udp -j SNAT --to-source 192.168.12.99:1024-33279
nat EGRESS-POSTROUTING -o tunnel0 -p sctp -j SNAT --to-source 192.168.12.99:1024-33279
nat EGRESS-POSTROUTING -o tunnel0 -j SNAT --to-source 192.168.12.99
source-guard EGRESS-POSTROUTING -s 192.168.12.99/32 -o tunnel0 -j RETURN
source-guard EGRESS-POSTROUTING -d 192.168.12.99/32 -o tunnel0 -j RETURN
source-guard EGRESS-POSTROUTING -o tunnel0 -j DROP
`
	if got := added(t, carrying("192.168.12.99")); got != want {
		t.Errorf("got\n%s", got)
	}
}

// Each of several sources has the range; IPv6 has no tunnel.
func TestCarrySources(t *testing.T) {
	sides := carrying("192.168.12.99", "192.168.12.100", "2001:db8:12::99")
	got := added(t, sides)
	for _, line := range []string{
		"nat EGRESS-POSTROUTING -s 192.168.12.100/32 -o tunnel0 -p tcp -j SNAT --to-source 192.168.12.100:1024-33279",
		"nat EGRESS-POSTROUTING -s 0.0.0.1/0.0.0.1 -o macvlan0 -p udp -j SNAT --to-source 192.168.12.100:1024-33279",
		"filter EGRESS-FORWARD -d 192.168.12.100/32 -i macvlan0 -o tunnel0 -m conntrack --ctstate INVALID,UNTRACKED -j RETURN",
		"source-guard EGRESS-POSTROUTING -s 192.168.12.100/32 -o tunnel0 -j RETURN",
	} {
		if !strings.Contains(got, line+"\n") {
			t.Errorf("missing %q in\n%s", line, got)
		}
	}
	for _, c := range NewPlan(Set{}, sides).Chains {
		if c.Family != IPv6 {
			continue
		}
		for _, r := range c.Rules {
			if (r.In == "tunnel0" || r.Out == "tunnel0" || r.ToLast != 0) || r.Target == SNAT && r.To == (netip.Addr{}) {
				t.Errorf("IPv6 has a rule of the tunnel: %s", r.append(nil, IPv6, true))
			}
		}
	}
}
