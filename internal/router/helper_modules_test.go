package router_test

import (
	"testing"

	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/rules"
)

// A helper that is a module needs the module that translates its messages; one that is part of the
// kernel, and one that translates nothing, need none.
func TestMissingTranslator(t *testing.T) {
	group := func(name string) []rules.Helper {
		for _, g := range rules.HelperGroups {
			if g.Name == name {
				return g.Helpers
			}
		}
		t.Fatalf("no helper %s", name)
		return nil
	}
	const reader, translator = "nf_conntrack_ftp 20480 2 nf_nat_ftp, Live 0x0000000000000000\n", "nf_nat_ftp 16384 0 - Live 0x0000000000000000\n"
	for _, test := range []struct{ helper, modules, want string }{
		{"ftp", reader + translator, ""},
		{"ftp", "", ""},
		{"ftp", "ext4 983040 1 - Live 0x0000000000000000\n", ""},
		{"sane", "nf_conntrack_sane 16384 2 - Live 0x0000000000000000\n", ""},
		{"ftp", reader, `the kernel does not translate the messages of "ftp" for tcp: module nf_nat_ftp is not loaded`},
		{"tftp", reader, ""},
		{"snmp", "nf_conntrack_snmp 16384 2 - Live 0x0000000000000000\n", `the kernel does not translate the messages of "snmp" for udp: module nf_nat_snmp_basic is not loaded`},
	} {
		got := ""
		if err := router.MissingTranslator(group(test.helper), test.modules); err != nil {
			got = err.Error()
		}
		if got != test.want {
			t.Errorf("%s with modules %q:\n got %s\nwant %s", test.helper, test.modules, got, test.want)
		}
	}
}
