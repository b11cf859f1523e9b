package metrics

import "slices"

// redirect are the labels of a destination of the router: the protocol and local port
// of its connections, or "any" and "fallback", and its address and port.
var redirect = []string{"protocol", "port", "destination"}

// Router are the metrics of the router in the modes in which it stays.
var Router = []Metric{
	{"egress_router_info", Gauge, []string{"version", "mode", "backend", "source", "gateway"}, "Version, mode, backend, source and gateway of the router, always 1."},
	{"egress_router_ready", Gauge, nil, "1 while the router is ready, otherwise 0."},
	{"egress_router_fault", Gauge, []string{"fault"}, "1 while the health reports the fault, otherwise 0; egress-router diagnose has the same words."},
	{"egress_router_last_comparison_timestamp_seconds", Gauge, nil, "Unix time of the last comparison of the network and the rules with the plan."},
	{"egress_router_comparisons_total", Counter, nil, "Comparisons of the network and the rules with the plan."},
	{"egress_router_repairs_total", Counter, []string{"kind"}, "Repairs by the kind of object that was repaired."},
	{"egress_router_repair_failures_total", Counter, nil, "Repairs that failed."},
	{"egress_router_announcements_total", Counter, nil, "Announcements of the reserved address by gratuitous ARP."},
	{"egress_router_address_conflicts_total", Counter, nil, "Claims of the reserved address by another host."},
	{"egress_router_gateway_reachable", Gauge, nil, "1 while the gateway answers ARP requests, of both families if there are two, otherwise 0."},
	{"egress_router_reloads_total", Counter, nil, "Changes of the destinations at run time."},
	{"egress_router_reload_failures_total", Counter, nil, "Destination files that were invalid, so that the previous destinations stayed in effect."},
	{"egress_router_destination_up", Gauge, redirect, "1 while the destination accepts connections, otherwise 0; only if probes are enabled."},
	{"egress_router_probe_failures_total", Counter, []string{"protocol", "destination", "reason"}, "Failed probes of an address and port among the destinations, by the reason: refused, silent, unreachable, reset or unsent; only if probes are enabled."},
	{"egress_router_probe_connect_seconds", Histogram, nil, "Times in which destinations accepted the connections of probes; only if probes are enabled."},
	{"egress_router_destination_addresses", Gauge, redirect, "Addresses of the destination that new connections get, without those that do not answer probes; only for a destination with several, or with a name."},
	{"egress_router_name_lookups_total", Counter, nil, "Lookups of the names of destinations; only if there are any."},
	{"egress_router_name_lookup_failures_total", Counter, nil, "Lookups of the names of destinations without an answer or a usable address."},
	{"egress_router_connections_total", Counter, redirect, "Connections that were redirected."},
	{"egress_router_connection_failures_total", Counter, append(redirect[:3:3], "reason"), "Redirected TCP and SCTP connections that the destination refused, or did not answer (reason silent), counted when the kernel deletes their entry."},
	{"egress_router_open_connections", Gauge, redirect, "Redirected connections in the connection tracking table."},
	{"egress_router_sent_packets_total", Counter, redirect, "Packets to the destination."},
	{"egress_router_sent_bytes_total", Counter, redirect, "Bytes of the packets to the destination, including IP headers."},
	{"egress_router_received_packets_total", Counter, redirect, "Packets from the destination."},
	{"egress_router_received_bytes_total", Counter, redirect, "Bytes of the packets from the destination, including IP headers."},
	{"egress_router_snat_ports_in_use", Gauge, []string{"protocol", "destination"}, "Ports of the reserved address that connections to the destination's address and port use."},
	{"egress_router_source_ports_in_use", Gauge, []string{"source", "protocol", "destination"}, "Ports of one reserved address that connections to the destination's address and port use."},
	{"egress_router_source_ports_limit", Gauge, nil, "Ports of one reserved address for connections to one address and port."},
	{"egress_router_conntrack_entries", Gauge, nil, "Entries in the connection tracking table of the pod."},
	{"egress_router_conntrack_limit", Gauge, nil, "Maximum number of entries in the connection tracking table (net.netfilter.nf_conntrack_max)."},
	{"egress_router_dropped_packets_total", Counter, []string{"reason"}, "Packets that the rules dropped or rejected, by reason."},
	{"egress_router_standby_role", Gauge, []string{"role"}, "1 for the role of this router, otherwise 0: standby, claiming, active or resuming; like the other metrics of standby only of a router that is one of several."},
	{"egress_router_standby_takeovers_total", Counter, []string{"reason"}, "Times that this router became active, by the reason."},
	{"egress_router_standby_last_gap_seconds", Gauge, nil, "Time from the last sign of the former active router until this one became active."},
	{"egress_router_standby_echo_round_trip_seconds", Gauge, nil, "Time of the last answer of the witness to a ping."},
	{"egress_router_standby_peers", Gauge, nil, "Other routers with the reserved addresses that are heard."},
	{"egress_router_standby_heartbeats_lost_total", Counter, nil, "Heartbeats of other routers that did not arrive."},
	{"egress_router_standby_packets_refused_total", Counter, nil, "Packets to the port of heartbeats that were none, not authenticated by the key, or of a stranger."},
	{"egress_router_standby_sent_packets_total", Counter, nil, "Packets sent by the tunnel to other routers, since it was set up; like the other metrics of the tunnel only of a router that carries."},
	{"egress_router_standby_sent_bytes_total", Counter, nil, "Bytes of these packets, including IP headers."},
	{"egress_router_standby_received_packets_total", Counter, nil, "Packets received by the tunnel from other routers, since it was set up."},
	{"egress_router_standby_received_bytes_total", Counter, nil, "Bytes of these packets, including IP headers."},
	{"egress_router_standby_draining_connections", Gauge, nil, "TCP and SCTP connections that a router which has handed over for good still carries, otherwise 0."},
	{"egress_router_event_overruns_total", Counter, nil, "Overruns of the conntrack event buffer, after which some connections are missing from the counters."},
	{"egress_router_log_lines_dropped_total", Counter, nil, "Log lines that were dropped because nothing read the log or writing it failed."},
}

