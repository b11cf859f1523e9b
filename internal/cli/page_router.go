package cli

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/page"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

const (
	// viewEvery is the least time between two looks at the kernel for pages, however many
	// readers there are.
	viewEvery = time.Second
	// viewKept is how long the last two looks stay in memory without a reader: 10,000
	// destinations have 5 MB.
	viewKept = time.Minute
	// mostConnections is the number of connections on the page.
	mostConnections = page.RowsPerPage
	// mostPortRows is the number of servers with their ports in use on the page.
	mostPortRows = 20
	// refusedFor is how long a destination is one that fails after it has refused a connection:
	// the kernel keeps no entry of that.
	refusedFor = time.Minute
)

// A viewer makes the router's page. It counts nothing while there is no reader.
type viewer struct {
	watch *watch
	view  func() *view // looks at the kernel

	mu          sync.Mutex
	last, older *view       // nil: none
	forget      *time.Timer // nil: not needed yet
}

// A view is what the page shows, at a time.
type view struct {
	at      time.Time
	trouble string // why there are no counters; empty: there are

	conntrack.Report
	lines          []answers // of the Report's lines
	clients, own   int       // connections, and those of the pod itself
	unreplied      int       // of clients
	connections    []conntrack.Connection
	ranged         int // see portLimit
	entries, limit int // of the kernel's table; limit 0: unknown
}

// answers are the open connections of a destination, over protocols that have an answer.
type answers struct{ replied, unreplied int }

// look returns the last view and one before it, from which rates follow; nil: there is none.
// asked is the time of the request: one that has waited for a look gets that, however long it
// took, which is seconds with a million connections.
func (v *viewer) look(asked time.Time) (now, before *view) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.last == nil || asked.Sub(v.last.at) >= viewEvery {
		v.last, v.older = v.view(), v.last
	}
	if v.forget == nil {
		v.forget = time.AfterFunc(viewKept, func() {
			v.mu.Lock()
			defer v.mu.Unlock()
			v.last, v.older = nil, nil
		})
	}
	v.forget.Reset(viewKept)
	return v.last, v.older
}

// view reads the counters and the connections.
func (w *watch) view() *view {
	v := &view{at: time.Now(), ranged: w.ports.ranged}
	if t := w.tracker.Load(); t == nil {
		v.trouble = "connection tracking is not available: see the log"
	} else if report, err := t.Counts(); err != nil {
		v.trouble = wording.OneLine(err.Error())
	} else {
		v.Report = report
		w.ports.check(report.Ports)
		v.entries, v.limit, _ = t.Fill() // beside the counters
	}
	if v.trouble != "" {
		set := &w.config.Set
		if last := w.set.Load(); last != nil {
			set = last
		}
		for _, r := range set.Redirects {
			v.Lines = append(v.Lines, conntrack.Line{Redirect: r})
		}
		for _, to := range set.Fallbacks() {
			v.Lines = append(v.Lines, conntrack.Line{Redirect: rules.Redirect{To: to}})
		}
	}
	if err := v.read(w.config.Sources.Addresses()); err != nil {
		v.trouble = wording.OneLine(err.Error())
	}
	return v
}

// read reads the connections. Of any number it keeps those that the page shows.
func (v *view) read(sources []netip.Addr) error {
	redirects := make([]rules.Redirect, 0, len(v.Lines))
	for _, l := range v.Lines {
		if l.Protocol != 0 { // the fallbacks are the last ones
			redirects = append(redirects, l.Redirect)
		}
	}
	lookup := rules.NewLookup(redirects)
	v.lines = make([]answers, len(v.Lines))
	err := conntrack.Each(sources, func(c conntrack.Connection) {
		v.connections = append(v.connections, c)
		if len(v.connections) == 4*mostConnections {
			v.sort()
		}
		if !c.Redirected {
			v.own++
			return
		}
		v.clients++
		if c.Closed {
			return
		}
		if c.Replied || c.Protocol == rules.UDP { // which may be one-way
			if i := v.lineOf(lookup, c); i >= 0 {
				v.lines[i].replied++
			}
			return
		}
		v.unreplied++
		if i := v.lineOf(lookup, c); i >= 0 {
			v.lines[i].unreplied++
		}
	})
	v.sort()
	return err
}

// lineOf returns the index of the destination of a connection, negative if it is none of
// the list.
func (v *view) lineOf(lookup rules.Lookup, c conntrack.Connection) int {
	server := c.Server.Addr()
	if i, ok := lookup.Find(rules.FamilyOf(server), c.Protocol, rules.Port(c.Local.Port())); ok {
		return i
	}
	for i := len(v.Lines) - 1; i >= 0 && v.Lines[i].Protocol == 0; i-- {
		if v.Lines[i].To == server {
			return i
		}
	}
	return -1
}

