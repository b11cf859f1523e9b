package cli

import (
	"slices"
	"sort"
	"strings"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/page"
)

// advices are what to do about a check that is not OK, by its name without a suffix for
// IPv6 or a port. The check itself names what was found.
var advices = map[string]string{
	"kernel":       "Run egress-router diagnose, which names each difference. If the repair is contested, find the program that reverts it.",
	"interface":    "Check what creates it, such as the Multus annotation of the pod.",
	"carrier":      "Check the parent NIC of the node and its switch port.",
	"gateway":      "Wrong NIC or VLAN, or the hypervisor drops frames of an unknown hardware address. Run egress-router diagnose.",
	"address":      "Find the host with this hardware address on the switch, and take the reserved address from it.",
	"destinations": "Correct the destination file. Until then the previous destinations hold.",
	"servers":      "Run egress-router diagnose with the port of the destination.",
	"name":         "Check the pod's name servers. Until they answer, the last addresses hold.",
	"ports":        "Add addresses to EGRESS_SOURCE (with EGRESS_GRAMMAR=extended), or let clients keep connections open.",
	"conntrack":    "Raise net.netfilter.nf_conntrack_max on the node.",
	"standby":      "Read the log of this router.",
	"peers":        "Start a second router, or check that the routers reach each other on the cluster side.",
	"fence":        "Run the router on a node with Linux 5.16 or later, with CONFIG_NETFILTER_EGRESS. EGRESS_STANDBY_FENCE=require refuses other kernels.",
	"flowtable":    "Run the router on a node with Linux 5.16 or later, with flowtables. EGRESS_FLOWTABLE=require refuses other kernels.",
	"endpoints":    "Check that the router may write its EndpointSlice.",
	"log":          "Check the reader of this container's log.",
	"listener":     "Read the log of this proxy.",
	"rules":        "Correct the rule file. Until then the previous rules hold.",
	"connections":  "Raise EGRESS_HTTP_PROXY_MAX_CONNECTIONS, or find the clients that keep connections open.",
	"lookups":      "Check the pod's name servers.",
	"port":         "Check the name and its servers. From the pod, egress-router diagnose tests the path.",
}

// advice returns what to do about a check.
func advice(c health.Check) string {
	if remedy := diagnose.Remedy(diagnose.Fault(c.Fault), config.Names{}); remedy != "" {
		return strings.ToUpper(remedy[:1]) + remedy[1:] + "."
	}
	name, _, _ := strings.Cut(c.Name, " ")
	if name == "interface" && strings.HasSuffix(c.Detail, "without carrier") {
		name = "carrier"
	}
	return advices[strings.TrimSuffix(name, "-ipv6")]
}

// hop returns a hop whose state is the worst of some checks.
func hop(name string, r health.Report, lines []string, checks ...string) page.Hop {
	h := page.Hop{Name: name, Lines: lines}
	for _, c := range r.Checks {
		if slices.Contains(checks, strings.TrimSuffix(c.Name, "-ipv6")) {
			h.Lines = append(h.Lines, c.Detail)
			h.State = max(h.State, c.State)
		}
	}
	return h
}

// matching returns the indices of the rows that contain the query's text, in the order of
// compare, of the query's page, and the number of all of them.
func matching(q page.Query, rows int, text func(i int) string, compare func(i, j int) int) (shown []int, all int) {
	search := strings.ToLower(q.Search)
	for i := range rows {
		if search == "" || strings.Contains(strings.ToLower(text(i)), search) {
			shown = append(shown, i)
		}
	}
	sort.SliceStable(shown, func(i, j int) bool { return compare(shown[i], shown[j]) < 0 })
	from, to := q.Window(len(shown))
	return shown[from:to], len(shown)
}