// kind is the label that distinguishes forwarded requests from tunnels.
var kind = []string{"kind"}

// HTTPProxy are the metrics of the HTTP proxy.
var HTTPProxy = []Metric{
	{"egress_http_proxy_info", Gauge, []string{"version"}, "Version of the HTTP proxy, always 1."},
	{"egress_http_proxy_ready", Gauge, nil, "1 while the proxy is ready, otherwise 0."},
	{"egress_http_proxy_requests_total", Counter, []string{"kind", "code"}, "Finished requests (kind request) and tunnels (kind tunnel) by status class, from 1xx (another protocol) to 5xx, or none without a response."},
	{"egress_http_proxy_open_requests", Gauge, nil, "Active requests and tunnels."},
	{"egress_http_proxy_denied_total", Counter, nil, "Requests and tunnels that the rules denied."},
	{"egress_http_proxy_open_connections", Gauge, nil, "Open client connections."},
	{"egress_http_proxy_connections_limit", Gauge, nil, "Maximum number of client connections at the same time."},
	{"egress_http_proxy_sent_bytes_total", Counter, kind, "Bytes of request bodies and tunnels sent to servers, counted when the request or the tunnel ends."},
	{"egress_http_proxy_received_bytes_total", Counter, kind, "Bytes of response bodies and tunnels received from servers, including the proxy's own responses, counted when the request or the tunnel ends."},
	{"egress_http_proxy_connect_failures_total", Counter, nil, "Requests and tunnels whose connection to the server failed."},
	{"egress_http_proxy_lookups_total", Counter, nil, "Name lookups for requests and tunnels, including those answered from the cache."},
	{"egress_http_proxy_lookup_failures_total", Counter, nil, "Name lookups that returned no address."},
	{"egress_http_proxy_rules", Gauge, nil, "Rules in effect."},
	{"egress_http_proxy_reloads_total", Counter, nil, "Changes of the rules at run time."},
	{"egress_http_proxy_reload_failures_total", Counter, nil, "Rule files that were invalid, so that the previous rules stayed in effect."},
	{"egress_http_proxy_log_lines_dropped_total", Counter, nil, "Log lines that were dropped because nothing read the log or writing it failed."},
}

// destination are the labels of a destination of the DNS proxy: the local port, and
// the host and port of the destination.
var destination = []string{"port", "destination"}

// DNSProxy are the metrics of the DNS proxy.
var DNSProxy = []Metric{
	{"egress_dns_proxy_info", Gauge, []string{"version"}, "Version of the DNS proxy, always 1."},
	{"egress_dns_proxy_ready", Gauge, nil, "1 while the proxy is ready, otherwise 0."},
	{"egress_dns_proxy_listening", Gauge, destination, "1 while the proxy listens on the port, otherwise 0."},
	{"egress_dns_proxy_connections_total", Counter, destination, "Client connections."},
	{"egress_dns_proxy_open_connections", Gauge, destination, "Open client connections."},
	{"egress_dns_proxy_connect_failures_total", Counter, destination, "Client connections that were reset because no address of the destination accepted a connection."},
	{"egress_dns_proxy_sent_bytes_total", Counter, destination, "Bytes sent to the destination, counted when the connection ends."},
	{"egress_dns_proxy_received_bytes_total", Counter, destination, "Bytes received from the destination, counted when the connection ends."},
	{"egress_dns_proxy_addresses", Gauge, destination, "Addresses of the destination."},
	{"egress_dns_proxy_addresses_aside", Gauge, destination, "Unreachable addresses of the destination, which are set aside and probed."},
	{"egress_dns_proxy_lookups_total", Counter, destination, "Lookups of the destination's name, one per TTL of the answer."},
	{"egress_dns_proxy_lookup_failures_total", Counter, destination, "Lookups of the destination's name that returned no address."},
	{"egress_dns_proxy_reloads_total", Counter, nil, "Changes of the destinations at run time."},
	{"egress_dns_proxy_reload_failures_total", Counter, nil, "Destination files that were invalid or contained a port on which the proxy could not listen."},
	{"egress_dns_proxy_log_lines_dropped_total", Counter, nil, "Log lines that were dropped because nothing read the log or writing it failed."},
}

// All returns the metrics of all programs, in the order of the manual.
func All() []Metric { return slices.Concat(Router, HTTPProxy, DNSProxy) }
