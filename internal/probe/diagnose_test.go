package probe_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// found returns the finding of a check, the first one of several.
func found(p *labtest.Pod, d diagnose.Diagnosis, check string) diagnose.Finding {
	p.Helper()
	i := slices.IndexFunc(d.Findings, func(f diagnose.Finding) bool { return f.Check == check })
	if i < 0 {
		p.Fatalf("no check %q:\n%s", check, text(d))
	}
	return d.Findings[i]
}

// number returns the number of findings of a check.
func number(d diagnose.Diagnosis, check string) (n int) {
	for _, f := range d.Findings {
		if f.Check == check {
			n++
		}
	}
	return n
}

// One destination is probed, by its port, its address, its name, or any server.
func TestDiagnoseOne(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.OK()
	for of, want := range map[string]string{
		"8080": "tcp 203.0.113.26:80, port 8080", "203.0.113.25": "tcp 203.0.113.25:80, port 80", "203.0.113.26:443": "tcp 203.0.113.26:443, port 8443",
		"9000": "tcp 203.0.113.27:9000, port 9000", "192.168.12.80:80": "tcp 192.168.12.80:80",
	} {
		d := diagnosed(p, p.Lab.Router, "egress-router", of)
		if f := found(p, d, "destination"); f.Subject != want || f.Verdict != diagnose.OK || number(d, "destination") != 1 {
			t.Errorf("%s: %+v, want %s:\n%s", of, f, want, text(d))
		}
	}
	for _, of := range []string{"db.example.com", "203.0.113.9", "0", "[2001:db8::1]:80"} {
		r := p.Exec("egress-router", "diagnose", of)
		if r.Code != 1 || r.Stdout != "" || !strings.Contains(r.Last(), fmt.Sprintf("diagnose %q: no destination has this address, name or port", of)) {
			t.Errorf("%s: %+v", of, r)
		}
	}
}

// On the node, the variables are those of the router's process, and the files those of its
// container.
func TestDiagnoseProcess(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 1, lab.Options{}, func(p *labtest.Pod) {
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		p.WantAnswer("tcp", 80, "203.0.113.25:80")
		p.Env = nil
		d := diagnosed(p, p.Lab.Node, "egress-router", "--pid", strconv.Itoa(r.Cmd.Process.Pid))
		if !d.OK || number(d, "destination") != 4 || found(p, d, "rules").Verdict != diagnose.OK {
			p.Errorf("diagnosis:\n%s", text(d))
		}
	})
}

// On the node, and where the host's namespace is known, the NIC below the macvlan is named.
func TestDiagnoseNamesParent(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.OK()
	p.Env["EGRESS_MACVLAN_PARENT"], p.Env["EGRESS_HOST_NETNS"] = lab.NIC, labtest.File(p.Lab.Node)
	for _, d := range []diagnose.Diagnosis{
		diagnosed(p, p.Lab.Router, "egress-router"),
		diagnosed(p, p.Lab.Node, "egress-router", "--netns", labtest.File(p.Lab.Router)),
	} {
		if f := found(p, d, "interface"); !strings.Contains(f.Found, "macvlan in mode private of nic0 (veth), ") {
			t.Errorf("%+v", f)
		}
	}
}