// sort keeps the first connections of the page: those of clients without an answer, then
// those with most bytes.
func (v *view) sort() {
	rank := func(c *conntrack.Connection) int {
		switch {
		case !c.Redirected:
			return 2
		case c.Replied || c.Protocol == rules.UDP:
			return 1
		}
		return 0
	}
	// sort.Slice is 10 KB smaller than slices.SortFunc of this type.
	sort.Slice(v.connections, func(i, j int) bool {
		a, b := &v.connections[i], &v.connections[j]
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(b.BytesOut+b.BytesIn, a.BytesOut+a.BytesIn), a.Server.Compare(b.Server), a.Client.Compare(b.Client)) < 0
	})
	if len(v.connections) > mostConnections {
		v.connections = slices.Clip(v.connections[:mostConnections])
	}
}

// show adds the router's parts to a page.
func (v *viewer) show(p *page.Page, q page.Query) {
	w := v.watch
	s := w.keeper.Status()
	now, before := v.look(p.Now)
	p.Standby = !p.Report.Ready && w.standsBy(p.Report)
	failures, failing := w.failures(now, s.Probes)
	p.Path = w.hops(p.Report, now, failing)
	if w.standby != nil {
		p.Tables = append(p.Tables, memberTable(p.Report.Routers, p.Now))
	}
	p.Tables = append(p.Tables, w.destinationTable(q, now, before, failures, failing), now.connectionTable(p.Now), now.portTable(w.config.Sources.String()))
}

// memberTable returns the routers with the same addresses.
func memberTable(routers []health.Member, now time.Time) page.Table {
	t := page.Table{
		ID: "routers", Title: "Routers", None: "No router is known.", Note: "No router is known to hold the addresses.",
		Columns: []page.Column{{Title: "Router"}, {Title: "Role"}, {Title: "Could take over"}, {Title: "Priority", Number: true}, {Title: "Hardware address"}, {Title: "Last heartbeat"}},
	}
	for _, r := range routers {
		row := page.Row{Cells: []string{r.Address.String(), r.Role, "yes", page.Count(r.Priority), r.MAC, health.Age(r.Heard, now) + " ago"}}
		if r.Own {
			row.Cells[0], row.Cells[5] = r.Address.String()+" (this one)", "-"
		}
		if !r.Ready {
			row.State, row.Cells[2] = health.Warning, "no"
		}
		if r.Holds {
			t.Note = r.Address.String() + " holds the addresses."
		}
		t.Rows = append(t.Rows, row)
	}
	return t
}

// standsBy reports whether the router is not ready only because another one holds its
// addresses.
func (w *watch) standsBy(r health.Report) bool {
	if w.standby == nil || len(r.Reasons) != 1 || r.Reasons[0] != notHolder {
		return false
	}
	role := w.standby.Status().Role
	return role != election.Active && role != election.Resuming
}

// hops returns the path of a packet from the clients to the servers, of which some
// destinations fail.
func (w *watch) hops(r health.Report, now *view, failing int) []page.Hop {
	open := 0
	for _, l := range now.Lines {
		open += l.Open
	}
	clients := page.Hop{Name: "Clients", Lines: []string{page.Count(open) + " open connections"}}
	if now.unreplied > 0 {
		clients.Lines = append(clients.Lines, page.Count(now.unreplied)+" without an answer")
	}
	cluster := page.Hop{Name: "Cluster side", Lines: append([]string{w.config.Cluster}, addressesOf(w.config.Cluster)...)}
	if len(cluster.Lines) == 1 {
		cluster.State, cluster.Lines = health.Failed, append(cluster.Lines, "no address")
	}
	servers := hop("Servers", r, nil, "servers", "name")
	if len(servers.Lines) == 0 {
		servers.Lines = []string{"not probed: EGRESS_PROBE=tcp probes them"}
	}
	if failing > 0 {
		servers.Lines = append(servers.Lines, "destinations with a failure: "+page.Count(failing))
		servers.State = max(servers.State, health.Warning)
	}
	return []page.Hop{
		clients, cluster, hop("Rules", r, nil, "kernel", "destinations", "standby", "ports", "conntrack"),
		hop("Egress side", r, nil, "interface", "address"), hop("Gateway", r, nil, "gateway"), servers,
	}
}

