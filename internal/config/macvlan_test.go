package config

import (
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/spec"
	"github.com/google/go-cmp/cmp"
)

func TestMacvlan(t *testing.T) {
	for name, test := range map[string]struct {
		parent, mode, netns string
		want                *spec.Macvlan
		warnings            []string
	}{
		"no macvlan":          {},
		"the default route's": {parent: "true", want: &spec.Macvlan{Mode: spec.Private, HostNetns: "/proc/1/ns/net"}},
		"by name":             {parent: "ens3", want: &spec.Macvlan{Parent: "ens3", Mode: spec.Private, HostNetns: "/proc/1/ns/net"}},
		"one letter":          {parent: "t", want: &spec.Macvlan{Parent: "t", Mode: spec.Private, HostNetns: "/proc/1/ns/net"}},
		"private":             {parent: "bond0.7", mode: "private", want: &spec.Macvlan{Parent: "bond0.7", Mode: spec.Private, HostNetns: "/proc/1/ns/net"}},
		"bridge":              {parent: "ens3", mode: "bridge", want: &spec.Macvlan{Parent: "ens3", Mode: spec.Bridge, HostNetns: "/proc/1/ns/net"}},
		"vepa":                {parent: "ens3", mode: "vepa", want: &spec.Macvlan{Parent: "ens3", Mode: spec.VEPA, HostNetns: "/proc/1/ns/net"}},
		"passthru":            {parent: "ens3", mode: "passthru", want: &spec.Macvlan{Parent: "ens3", Mode: spec.Passthru, HostNetns: "/proc/1/ns/net"}},
		"another file":        {parent: "ens3", netns: "/host/proc/1/ns/net", want: &spec.Macvlan{Parent: "ens3", Mode: spec.Private, HostNetns: "/host/proc/1/ns/net"}},
		"a mode alone":        {mode: "bridge", warnings: []string{"EGRESS_MACVLAN_MODE has no effect without EGRESS_MACVLAN_PARENT"}},
		"a namespace alone":   {netns: "/x", warnings: []string{"EGRESS_HOST_NETNS has no effect without EGRESS_MACVLAN_PARENT"}},
	} {
		t.Run(name, func(t *testing.T) {
			env := good()
			env.MacvlanParent, env.MacvlanMode, env.HostNetns = test.parent, test.mode, test.netns
			c, err := Parse(env, noFile)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, c.Macvlan); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
			if diff := cmp.Diff(test.warnings, c.Warnings); diff != "" {
				t.Errorf("warnings: - want, + got:\n%s", diff)
			}
		})
	}
}

// A boolean that is not spelt true is no NIC: the router does not look for one in the
// host's namespace.
func TestMacvlanParentIsNoBoolean(t *testing.T) {
	for value, hint := range map[string]string{
		"false": "unset the variable", "False": "unset the variable", "FALSE": "unset the variable", "no": "unset the variable", "off": "unset the variable",
		"0": "unset the variable", "disabled": "unset the variable",
		"True": "write true", "TRUE": "write true", "yes": "write true", "on": "write true", "1": "write true",
	} {
		env := good()
		env.MacvlanParent = value
		_, err := Parse(env, noFile)
		if err == nil || !strings.HasSuffix(err.Error(), "EGRESS_MACVLAN_PARENT \""+value+"\" is not a NIC of the host") || !strings.HasPrefix(err.Error(), "hint: "+hint) {
			t.Errorf("%q: %v", value, err)
		}
	}
}

func TestMacvlanFaults(t *testing.T) {
	env := good()
	env.MacvlanParent, env.MacvlanMode = "eth0:1", "ipvlan"
	_, err := Parse(env, noFile)
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{
		`EGRESS_MACVLAN_PARENT "eth0:1" is not an interface name: it contains ':'`,
		`EGRESS_MACVLAN_MODE "ipvlan" is not a mode of a macvlan`,
		"hint: the modes are private, bridge, vepa, passthru\n",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in:\n%v", want, err)
		}
	}
	// The mode is checked even without a macvlan.
	env.MacvlanParent = ""
	if _, err := Parse(env, noFile); err == nil {
		t.Error("invalid mode accepted without a parent")
	}
}