// Without privilege, each check states what it needs, or what a running router reports.
func TestDiagnoseWithoutPrivilege(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 2, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		d := diagnosed(p, p.Lab.Router, "without-privilege")
		for check, needs := range map[string]string{"address": "NET_RAW", "gateway": "NET_RAW", "rules": "NET_ADMIN", "filters": "NET_ADMIN", "clients": "NET_ADMIN", "ports": "NET_ADMIN"} {
			if f := found(p, d, check); f.Verdict != diagnose.Unknown || !strings.Contains(f.Found, "this needs the capability "+needs) {
				p.Errorf("%s: %+v", check, f)
			}
		}
		for _, check := range []string{"interface", "routes", "forwarding", "conntrack", "destination"} {
			if f := found(p, d, check); f.Verdict != diagnose.OK {
				p.Errorf("%s: %+v", check, f)
			}
		}
		r := p.Start("legacy")
		r.AwaitLog(1, "msg=ready")
		p.Until("the running router reports a gateway that answers", func() bool {
			_, out := p.Health()
			return strings.Contains(out, "192.168.12.1 answers ARP")
		})
		p.Until("the diagnosis has what it reports", func() bool { // which takes a second
			d = diagnosed(p, p.Lab.Router, "without-privilege")
			return !strings.Contains(text(d), "no answer in")
		})
		for _, check := range []string{"address", "gateway", "rules"} {
			if f := found(p, d, check); f.Verdict != diagnose.OK || !strings.Contains(f.Found, "the running router reports ") {
				p.Errorf("%s: %+v", check, f)
			}
		}
	})
}

// A container without the router's variables has what the namespace shows, also a second one
// of a pod with an init container.
func TestDiagnoseWithoutVariables(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env = nil
	r := p.Exec("egress-router", "diagnose")
	if r.Code != 1 || r.Stdout != "" || !strings.Contains(r.Stderr, "EGRESS_SOURCE is unset") || !strings.Contains(r.Stderr, "--pid PID") {
		t.Errorf("before the router: %+v", r)
	}
	p.Env = labtest.Example()
	p.OK()
	p.Env = nil
	d := diagnosed(p, p.Lab.Router, "egress-router", "203.0.113.25:80")
	if f := found(p, d, "destination"); f.Verdict != diagnose.OK || !d.OK {
		t.Errorf("diagnosis:\n%s", text(d))
	}
	for check, verdict := range map[string]diagnose.Verdict{"configuration": diagnose.Unknown, "rules": diagnose.Unknown, "address": diagnose.OK, "gateway": diagnose.OK} {
		if f := found(p, d, check); f.Verdict != verdict {
			t.Errorf("%s: %+v", check, f)
		}
	}
}

// The egress interface that the CNI plugin makes has another name, and Multus takes the source off
// its default route.
func TestDiagnoseFindsInterface(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{MacvlanName: "net1"}, labtest.Nftables)
	p.Env["EGRESS_INTERFACE"] = "net1"
	p.OK()
	p.Env = nil
	if r := p.Lab.Router.Do(func() error {
		return exec.Command("ip", "route", "replace", "default", "via", lab.GatewayAddr.String(), "dev", "net1").Run()
	}); r != nil {
		t.Fatal(r)
	}
	r := p.Exec("egress-router", "diagnose", "203.0.113.25:80")
	if r.Code != 0 || !strings.Contains(r.Stdout, "net1, macvlan") || !strings.Contains(r.Stdout, lab.Source.String()+"/24: set, no other host answers for it") {
		t.Errorf("diagnosis: %+v", r)
	}
}

// Of many destinations a sample is probed, at a time, and the diagnosis states so.
func TestDiagnoseSample(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 0, lab.Options{}, func(p *labtest.Pod) {
		var list strings.Builder
		for i := range 10000 {
			fmt.Fprintf(&list, "%d tcp 203.0.113.%d %d\n", 10001+i, 25+i%3, 20000+i)
		}
		file := filepath.Join(p.TempDir(), "destinations")
		if err := os.WriteFile(file, []byte(list.String()), 0o600); err != nil {
			p.Fatal(err)
		}
		p.Env["EGRESS_DESTINATION"], p.Env["EGRESS_DESTINATION_FILE"] = "", file
		p.OK()
		d := diagnosed(p, p.Lab.Router, "egress-router")
		if f := found(p, d, "sample"); !strings.HasPrefix(f.Found, "64 of 10000 destinations probed") || number(d, "destination") != 64 || d.Fault != diagnose.ServerRefuses {
			p.Errorf("%+v, fault %q", f, d.Fault)
		}
	})
}
