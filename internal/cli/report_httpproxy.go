package cli

import (
	"fmt"
	"time"

	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/httpproxy"
	"github.com/egress-router/egress-router/internal/metrics"
)

// reportHTTPProxy adds the proxy's checks to a report. The proxy is ready as soon as
// it listens.
func reportHTTPProxy(r *health.Report, s httpproxy.Status, file string) {
	listener := health.Check{Name: "listener", State: health.OK, Detail: s.Listen, Since: s.ListenSince}
	if s.Listen == "" {
		listener.State, listener.Detail = health.Failed, "not listening"
		r.Reasons = append(r.Reasons, listener.Detail)
	}
	from := "EGRESS_HTTP_PROXY_DESTINATION"
	if file != "" {
		from = file
	}
	list := health.Check{Name: "rules", State: health.OK, Detail: fmt.Sprintf("%d from %s", s.Rules, from), Since: s.RulesSince}
	if s.RulesErr != nil {
		list.State = health.Warning
		list.Detail = fmt.Sprintf("invalid file, keeping previous rules: %v", s.RulesErr)
	}
	connections := health.Check{Name: "connections", State: health.OK, Since: r.Started,
		Detail: fmt.Sprintf("%d of at most %d, %d active requests and tunnels", s.Connections, s.MaxConnections, s.Running)}
	if s.Connections >= s.MaxConnections {
		connections.State, connections.Since = health.Warning, time.Time{} // unknown
	}
	r.Checks = []health.Check{listener, list, connections}
	if s.LookupErr != nil {
		r.Checks = append(r.Checks, health.Check{
			Name: "lookups", State: health.Warning, Detail: fmt.Sprintf("name servers do not answer: %v", s.LookupErr), Since: s.LookupSince,
		})
	}
}

// httpClasses are the values of the label code, by status class.
var httpClasses = [...]string{"none", "1xx", "2xx", "3xx", "4xx", "5xx"}

func collectHTTPProxy(emit metrics.Emit, r health.Report, s httpproxy.Status) {
	const name = "egress_http_proxy_"
	emit(name+"info", 1, r.Version)
	emit(name+"ready", oneIf(r.Ready))
	for kind, classes := range s.Requests {
		kind := httpproxy.Kind(kind).String()
		for class, n := range classes {
			emit(name+"requests_total", float64(n), kind, httpClasses[class])
		}
	}
	for kind := range s.Sent {
		kind := httpproxy.Kind(kind)
		emit(name+"sent_bytes_total", float64(s.Sent[kind]), kind.String())
		emit(name+"received_bytes_total", float64(s.Received[kind]), kind.String())
	}
	for suffix, n := range map[string]int64{
		"open_requests":          int64(s.Running),
		"denied_total":           s.Denied,
		"open_connections":       int64(s.Connections),
		"connections_limit":      int64(s.MaxConnections),
		"connect_failures_total": s.ConnectFailures,
		"lookups_total":          s.Lookups,
		"lookup_failures_total":  s.LookupFailures,
		"rules":                  int64(s.Rules),
		"reloads_total":          s.Reloads,
		"reload_failures_total":  s.ReloadFailures,
	} {
		emit(name+suffix, float64(n))
	}
}
