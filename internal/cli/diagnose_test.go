package cli

import (
	"strings"
	"testing"
)

func TestParsePlace(t *testing.T) {
	for _, test := range []struct {
		args string
		want place
		ok   bool
	}{
		{"diagnose", place{}, true},
		{"diagnose 8080", place{of: "8080"}, true},
		{"diagnose -o json --pid 17 db.example.com", place{pid: 17, json: true, of: "db.example.com"}, true},
		{"diagnose --netns /run/netns/egress", place{netns: "/run/netns/egress"}, true},
		{"connections --follow -o json", place{follow: true, json: true}, true},
		{"connections --pid 17", place{pid: 17}, true},
		{"diagnose --follow", place{}, false},
		{"diagnose --pid", place{}, false},
		{"diagnose --pid x", place{}, false},
		{"diagnose --pid -1", place{}, false},
		{"diagnose --pid 1 --pid 2", place{}, false},
		{"diagnose --pid 1 --netns /proc/1/ns/net", place{}, false},
		{"diagnose -o text", place{}, false},
		{"diagnose --verbose", place{}, false},
		{"diagnose 80 81", place{}, false},
		{"connections 80", place{}, false},
		{"plan 80", place{}, false},
	} {
		at, ok := parsePlace(strings.Fields(test.args))
		if ok != test.ok || ok && at != test.want {
			t.Errorf("%s: %+v, %v; want %+v, %v", test.args, at, ok, test.want, test.ok)
		}
	}
}

// A sample is spread over the whole list, and bounds the number of probes.
func TestSample(t *testing.T) {
	all := make([]int, 10000)
	for i := range all {
		all[i] = i
	}
	some := sample(all, mostProbed)
	if len(some) != mostProbed || some[0] != 0 || some[mostProbed-1] < 9000 {
		t.Errorf("%d of them: %v", len(some), some)
	}
	for i := 1; i < len(some); i++ {
		if some[i]-some[i-1] > 10000/mostProbed+1 {
			t.Errorf("a gap from %d to %d", some[i-1], some[i])
		}
	}
	if few := sample(all[:3], mostProbed); len(few) != 3 {
		t.Errorf("%d of three", len(few))
	}
}