// addressesOf returns the addresses of an interface, without those of the link.
func addressesOf(name string) (texts []string) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil
	}
	addresses, _ := i.Addrs() // none, as far as the page knows
	for _, a := range addresses {
		if p, err := netip.ParsePrefix(a.String()); err == nil && !p.Addr().IsLinkLocalUnicast() {
			texts = append(texts, p.Addr().String())
		}
	}
	return texts
}

// destinationTable returns the destinations, those with a failure first, then those with
// most connections.
func (w *watch) destinationTable(q page.Query, now, before *view, failures []string, failing int) page.Table {
	t := page.Table{
		ID: "destinations", Title: "Destinations", None: "No destination matches.", Searches: true,
		Columns: []page.Column{{Title: "Port"}, {Title: "Destination"}, {Title: "Failure"}, {Title: "Open", Number: true}, {Title: "Connections", Number: true},
			{Title: "Per second", Number: true}, {Title: "Sent", Number: true}, {Title: "Received", Number: true}, {Title: "Rate", Number: true}},
	}
	text := func(i int) string { port, to := w.destinationText(&now.Lines[i]); return port + " " + to }
	shown, all := matching(q, len(now.Lines), text, func(i, j int) int {
		return cmp.Or(int(oneIf(failures[j] != "")-oneIf(failures[i] != "")), cmp.Compare(now.Lines[j].Connections, now.Lines[i].Connections))
	})
	t.Matching = all
	t.Note = fmt.Sprintf("%s destinations, %s with a failure. Counters begin with the process.", page.Count(len(now.Lines)), page.Count(failing))
	if now.trouble != "" {
		t.Note = "No counters: " + now.trouble
	}
	for _, i := range shown {
		l := &now.Lines[i]
		port, to := w.destinationText(l)
		row := page.Row{Cells: []string{port, to, failures[i] + past(l, failures[i]), page.Count(l.Open), page.Count(l.Connections), "", "", "", ""}}
		if failures[i] != "" {
			row.State = health.Warning
		}
		if now.Accounted {
			row.Cells[6], row.Cells[7] = page.Bytes(float64(l.BytesOut)), page.Bytes(float64(l.BytesIn))
		}
		if before != nil && i < len(before.Lines) && continues(&before.Lines[i], l) {
			row.Cells[5], row.Cells[8] = now.rates(before, i)
		}
		t.Rows = append(t.Rows, row)
	}
	return t
}

// past returns the failures of connections that have ended, after those of now. A client that
// has given up does not make a destination one that fails, a refusal does for a minute.
func past(l *conntrack.Line, now string) string {
	var parts []string
	if l.Refused > 0 {
		parts = append(parts, page.Count(l.Refused)+" refused")
	}
	if l.Unanswered > 0 {
		parts = append(parts, page.Count(l.Unanswered)+" unanswered")
	}
	if len(parts) == 0 {
		return ""
	}
	text := "so far " + strings.Join(parts, ", ")
	if now != "" {
		text = "; " + text
	}
	return text
}

// continues reports whether a destination's counters have gone on since an earlier view: they
// begin again if it was not in the list for a time.
func continues(before, now *conntrack.Line) bool {
	return before.Redirect == now.Redirect && before.Connections <= now.Connections && before.BytesOut <= now.BytesOut && before.BytesIn <= now.BytesIn
}

// rates returns the connections and the bytes per second of a destination since the view
// before.
func (v *view) rates(before *view, i int) (connections, bytes string) {
	l, b, seconds := &v.Lines[i], &before.Lines[i], v.at.Sub(before.at).Seconds()
	connections = fmt.Sprintf("%.1f", float64(l.Connections-b.Connections)/seconds)
	if v.Accounted {
		bytes = page.Bytes((float64(l.BytesOut-b.BytesOut)+float64(l.BytesIn-b.BytesIn))/seconds) + "/s"
	}
	return connections, bytes
}

// failures returns what is wrong with each destination, and the number of those with a
// failure.
func (w *watch) failures(now *view, probes []router.Probe) (failures []string, failing int) {
	failed := make(map[netip.AddrPort]string)
	for _, p := range probes {
		if p.Err != "" {
			failed[p.To] = p.Err
		}
	}
	failures = make([]string, len(now.Lines))
	for i := range now.Lines {
		if failures[i] = w.failure(&now.Lines[i], now.lines[i], failed, now.at); failures[i] != "" {
			failing++
		}
	}
	return failures, failing
}

