package httpproxy

import (
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// hitsOf returns the hits as text.
func hitsOf(p *Proxy) map[string]int64 {
	all := make(map[string]int64)
	for _, h := range p.Hits() {
		all[h.Rule.String()] = h.Count
	}
	return all
}

// Each request is a hit of the rule that decided, or of none. After a change of the list,
// rules of both go on.
func TestHits(t *testing.T) {
	p := start(t, "!denied.example\n*.example\n192.0.2.0/24", zone{"a.example": {"203.0.113.254"}}, nil)
	for _, host := range []string{"denied.example", "other.invalid", "198.51.100.1"} {
		if status, text := answer(t, p.get(t, host)); status != http.StatusForbidden {
			t.Errorf("%s: %d %s", host, status, text)
		}
	}
	answer(t, p.get(t, "missing.example")) // allowed, and has no address
	if diff := cmp.Diff(map[string]int64{"!denied.example": 1, "*.example": 1, "192.0.2.0/24": 0, "": 2}, hitsOf(p.Proxy)); diff != "" {
		t.Errorf("hits (- want, + got):\n%s", diff)
	}
	list, err := Parse("*.example\nnew.invalid\n!denied.example\n!denied.example")
	if err != nil {
		t.Fatal(err)
	}
	p.SetRules(list)
	if diff := cmp.Diff([]int64{1, 0, 1, 0, 2}, func() (all []int64) {
		for _, h := range p.Hits() {
			all = append(all, h.Count)
		}
		return all
	}()); diff != "" {
		t.Errorf("hits of the new list (- want, + got):\n%s", diff)
	}
}
