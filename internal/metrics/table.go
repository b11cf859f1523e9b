package metrics

import "slices"

// The labels of a destination: the protocol and local port by which connections
// come, or "any" and "fallback", and where they go.
var redirect = []string{"protocol", "port", "destination"}

// Router is what the router tells in the modes in which it stays.
var Router = []Metric{
	{"egress_router_info", Gauge, []string{"version", "mode", "backend", "source", "gateway"}, "what runs: always 1"},
	{"egress_router_ready", Gauge, nil, "1 while the router is ready, otherwise 0"},
	{"egress_router_last_comparison_timestamp_seconds", Gauge, nil, "when the network and the rules were last compared with what is wanted, in Unix time"},
	{"egress_router_comparisons_total", Counter, nil, "comparisons of the network and the rules with what is wanted"},
	{"egress_router_repairs_total", Counter, []string{"kind"}, "repairs, by what was repaired"},
	{"egress_router_repair_failures_total", Counter, nil, "repairs that failed"},
	{"egress_router_announcements_total", Counter, nil, "announcements of the reserved address by gratuitous ARP"},
	{"egress_router_address_conflicts_total", Counter, nil, "claims of the reserved address by another host"},
	{"egress_router_gateway_reachable", Gauge, nil, "1 while the gateway answers ARP, otherwise 0"},
	{"egress_router_reloads_total", Counter, nil, "changes of the destinations while the router ran"},
	{"egress_router_reload_failures_total", Counter, nil, "destination files that were not right, so that the destinations of before stayed"},
	{"egress_router_destination_up", Gauge, redirect, "1 while the destination can be connected to, otherwise 0 (only with EGRESS_PROBE)"},
	{"egress_router_connections_total", Counter, redirect, "connections that were redirected"},
	{"egress_router_open_connections", Gauge, redirect, "redirected connections that the kernel tracks now"},
	{"egress_router_sent_packets_total", Counter, redirect, "packets toward the destination"},
	{"egress_router_sent_bytes_total", Counter, redirect, "bytes of these packets, with IP headers"},
	{"egress_router_received_packets_total", Counter, redirect, "packets from the destination"},
	{"egress_router_received_bytes_total", Counter, redirect, "bytes of these packets, with IP headers"},
	{"egress_router_snat_ports_in_use", Gauge, []string{"protocol", "destination"}, "ports of the reserved address that connections to the destination's address and port use"},
	{"egress_router_conntrack_entries", Gauge, nil, "connections that the kernel tracks in the pod"},
	{"egress_router_conntrack_limit", Gauge, nil, "how many it can track (net.netfilter.nf_conntrack_max)"},
	{"egress_router_event_overruns_total", Counter, nil, "times that connections ended faster than they could be counted, so that some are missing from the counts"},
}

// kind tells requests that are forwarded from tunnels.
var kind = []string{"kind"}

// HTTPProxy is what the HTTP proxy tells.
var HTTPProxy = []Metric{
	{"egress_http_proxy_info", Gauge, []string{"version"}, "what runs: always 1"},
	{"egress_http_proxy_ready", Gauge, nil, "1 while the proxy is ready, otherwise 0"},
	{"egress_http_proxy_requests_total", Counter, []string{"kind", "code"}, "requests (kind request) and tunnels (kind tunnel) that have ended, by the class of their status: 1xx (another protocol) to 5xx, or none without an answer"},
	{"egress_http_proxy_open_requests", Gauge, nil, "requests and tunnels that are under way"},
	{"egress_http_proxy_denied_total", Counter, nil, "requests and tunnels that the rules denied"},
	{"egress_http_proxy_open_connections", Gauge, nil, "connections of clients"},
	{"egress_http_proxy_connections_limit", Gauge, nil, "how many are served at a time (EGRESS_HTTP_PROXY_MAX_CONNECTIONS)"},
	{"egress_http_proxy_sent_bytes_total", Counter, kind, "bytes toward servers, of bodies and of data in tunnels; counted when the request or the tunnel ends"},
	{"egress_http_proxy_received_bytes_total", Counter, kind, "bytes from servers, likewise, and the proxy's own answers"},
	{"egress_http_proxy_connect_failures_total", Counter, nil, "requests and tunnels whose server could not be connected to"},
	{"egress_http_proxy_lookups_total", Counter, nil, "names of requests and tunnels that were looked up, also those whose answer was kept"},
	{"egress_http_proxy_lookup_failures_total", Counter, nil, "of these, those without an address"},
	{"egress_http_proxy_rules", Gauge, nil, "rules in force"},
	{"egress_http_proxy_reloads_total", Counter, nil, "changes of the rules while the proxy ran"},
	{"egress_http_proxy_reload_failures_total", Counter, nil, "times that the rules' file was not right, so that the rules of before stayed"},
}

// destination is a local port and the host and port that it is for.
var destination = []string{"port", "destination"}

// DNSProxy is what the DNS proxy tells.
var DNSProxy = []Metric{
	{"egress_dns_proxy_info", Gauge, []string{"version"}, "what runs: always 1"},
	{"egress_dns_proxy_ready", Gauge, nil, "1 while the proxy is ready, otherwise 0"},
	{"egress_dns_proxy_listening", Gauge, destination, "1 while the port is listened on, otherwise 0"},
	{"egress_dns_proxy_connections_total", Counter, destination, "connections of clients"},
	{"egress_dns_proxy_open_connections", Gauge, destination, "those that are open"},
	{"egress_dns_proxy_connect_failures_total", Counter, destination, "those that were reset, because no address of the destination could be connected to"},
	{"egress_dns_proxy_sent_bytes_total", Counter, destination, "bytes toward the destination; counted when the connection ends"},
	{"egress_dns_proxy_received_bytes_total", Counter, destination, "bytes from the destination, likewise"},
	{"egress_dns_proxy_addresses", Gauge, destination, "addresses of the destination"},
	{"egress_dns_proxy_addresses_aside", Gauge, destination, "of these, those that are put aside because they do not answer"},
	{"egress_dns_proxy_lookups_total", Counter, destination, "times that the destination's name was looked up; an answer is kept for its TTL"},
	{"egress_dns_proxy_lookup_failures_total", Counter, destination, "of these, those without an address"},
	{"egress_dns_proxy_reloads_total", Counter, nil, "changes of the destinations while the proxy ran"},
	{"egress_dns_proxy_reload_failures_total", Counter, nil, "times that the destinations' file was not right, or a port of it could not be listened on"},
}

// All are the metrics of all programs, in the order to show them.
func All() []Metric { return slices.Concat(Router, HTTPProxy, DNSProxy) }
