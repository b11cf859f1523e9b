// Egress-router gives a pod a reserved source address on the physical network
// and redirects the connections that reach it to external servers, so that a
// firewall can allow that one address.
//
// The environment configures it. An empty variable counts as unset; the default
// is in parentheses:
//
//	EGRESS_ROUTER_MODE        (legacy) what to do: init, legacy, monitor, http-proxy, dns-proxy or unit-test
//	EGRESS_SOURCE             (required) reserved IPv4 address of the egress side, with its subnet's length (192.168.12.99/24); without a length, /32; with EGRESS_GRAMMAR=extended several, also of IPv6
//	EGRESS_GATEWAY            (required) IPv4 address of the gateway on the physical network; with EGRESS_GRAMMAR=extended one for each family
//	EGRESS_DESTINATION        (required to redirect) redirects, one a line: IP, PORT PROTO IP, or PORT PROTO IP PORT
//	EGRESS_DESTINATION_FILE   (none) file with the same lines, instead of EGRESS_DESTINATION; legacy and monitor reload it when it changes
//	EGRESS_CONFIG             (none) file with the resource EgressRouter in YAML or JSON, instead of EGRESS_SOURCE, EGRESS_GATEWAY and EGRESS_DESTINATION; legacy and monitor reload its destinations when it changes
//	EGRESS_GRAMMAR            (legacy) form of these lines: legacy, or extended, with several protocols, sctp, ranges of ports, several addresses, names, limits and comments at the end
//	EGRESS_INTERFACE          (macvlan0) interface of the egress side, on the physical network
//	EGRESS_CLUSTER_INTERFACE  (eth0) interface of the cluster side, by which clients connect
//	EGRESS_CLUSTER_CIDRS      (none) networks reached by the cluster side, such as that of the Services (10.96.0.0/12), separated by commas or spaces
//	EGRESS_REPLY_MARK         (0x1000) mark bits of connections from the cluster side, to change if another program uses the default
//	EGRESS_REPLY_TABLE        (4711) number of the routing table of their replies, to change if another program uses the default
//	EGRESS_ROUTER_BACKEND     (auto) how rules are loaded: iptables, nftables, or auto, which is iptables if it works, otherwise nftables
//	EGRESS_FORWARD            (redirected) what is forwarded from the cluster side: redirected connections only, or open, all connections, for a pod that is the gateway of others
//	EGRESS_HELPERS            (none) protocols whose servers open further connections, separated by commas: amanda, ftp, h323, irc, netbios-ns, pptp, sane, sip, snmp, tftp; the kernel's helpers are attached to destinations with the protocol's port on the server
//	EGRESS_FLOWTABLE          (off) off, auto or require: packets of established tcp and udp connections bypass the rules, in the kernel's flowtable (since Linux 5.16); auto does without on another kernel, require refuses it
//	EGRESS_MACVLAN_PARENT     (none) NIC of the host on which the router creates the egress interface, a macvlan; true: the NIC of the host's IPv4 default route
//	EGRESS_MACVLAN_MODE       (private) mode of that macvlan: private, bridge, vepa or passthru
//	EGRESS_HOST_NETNS         (/proc/1/ns/net) file of the host's network namespace, which contains that NIC
//	EGRESS_CONFLICT           (warn) what to do if another host has the reserved address at the start: warn, refuse to take it, or defend it
//	EGRESS_HEALTH_INTERVAL    (10s) interval at which legacy and monitor reconcile everything, besides on kernel events; 0: never
//	EGRESS_ANNOUNCE_INTERVAL  (60s) interval at which they announce the reserved address again; 0: never
//	EGRESS_HEALTH_LISTEN      (none) address of the status page /, /healthz, /readyz and /metrics, on the cluster side: :PORT or IP:PORT
//	EGRESS_PROBE              (none) tcp: probe each tcp destination, from the reserved address
//	EGRESS_PROBE_INTERVAL     (30s) interval of these probes
//	EGRESS_PROBE_FAILS_READY  (false) true: not ready while no destination is reachable
//	EGRESS_AUDIT_LOG          (false) true: legacy and monitor log the start and the end of each redirected connection
//	EGRESS_LOG_DROPS          (false) true: legacy and monitor log an example of the packets that the rules drop or reject, for each reason at most one line in 10 seconds
//	EGRESS_STANDBY            (false) true: legacy and monitor are one of several routers with the same reserved addresses, of which one sends
//	EGRESS_STANDBY_PEERS      (required to stand by) the routers with these addresses: the name of a headless Service, or addresses on the cluster side, separated by commas; the own one may be among them
//	EGRESS_STANDBY_PRIORITY   (100) 0 to 255: of several standbys the one with the highest priority takes over; none takes the addresses from an active router
//	EGRESS_STANDBY_INTERVAL   (20ms) interval of heartbeats and pings, 10ms to 1s; a take-over takes some 9 of them
//	EGRESS_STANDBY_WITNESS    (the gateway) address that answers pings by way of the gateway, for a gateway that answers none
//	EGRESS_STANDBY_REFERENCE  (the API server) IP:PORT that takes TCP connections while the cluster side works, or none: a router that reaches neither it nor another router gives the addresses up
//	EGRESS_STANDBY_KEY_FILE   (none) file with a key of at least 16 bytes that authenticates heartbeats, the same for all routers
//	EGRESS_STANDBY_ENDPOINTS  (none) name of a Service without selector in the pod's namespace, which the active router leads to itself; without it, a standby is not ready, so that a Service with a selector leaves it out
//	EGRESS_STANDBY_FENCE      (auto) auto, or require: refuse to stand by on a kernel that cannot fence all packets (before Linux 5.16)
//	EGRESS_STANDBY_CARRY      (off) off, or vxlan: a connection continues when another router than that by which it enters takes over, by a tunnel between the routers on the cluster side
//	EGRESS_STANDBY_PORTS      (an equal part, in the order of EGRESS_STANDBY_PEERS if these are addresses) source ports of the connections that enter by this router, which no other router has: FIRST-LAST, or INDEX/COUNT for one of equal parts, from 0
//	EGRESS_LOG_FORMAT         (text) format of log lines: text or json
//	EGRESS_LOG_LEVEL          (info) minimum level of log lines: debug, info, warn or error
//	EGRESS_ROUTER_DEBUG       (off) any value (also no, 0 and false) logs every step and all rules
//
// Without an argument it runs the mode. The arguments plan, help and version
// print these and change nothing; wait waits for SIGTERM, as the second container
// of a pod.
//
// http-proxy, or no argument under the name egress-http-proxy, is the HTTP proxy of
// the pod, with variables of its own:
//
//	EGRESS_HTTP_PROXY_DESTINATION       (required) the rules, one a line: IP, IP/LENGTH, NAME, *.NAME, any of them with ! in front to deny, and * at the end to allow the rest
//	EGRESS_HTTP_PROXY_DESTINATION_FILE  (none) file with the same lines, instead of EGRESS_HTTP_PROXY_DESTINATION; reloaded when it changes
//	EGRESS_HTTP_PROXY_LISTEN            (:8080) listen address: :PORT, IP:PORT or [IPv6]:PORT
//	EGRESS_HTTP_PROXY_CONNECT_TIMEOUT   (10s) timeout of a name lookup, and of a connection to a server
//	EGRESS_HTTP_PROXY_HEADER_TIMEOUT    (30s) timeout for the header of a request
//	EGRESS_HTTP_PROXY_KEEPALIVE_TIMEOUT (2m) time that a client's connection is kept for its next request
//	EGRESS_HTTP_PROXY_IDLE_TIMEOUT      (15m) time without data, either way, after which a request or a tunnel ends
//	EGRESS_HTTP_PROXY_MAX_HEADER        (65536) maximum size of the header of a request or an answer, in bytes
//	EGRESS_HTTP_PROXY_MAX_CONNECTIONS   (3/4 of the open files allowed) maximum number of client connections; more wait
//	EGRESS_SHUTDOWN_GRACE               (20s) time that active requests and connections may take after SIGTERM
//	EGRESS_ACCESS_LOG                   (false) true: log one line for each connection, or, as the HTTP proxy, for each request and tunnel
//	EGRESS_HEALTH_LISTEN                (none) address of the status page /, /healthz, /readyz and /metrics, on the cluster side: :PORT or IP:PORT
//	EGRESS_LOG_FORMAT                   (text) format of log lines: text or json
//	EGRESS_LOG_LEVEL                    (info) minimum level of log lines: debug, info, warn or error
//	EGRESS_HTTP_PROXY_MODE              (serve) unit-test: print the rules in squid's notation, and do nothing
//
// dns-proxy, or no argument under the name egress-dns-proxy, is the DNS proxy:
//
//	EGRESS_DNS_PROXY_DESTINATION        (required) destinations, one a line: PORT HOST, or PORT HOST REMOTEPORT; HOST is an IPv4 address or a name
//	EGRESS_DNS_PROXY_DESTINATION_FILE   (none) file with the same lines, instead of EGRESS_DNS_PROXY_DESTINATION; reloaded when it changes
//	EGRESS_DNS_PROXY_IDLE_TIMEOUT       (60s) time without data, either way, after which a connection ends; 0: never
//	EGRESS_DNS_PROXY_SEND_PROXY         (false) true: send the client's address to servers, by the PROXY protocol, version 2
//	EGRESS_SHUTDOWN_GRACE               (20s) time that active requests and connections may take after SIGTERM
//	EGRESS_ACCESS_LOG                   (false) true: log one line for each connection, or, as the HTTP proxy, for each request and tunnel
//	EGRESS_HEALTH_LISTEN                (none) address of the status page /, /healthz, /readyz and /metrics, on the cluster side: :PORT or IP:PORT
//	EGRESS_LOG_FORMAT                   (text) format of log lines: text or json
//	EGRESS_LOG_LEVEL                    (info) minimum level of log lines: debug, info, warn or error
//	EGRESS_DNS_PROXY_MODE               (serve) unit-test: print the listen and dial addresses, and do nothing
//	EGRESS_DNS_PROXY_DEBUG              (off) any value (also no, 0 and false) logs one line for each connection
package main

import (
	"context"
	"os"

	"github.com/egress-router/egress-router/internal/cli"
	"github.com/egress-router/egress-router/internal/config"
)

func main() {
	os.Exit(cli.Run(context.Background(), cli.Process{
		Name: os.Args[0], Args: os.Args[1:], Environment: config.Read, Stdout: os.Stdout, Stderr: os.Stderr,
		TerminationLog: cli.TerminationLog,
	}))
}