// failure returns what is wrong with a destination; empty: nothing is known to be.
func (w *watch) failure(l *conntrack.Line, open answers, failed map[netip.AddrPort]string, now time.Time) string {
	var parts []string
	if len(failed) > 0 && l.Protocol == rules.TCP && l.ToOnePort() {
		addresses := l.All()
		if name := l.Name(); name != "" {
			addresses = slices.Values(w.addresses(name))
		}
		for a := range addresses {
			to := netip.AddrPortFrom(a, l.Server(l.Port).Port())
			if why := failed[to]; why != "" {
				parts = append(parts, fmt.Sprintf("probe of %s: %s", to, why))
			}
		}
	}
	if open.unreplied > 0 {
		parts = append(parts, fmt.Sprintf("%s of %s open connections without an answer", page.Count(open.unreplied), page.Count(open.unreplied+open.replied)))
	}
	if !l.LastRefused.IsZero() && now.Sub(l.LastRefused) < refusedFor {
		parts = append(parts, "a connection refused "+health.Age(l.LastRefused, now)+" ago")
	}
	return strings.Join(parts, "; ")
}

// destinationText returns the local port and the server of a destination.
func (w *watch) destinationText(l *conntrack.Line) (port, to string) {
	if l.Protocol == 0 {
		return "others", l.To.String()
	}
	to = l.Destination()
	if strings.Contains(to, ":") {
		to = "[" + to + "]"
	}
	to += ":" + l.ToPorts()
	if name := l.Name(); name != "" {
		to += " (" + diagnose.AddressText(w.addresses(name)) + ")"
	}
	return l.Protocol.String() + " " + l.LocalPorts(), to
}

// connectionTable returns the connections.
func (v *view) connectionTable(now time.Time) page.Table {
	t := page.Table{
		ID: "connections", Title: "Connections", None: "No connection.",
		Note: fmt.Sprintf("%s connections of clients, %s of them without an answer, and %s of the pod itself.", page.Count(v.clients), page.Count(v.unreplied), page.Count(v.own)),
		Columns: []page.Column{{Title: "Protocol"}, {Title: "State"}, {Title: "Client"}, {Title: "Port", Number: true}, {Title: "Server"}, {Title: "Source"},
			{Title: "Sent", Number: true}, {Title: "Received", Number: true}},
	}
	// Only with an audit log the kernel keeps times.
	timed := slices.ContainsFunc(v.connections, func(c conntrack.Connection) bool { return !c.Began.IsZero() })
	if timed {
		t.Columns = append(t.Columns, page.Column{Title: "Age", Number: true})
	}
	if more := v.clients + v.own - len(v.connections); more > 0 {
		t.Note += fmt.Sprintf(" %d are shown, those without an answer first, then those with most bytes; egress-router connections lists all.", len(v.connections))
	}
	for _, c := range v.connections {
		f := flowOf(c)
		client, sent, received := c.Client.String(), "", ""
		if f.Own {
			client = "the pod"
		}
		if c.Accounted {
			sent, received = page.Bytes(float64(c.BytesOut)), page.Bytes(float64(c.BytesIn))
		}
		row := page.Row{Cells: []string{f.Protocol, f.status(), client, fmt.Sprint(f.Port), f.Server.String(), f.Source.String(), sent, received}}
		if timed {
			row.Cells = append(row.Cells, health.Age(c.Began, now))
		}
		if !f.Own && !f.Replied && c.Protocol != rules.UDP {
			row.State = health.Warning
		}
		t.Rows = append(t.Rows, row)
	}
	return t
}

// portTable returns the ports of the reserved addresses that are in use, the most used
// first.
func (v *view) portTable(sources string) page.Table {
	t := page.Table{
		ID: "sources", Title: "Sources and ports", None: "No port is in use.",
		Note:    fmt.Sprintf("Reserved: %s. For each server, an address has %s ports.", sources, page.Count(portLimit(v.ranged, netip.IPv4Unspecified()))),
		Columns: []page.Column{{Title: "Source"}, {Title: "Protocol"}, {Title: "Server"}, {Title: "Ports in use", Number: true}, {Title: "Part", Number: true}},
	}
	if v.limit > 0 {
		t.Note += fmt.Sprintf(" The kernel's table of connections has %s of %s entries.", page.Count(v.entries), page.Count(v.limit))
	}
	for _, p := range mostUsed(v.Ports)[:min(len(v.Ports), mostPortRows)] {
		limit := portLimit(v.ranged, p.Reserved)
		row := page.Row{Cells: []string{p.Reserved.String(), p.Protocol.String(), p.Server.String(), page.Count(p.InUse), fmt.Sprintf("%.1f %%", 100*float64(p.InUse)/float64(limit))}}
		if p.InUse*100 >= fewPorts*limit {
			row.State = health.Warning
		}
		t.Rows = append(t.Rows, row)
	}
	return t
}
