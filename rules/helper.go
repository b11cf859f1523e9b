package rules

import (
	"fmt"
	"slices"
	"strings"

	"github.com/egress-router/egress-router/internal/wording"
)

// A Helper is a helper of the kernel's connection tracking: it reads a protocol whose
// server or client opens further connections, expects these, and translates the
// addresses in the messages that announce them (nf_conntrack_helper.h).
type Helper struct {
	Name     string // the kernel's name
	Protocol Protocol
	Port     Port // the protocol's port on servers (IANA)
}

// A HelperGroup is the helpers of one protocol.
type HelperGroup struct {
	Name    string
	Helpers []Helper
	Modules string // kernel modules that contain them
}

// HelperGroups lists the helpers by the name of their protocol.
var HelperGroups = []HelperGroup{
	{"amanda", []Helper{{"amanda", UDP, 10080}}, "nf_conntrack_amanda nf_nat_amanda"},
	{"ftp", []Helper{{"ftp", TCP, 21}}, "nf_conntrack_ftp nf_nat_ftp"},
	{"h323", []Helper{{"Q.931", TCP, 1720}, {"RAS", UDP, 1719}}, "nf_conntrack_h323 nf_nat_h323"},
	{"irc", []Helper{{"irc", TCP, 6667}}, "nf_conntrack_irc nf_nat_irc"},
	{"netbios-ns", []Helper{{"netbios-ns", UDP, 137}}, "nf_conntrack_netbios_ns"},
	{"pptp", []Helper{{"pptp", TCP, 1723}}, "nf_conntrack_pptp nf_nat_pptp"},
	{"sane", []Helper{{"sane", TCP, 6566}}, "nf_conntrack_sane"},
	{"sip", []Helper{{"sip", TCP, 5060}, {"sip", UDP, 5060}}, "nf_conntrack_sip nf_nat_sip"},
	{"snmp", []Helper{{"snmp", UDP, 161}}, "nf_conntrack_snmp nf_nat_snmp_basic"},
	{"tftp", []Helper{{"tftp", UDP, 69}}, "nf_conntrack_tftp nf_nat_tftp"},
}

// Modules returns the kernel modules that contain a helper.
func (h Helper) Modules() string {
	for _, g := range HelperGroups {
		if slices.ContainsFunc(g.Helpers, func(other Helper) bool { return other.Name == h.Name }) {
			return g.Modules
		}
	}
	return "nf_conntrack_" + strings.ToLower(h.Name)
}

// onlyIPv4 are the helpers that the kernel has for IPv4 alone (net/netfilter,
// nf_conntrack_irc.c, nf_conntrack_netbios_ns.c, nf_conntrack_pptp.c and
// nf_conntrack_snmp.c).
var onlyIPv4 = []string{"irc", "netbios-ns", "pptp", "snmp"}

// has reports whether the kernel has the helper for a family.
func (h Helper) has(f Family) bool { return f == IPv4 || !slices.Contains(onlyIPv4, h.Name) }

// helperRules returns the rules that attach the helpers to connections, by the port
// of their server. Without a redirect for it, a connection to a helper's port has
// it if it crosses all the same.
func helperRules(f Family, set Set, sides Sides) []Rule {
	var rules []Rule
	add := func(h Helper, first, last Port) {
		rules = append(rules, Rule{In: sides.Cluster, Protocol: h.Protocol, Port: first, Last: last, Target: AttachHelper, Helper: h.Name})
	}
	for _, h := range sides.Helpers {
		if !h.has(f) {
			continue
		}
		crosses := set.FallbackOf(f).IsValid() || sides.Crossing == CrossAll
		for _, r := range set.Redirects {
			if r.Protocol != h.Protocol || FamilyOf(r.To) != f {
				continue
			}
			if r.Contains(h.Protocol, h.Port) {
				crosses = false // its own server decides
			}
			if first, last, ok := r.portsTo(h.Port); ok {
				add(h, first, last)
			}
		}
		if crosses {
			add(h, h.Port, 0)
		}
	}
	return rules
}

// Translator returns the module that translates the addresses in the messages that a helper reads,
// which the kernel does not load by itself: it finds the helper, and leaves the messages as they are
// (nf_nat_ftp_hook and others, in net/netfilter). Empty: the protocol has none.
func (h Helper) Translator() string {
	for module := range strings.FieldsSeq(h.Modules()) {
		if strings.HasPrefix(module, "nf_nat_") {
			return module
		}
	}
	return ""
}

// A HelperError means that the kernel lacks a helper, or only the module that translates its messages.
type HelperError struct {
	Helper Helper
	Err    error // of the load; nil: the kernel has the helper, and lacks its translator
}

func (e *HelperError) Error() string {
	if e.Err == nil {
		return fmt.Sprintf("the kernel does not translate the messages of %q for %s: module %s is not loaded", e.Helper.Name, e.Helper.Protocol, e.Helper.Translator())
	}
	return fmt.Sprintf("the kernel has no conntrack helper %q for %s: %v", e.Helper.Name, e.Helper.Protocol, e.Err)
}

// Unwrap returns the error of the load.
func (e *HelperError) Unwrap() error { return e.Err }

// Hint returns advice for the user.
func (e *HelperError) Hint(names wording.Names) string {
	return wording.Textf("load its modules on the node: modprobe -a %s, with iptables also xt_CT; or remove it from %s", e.Helper.Modules(), wording.Helpers).In(names)
}
