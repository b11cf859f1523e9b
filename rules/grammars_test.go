package rules

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// wantSameExtended checks that the extended grammar makes the same of a list as the legacy
// one: the set, the plan, and all texts of them.
func wantSameExtended(t *testing.T, list string, legacy Set) {
	t.Helper()
	extended, err := ParseExtended(list, variables{})
	if err != nil || !legacy.Equal(extended) {
		t.Errorf("%q is %v in the legacy grammar and %v, %v in the extended one", list, legacy, extended, err)
		return
	}
	a, b := NewPlan(legacy, sides), NewPlan(extended, sides)
	if !a.Equal(b) || a.String() != b.String() || string(UnitTest(legacy, sides)) != string(UnitTest(extended, sides)) || legacy.String() != extended.String() {
		t.Errorf("%q has different plans or texts: %s\n%s", list, a, b)
	}
	for i, c := range a.IPTables() {
		if d := b.IPTables()[i]; c.Name != d.Name || string(c.Saved) != string(d.Saved) {
			t.Errorf("%q has different chains of iptables:\n%s\n%s", list, c.Saved, d.Saved)
		}
	}
}

// Each list that is valid in both grammars is the same in both. An error of the legacy one
// for a list that the extended one accepts is about a part that the legacy one lacks.
func TestGrammarsAgree(t *testing.T) {
	random := rand.New(rand.NewPCG(16, 3))
	one := func(of ...string) string { return of[random.IntN(len(of))] }
	line := func() string {
		port := func() string {
			return one("80", "443", fmt.Sprint(1+random.IntN(65535)), fmt.Sprint(1+random.IntN(65535)), "65535", "1", "0", "080", "65536", "-1")
		}
		address := func() string {
			return one("203.0.113.25", fmt.Sprintf("10.%d.%d.1", random.IntN(256), random.IntN(256)), "01.2.3.4", "1.2.3.256", "255.255.255.255", "0.0.0.0", "127.0.0.1")
		}
		space := func() string { return one(" ", " ", " ", " ", "  ", "\\ ", "\t", "\\\n ") }
		switch random.IntN(12) {
		case 0:
			return one("", " ", "\t", "# x", "  # 80 tcp 1.2.3.4", "\r", `\# x`, "\\")
		case 1:
			return address()
		case 2:
			return port() + space() + one("tcp", "udp", "TCP", "sctp") + space() + address() + one("", " ", `\ `, " # x", "\r", "\\")
		}
		to := ""
		if random.IntN(2) == 0 {
			to = one(" ", "  ") + port()
		}
		return one("", " ", "\t") + port() + one(" ", " ", " ", "   ") + one("tcp", "udp") + " " + address() + to + one("", "", " ")
	}
	valid, refused := 0, 0
	lists := 2000
	if nstest.Long() {
		lists = 20_000
	}
	for range lists {
		var lines []string
		for range 1 + random.IntN(4) {
			lines = append(lines, line())
		}
		list := strings.Join(lines, "\n") + one("", "\n", "\n\n", "\\")
		if set, err := Parse(list, variables{}); err == nil {
			wantSameExtended(t, list, set)
			valid++
		} else {
			refused++
		}
	}
	if valid < lists/10 || refused < lists/10 {
		t.Errorf("%d lists are valid, %d are not", valid, refused)
	}
}
