package cni_test

import (
	"bufio"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/cni"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// write replaces the file of the resource as a ConfigMap's volume does.
func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

// resource is the resource of newPod.
const resource = `
spec:
  addresses: ADDRESSES
  redirect:
    redirectRules:
    - {port: 80, protocol: TCP, destinationIP: 203.0.113.25}
    - {port: 8080, protocol: TCP, destinationIP: 203.0.113.26, targetPort: 80}
    - {port: 8443, protocol: TCP, destinationIP: 203.0.113.26, targetPort: 443}
    fallbackIP: 203.0.113.27
`

// wantNoRepairs checks that the container has repaired nothing.
func wantNoRepairs(p *pod) {
	p.Helper()
	for line := range strings.Lines(p.Metrics()) {
		if strings.HasPrefix(line, "egress_router_repairs_total{") && !strings.HasSuffix(line, " 0\n") {
			p.Error(line)
		}
	}
}

// A router that the plugin has made and a container in mode monitor keeps: the container
// changes nothing until the resource changes, then the rules alone, without a connection
// that ends. CHECK leaves the rules to the container and compares the rest, and DEL removes
// everything.
func TestMonitor(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]lab.Options{
		"IPv4": {MacvlanName: "net1"}, "IPv6": {MacvlanName: "net1", IPv6: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t, o)
			p.Vars["CNI_IFNAME"] = "net1"
			addresses := "[{ip: 192.168.12.99/24, gateway: 192.168.12.1}]"
			if o.IPv6 {
				addresses = "[{ip: 192.168.12.99/24, gateway: 192.168.12.1}, {ip: '2001:db8:12::99/64', gateway: '2001:db8:12::1'}]"
			}
			text := strings.Replace(resource, "ADDRESSES", addresses, 1)
			file := filepath.Join(t.TempDir(), "router.yaml")
			write(t, file, text)
			before := p.before()
			p.Conf["monitorPort"] = 9465
			p.add()
			made := p.State()
			conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
			r := bufio.NewReader(conn)
			p.WantEcho("after ADD", conn, r)

			p.Env = map[string]string{
				"EGRESS_ROUTER_MODE": "monitor", "EGRESS_CONFIG": file, "EGRESS_INTERFACE": "net1",
				"EGRESS_HEALTH_LISTEN": ":9465", "EGRESS_HEALTH_INTERVAL": "100ms", "EGRESS_ANNOUNCE_INTERVAL": "0",
			}
			outside := p.Watch(p.Lab.Outside, lab.LANLink)
			running := p.StartCommand("without-name-servers")
			running.Until("the container is ready", func() bool { code, _ := p.Health(); return code == 0 })
			running.AwaitComparisons(5)
			p.WantState(made)
			announced := 0
			for _, f := range outside.Captures[lab.LANLink].Frames() {
				if a, is := f.ARP(); is && a.SenderIP == lab.Source && a.TargetIP == lab.Source {
					announced++
				}
			}
			if announced > 2 { // those of ADD may arrive late
				t.Errorf("%d announcements of an address that has not changed", announced)
			}
			wantNoRepairs(p)
			// The operator reads this line.
			if m := p.Metrics(); !strings.Contains(m, "\negress_router_address_conflicts_total 0\n") {
				t.Errorf("no metric of conflicts without a label:\n%s", m)
			}
			p.ok("CHECK")

			// Other destinations take effect live.
			write(t, file, strings.Replace(text, "port: 8443, protocol: TCP, destinationIP: 203.0.113.26, targetPort: 443", "port: 53, protocol: UDP, destinationIP: 203.0.113.25", 1))
			running.Until("the new destination answers", func() bool {
				a, err := p.Ask(p.Lab.Client, "udp", netip.AddrPortFrom(lab.RouterAddr, 53))
				return err == nil && a.Server == netip.MustParseAddrPort("203.0.113.25:53") && a.Peer.Addr() == lab.Source
			})
			p.WantEcho("after the change", conn, r)
			p.WantAnswer("tcp", 80, "203.0.113.25:80")
			running.AwaitComparisons(2)
			wantNoRepairs(p)
			p.ok("CHECK")
			p.Conf["monitorPort"] = 0 // a pod without the container
			p.wantFault("CHECK", cni.CodeDrift, "net1 differs from its configuration: ")
			p.Conf["monitorPort"] = 9465
			running.Terminate()
			running.Until("the container has ended", func() bool { code, _ := p.Health(); return code != 0 })
			p.WantEcho("after the end of the container", conn, r)
			h := p.Handle(p.Lab.Router)
			if err := h.AddrDel(p.Link(h, "net1"), labtest.Addr("192.168.12.99/24")); err != nil {
				t.Fatal(err)
			}
			p.wantFault("CHECK", cni.CodeDrift, "192.168.12.99/24")
			p.del()
			p.wantBefore("after DEL", before)
		})
	}
}
