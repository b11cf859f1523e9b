package cli

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/iptables"
	"github.com/egress-router/egress-router/rules"
)

var update = flag.Bool("update", false, "rewrite the files in testdata/golden")

// The environments of the golden files, by name. Each file contains the output of
// unit-test, the input of iptables-restore, and the output of plan.
var environments = map[string]config.Environment{
	"example": {
		Mode: "init", Source: "192.168.12.99/24", Gateway: "192.168.12.1",
		Destination: "80   tcp 203.0.113.25\n8080 tcp 203.0.113.26 80\n8443 tcp 203.0.113.26 443\n203.0.113.27\n",
	},
	"fallback-only": {Source: "192.168.12.99", Gateway: "192.168.12.1", Destination: "203.0.113.27"},
	"no-fallback":   {Mode: "init", Source: "192.168.12.99", Gateway: "192.168.12.1", Destination: "53 udp 203.0.113.25\n5432 tcp 203.0.113.26 5432"},
	"comments-only": {Mode: "init", Source: "192.168.12.99", Gateway: "192.168.12.1", Destination: "# none yet\n"},
	"interfaces": {
		Mode: "init", Source: "192.168.12.99/24", Gateway: "192.168.12.1", Destination: "80 tcp 203.0.113.25",
		Interface: "net1", ClusterInterface: "net0",
	},
	"open": {
		Mode: "init", Source: "192.168.12.99", Gateway: "192.168.12.1", Destination: "80 tcp 203.0.113.25", Forward: "open",
	},
	"helpers": {
		Mode: "init", Source: "192.168.12.99", Gateway: "192.168.12.1", Destination: "2121 tcp 203.0.113.25 21\n203.0.113.27", Helpers: "ftp,sip",
	},
	"extended": {
		Mode: "init", Source: "192.168.12.99/24", Gateway: "192.168.12.1", Grammar: "extended",
		Destination: "53 tcp,udp 203.0.113.25 # names\n3868 sctp 203.0.113.26\n6000-6010 udp 203.0.113.26\n7000-7100 tcp 203.0.113.26 17000-17100\n40000-41000 tcp 203.0.113.25 443\n443 tcp 203.0.113.25,203.0.113.26,203.0.113.27 8443\n",
	},
	"names": {
		Mode: "init", Source: "192.168.12.99/24", Gateway: "192.168.12.1", Grammar: "extended",
		Destination: "443 tcp db.example.com 5432\n444-446 udp db.example.com drain=no\n80 tcp 203.0.113.25\n203.0.113.27\n",
	},
	"dual-stack": {
		Mode: "init", Source: "192.168.12.99/24, 192.168.12.100/24, 2001:db8:12::99/64", Gateway: "192.168.12.1, fe80::1", Grammar: "extended",
		Destination: "80 tcp 203.0.113.25\n80 tcp 2001:db8::25\n203.0.113.27\n2001:db8::27\n",
	},
	"limits": {
		Mode: "init", Source: "192.168.12.99/24", Gateway: "192.168.12.1", Grammar: "extended",
		Destination: "443 tcp 203.0.113.25 limit=100/s burst=200 max=500\n53 udp 203.0.113.25 limit=90/m\n8000-8010 tcp 203.0.113.26 max=20\n444 tcp db.example.com max=9 drain=no\n80 tcp 203.0.113.26\n203.0.113.27\n",
	},
	"large": {Mode: "init", Source: "192.168.12.99", Gateway: "192.168.12.1", Destination: manyLines(40)},
	"macvlan": {
		Mode: "init", Source: "192.168.12.99/24", Gateway: "192.168.12.1", Destination: "80 tcp 203.0.113.25",
		MacvlanParent: "true",
	},
	"macvlan-named": {
		Mode: "http-proxy", Source: "192.168.12.99/24", Gateway: "192.168.12.1", Interface: "net1",
		MacvlanParent: "ens3", MacvlanMode: "bridge", HostNetns: "/host/proc/1/ns/net",
	},
	"dns-proxy": {Mode: "dns-proxy", Source: "192.168.12.99/24", Gateway: "192.168.12.1"},
}

// manyLines returns more lines than fit in a plain chain, of both protocols.
func manyLines(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%d tcp 203.0.113.26 443\n", 10001+i)
	}
	return b.String() + "53 udp 203.0.113.25\n203.0.113.27\n"
}

// golden returns the content of the golden file of an environment.
func golden(t *testing.T, env config.Environment) string {
	t.Helper()
	c, err := config.Parse(env, os.ReadFile)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if c.Mode.Redirects() {
		fmt.Fprintf(&b, "-- unit-test --\n%s", rules.UnitTest(c.Set, c.Sides()))
	}
	fmt.Fprintf(&b, "-- iptables-restore --\n%s", iptables.RestoreInput(c.Plan(), rules.IPv4))
	fmt.Fprintf(&b, "-- ip6tables-restore --\n%s", iptables.RestoreInput(c.Plan(), rules.IPv6))
	fmt.Fprintf(&b, "-- plan --\n%s", planText(c))
	return b.String()
}

func TestGolden(t *testing.T) {
	for name, env := range environments {
		t.Run(name, func(t *testing.T) {
			got := golden(t, env)
			file := filepath.Join("../../testdata/golden", name+".txt")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil { //nolint:gosec // it is for everybody to read
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s: -want +got (make golden rewrites it):\n%s", file, diff)
			}
			if env.Grammar == "" && env.Destination != "" {
				env.Grammar = "extended"
				if diff := cmp.Diff(got, golden(t, env)); diff != "" {
					t.Errorf("the extended grammar gives something else:\n%s", diff)
				}
			}
		})
	}
	files, err := filepath.Glob("../../testdata/golden/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if _, known := environments[strings.TrimSuffix(filepath.Base(file), ".txt")]; !known {
			t.Errorf("%s belongs to no environment", file)
		}
	}
}
