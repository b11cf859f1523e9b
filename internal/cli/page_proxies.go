package cli

import (
	"cmp"
	"fmt"

	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/httpproxy"
	"github.com/egress-router/egress-router/internal/page"
	"github.com/egress-router/egress-router/internal/tcpproxy"
)

// showHTTPProxy adds the parts of the HTTP proxy to a page.
func showHTTPProxy(p *page.Page, q page.Query, proxy *httpproxy.Proxy) {
	s, hits := proxy.Status(), proxy.Hits()
	lookups := hop("Names", p.Report, []string{fmt.Sprintf("%s lookups, %s failed", page.Count(s.Lookups), page.Count(s.LookupFailures))}, "lookups")
	p.Path = []page.Hop{
		hop("Clients", p.Report, nil, "connections"), hop("Proxy", p.Report, nil, "listener"), hop("Rules", p.Report, []string{page.Count(s.Denied) + " requests denied"}, "rules"), lookups,
		{Name: "Servers", Lines: []string{page.Count(s.ConnectFailures) + " failed connections"}},
	}
	p.Tables = []page.Table{ruleTable(q, s, hits), requestTable(s)}
}

// ruleTable returns the rules with their hits, in the order in which they decide.
func ruleTable(q page.Query, s httpproxy.Status, hits []httpproxy.Hits) page.Table {
	t := page.Table{
		ID: "rules", Title: "Rules and hits", None: "No rule matches.", Searches: true,
		Note:    fmt.Sprintf("%s rules. The first one that matches decides. %s requests and tunnels were denied.", page.Count(s.Rules), page.Count(s.Denied)),
		Columns: []page.Column{{Title: "Number", Number: true}, {Title: "Rule"}, {Title: "Decision"}, {Title: "Hits", Number: true}},
	}
	text := func(i int) string {
		if hits[i].Rule.Number == 0 {
			return "no rule matches"
		}
		return hits[i].Rule.String()
	}
	shown, all := matching(q, len(hits), text, cmp.Compare[int])
	t.Matching = all
	for _, i := range shown {
		r := hits[i].Rule
		number, decision := "", "denied"
		if r.Number > 0 {
			number = page.Count(r.Number)
			if !r.Deny {
				decision = "allowed"
			}
		}
		t.Rows = append(t.Rows, page.Row{Cells: []string{number, text(i), decision, page.Count(hits[i].Count)}})
	}
	return t
}

// requestTable returns the requests and tunnels by the class of their status.
func requestTable(s httpproxy.Status) page.Table {
	t := page.Table{
		ID: "requests", Title: "Requests", Note: fmt.Sprintf("%s are active. They are counted when they end.", page.Count(s.Running)),
		Columns: []page.Column{{Title: "Kind"}},
	}
	for _, class := range httpClasses {
		t.Columns = append(t.Columns, page.Column{Title: class, Number: true})
	}
	t.Columns = append(t.Columns, page.Column{Title: "Sent", Number: true}, page.Column{Title: "Received", Number: true})
	for kind, classes := range s.Requests {
		row := page.Row{Cells: []string{httpproxy.Kind(kind).String()}}
		for _, n := range classes {
			row.Cells = append(row.Cells, page.Count(n))
		}
		row.Cells = append(row.Cells, page.Bytes(float64(s.Sent[kind])), page.Bytes(float64(s.Received[kind])))
		t.Rows = append(t.Rows, row)
	}
	return t
}

// show adds the parts of the DNS proxy to a page.
func (d *dnsProxy) show(p *page.Page, q page.Query) {
	list := d.proxy.Status()
	var open, failed, lookups, lookupFailures int64
	worst := health.OK
	checks := make([]health.Check, len(list))
	for i, s := range list {
		open, failed = open+s.Open, failed+s.Failed
		lookups, lookupFailures = lookups+s.Lookups, lookupFailures+s.LookupFailures
		checks[i] = portCheck(s)
		worst = max(worst, checks[i].State)
	}
	p.Path = []page.Hop{
		{Name: "Clients", Lines: []string{page.Count(open) + " connections"}}, hop("Proxy", p.Report, nil, listCheck),
		{Name: "Names", Lines: []string{fmt.Sprintf("%s lookups, %s failed", page.Count(lookups), page.Count(lookupFailures))}},
		{Name: "Servers", Lines: []string{page.Count(failed) + " failed connections"}, State: worst},
	}
	p.Tables = []page.Table{portsTable(q, list, checks)}
}

// portsTable returns the destinations of the DNS proxy, those with a fault first.
func portsTable(q page.Query, list []tcpproxy.Status, checks []health.Check) page.Table {
	t := page.Table{
		ID: "destinations", Title: "Destinations", None: "No destination matches.", Searches: true, Note: page.Count(len(list)) + " destinations.",
		Columns: []page.Column{{Title: "Port", Number: true}, {Title: "Destination"}, {Title: "Open", Number: true}, {Title: "Connections", Number: true},
			{Title: "Failed", Number: true}, {Title: "Sent", Number: true}, {Title: "Received", Number: true}},
	}
	text := func(i int) string {
		return fmt.Sprintf("%d %s", list[i].Destination.Port, checks[i].Detail)
	}
	shown, all := matching(q, len(list), text, func(i, j int) int {
		return cmp.Or(int(checks[j].State-checks[i].State), cmp.Compare(list[j].Connections, list[i].Connections))
	})
	t.Matching = all
	for _, i := range shown {
		s, check := &list[i], checks[i]
		t.Rows = append(t.Rows, page.Row{State: check.State, Cells: []string{
			fmt.Sprint(s.Destination.Port), check.Detail, page.Count(s.Open), page.Count(s.Connections), page.Count(s.Failed),
			page.Bytes(float64(s.Sent)), page.Bytes(float64(s.Received)),
		}})
	}
	return t
}
