package nft

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/netns/nstest"
	"github.com/egress-router/egress-router/rules"
)

func TestMain(m *testing.M) { nstest.Main(m) }

var sides = rules.Sides{Cluster: "eth0", Egress: "macvlan0", Source: netip.MustParseAddr("192.168.12.99"), Mark: 0x1000}

func TestX(t *testing.T) {
	for _, n := range []int{4, 10000} {
		var list strings.Builder
		for i := range n {
			fmt.Fprintf(&list, "%d tcp 203.0.113.26 443\n", 10001+i)
		}
		set, err := rules.Parse(list.String() + "203.0.113.27")
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		tx, err := Begin(t.Context(), rules.IPv4, rules.IPv6)
		if err != nil {
			t.Fatal(err)
		}
		t.Log("begin", time.Since(begin))
		plan := rules.NewPlan(set, sides)
		begin = time.Now()
		_, err = tx.Apply(t.Context(), plan)
		t.Log("apply", time.Since(begin))
		if err != nil {
			t.Error(err)
		}
		out, _ := exec.Command("nft", "list", "ruleset").CombinedOutput()
		if n == 4 {
			t.Logf("%s", out)
		}
		begin = time.Now()
		tx, err = Begin(t.Context(), rules.IPv4, rules.IPv6)
		t.Log("begin", time.Since(begin), err)
		t.Log(tx.Differs(plan))
	}
}
