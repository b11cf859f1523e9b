package resolver

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseConf(t *testing.T) {
	base := func(change func(*conf)) *conf {
		c := &conf{servers: []string{"127.0.0.1:53"}, ndots: 1, timeout: 5 * time.Second, attempts: 2}
		change(c)
		return c
	}
	for name, test := range map[string]struct {
		text string
		want func(*conf)
	}{
		"empty":    {"", func(*conf) {}},
		"comments": {"# nameserver 10.0.0.1\n;nameserver 10.0.0.2\n", func(*conf) {}},
		"servers": {"nameserver 10.0.0.1\nnameserver fe80::1%eth0\nnameserver x\nnameserver 10.0.0.3\nnameserver 10.0.0.4", func(c *conf) {
			c.servers = []string{"10.0.0.1:53", "[fe80::1%eth0]:53", "10.0.0.3:53"}
		}},
		"the last list wins": {"search a.b c\ndomain d.e f\nsearch G.h. i\n", func(c *conf) { c.search = []string{"g.h.", "i."} }},
		"domain":             {"domain d.e f\n", func(c *conf) { c.search = []string{"d.e."} }},
		"options": {"options ndots:5 timeout:2\noptions attempts:3 rotate edns0 x:y\n", func(c *conf) {
			c.ndots, c.timeout, c.attempts, c.rotate = 5, 2*time.Second, 3, true
		}},
		"bounds":      {"options ndots:99 timeout:99 attempts:99", func(c *conf) { c.ndots, c.timeout, c.attempts = 15, 30*time.Second, 5 }},
		"lower ones":  {"options ndots:-1 timeout:0 attempts:0", func(c *conf) { c.ndots, c.timeout, c.attempts = 0, time.Second, 1 }},
		"no line end": {"nameserver\t10.0.0.1", func(c *conf) { c.servers = []string{"10.0.0.1:53"} }},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(base(test.want), parseConf([]byte(test.text)), cmp.AllowUnexported(conf{})); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestCandidates(t *testing.T) {
	c := &conf{search: []string{"ns.cluster.", "cluster."}, ndots: 5}
	for name, want := range map[string]string{
		"a":      "a.ns.cluster. a.cluster. a.",
		"a.b":    "a.b. a.b.ns.cluster. a.b.cluster.",
		"a.b.c":  "a.b.c. a.b.c.ns.cluster. a.b.c.cluster.",
		"a.b.":   "a.b.",
		longName: longName + ". " + longName + ".cluster.",
	} {
		if got := names(c.candidates(name)); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	c.ndots = 0
	if got, want := names(c.candidates("a")), "a. a.ns.cluster. a.cluster."; got != want {
		t.Errorf("a with ndots:0: %q, want %q", got, want)
	}
}

func names(list []candidate) string {
	var all []string
	for _, c := range list {
		all = append(all, c.name)
	}
	return strings.Join(all, " ")
}

// longName leaves room for the shorter search domain only.
var longName = strings.Repeat("abcdefg.", 30) + "abcd"
