//go:build kernels

package main

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// A router on a kernel without the module nf_conntrack_netlink redirects, and reports the effects:
// connections of former rules go on, and none is counted or logged.
func TestNoConnectionEvents(t *testing.T) {
	const module, file = "/sys/module/nf_conntrack_netlink", "/etc/modprobe.d/egress-router-test.conf"
	if _, err := os.Stat(module); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("%s: error %v, want that it does not exist: this test comes before those that load it", module, err)
	}
	if err := os.WriteFile(file, []byte("install nf_conntrack_netlink /bin/false\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(file) })
	t.Run("all", func(t *testing.T) { // its parallel tests end before the file is removed
		labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
			const advice = "modprobe nf_conntrack_netlink on the node"
			p.OK()
			p.WantAnswer("tcp", 80, "203.0.113.25:80")
			p.Env["EGRESS_DESTINATION"] = "80 tcp 203.0.113.25\n81 tcp 203.0.113.25 80\n"
			if r := p.OK(); !strings.Contains(r.Stderr, "stale connections not deleted") || !strings.Contains(r.Stderr, advice) {
				p.Errorf("stderr has no hint for stale connections:\n%s", labtest.Tail(r.Stderr))
			}
			p.Env["EGRESS_AUDIT_LOG"] = "true"
			r := p.Start("legacy")
			p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
			r.AwaitLog(1, "connection tracking unavailable")
			if !strings.Contains(r.Logged(), advice) {
				p.Errorf("the log lacks %q:\n%s", advice, labtest.Tail(r.Logged()))
			}
			p.WantAnswer("tcp", 81, "203.0.113.25:80")
			if _, report := p.Health(); !strings.Contains(report, "connections are neither counted nor logged: ") {
				p.Errorf("health has no warning:\n%s", report)
			}
		})
	})
}
