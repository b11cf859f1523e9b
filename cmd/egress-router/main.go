// Egress-router gives a pod a reserved source address on the physical network
// and redirects the connections that reach it to servers out there, so that a
// firewall can allow that one address.
//
// It is configured by the environment. A variable that is empty counts as not
// set; in parentheses, what holds then:
//
//	EGRESS_ROUTER_MODE        (legacy) what to do: init, legacy, http-proxy, dns-proxy or unit-test
//	EGRESS_SOURCE             (required) reserved IPv4 address of the egress side, with its subnet's length (192.168.12.99/24); without a length, /32
//	EGRESS_GATEWAY            (required) IPv4 address of the gateway on the physical network
//	EGRESS_DESTINATION        (required to redirect) where connections are redirected, one line each: IP, PORT PROTO IP, or PORT PROTO IP PORT
//	EGRESS_DESTINATION_FILE   (none) file with the same lines, in place of EGRESS_DESTINATION
//	EGRESS_INTERFACE          (macvlan0) interface of the egress side, on the physical network
//	EGRESS_CLUSTER_INTERFACE  (eth0) interface of the cluster side, by which clients come in
//	EGRESS_CLUSTER_CIDRS      (none) networks that stay reachable by the cluster side, such as that of the Services (10.96.0.0/12), separated by commas or spaces
//	EGRESS_REPLY_MARK         (0x1000) bits of the mark of connections that came in on the cluster side, if another program uses the default
//	EGRESS_REPLY_TABLE        (4711) number of the routing table of their replies, if another program uses the default
//	EGRESS_ROUTER_BACKEND     (auto) how rules get into the kernel: iptables, nftables, or auto, which is iptables where it works and else nftables
//	EGRESS_FORWARD            (redirected) what crosses from the cluster side: redirected connections, or open, all connections, for a pod that is the gateway of others
//	EGRESS_MACVLAN_PARENT     (none) NIC of the host of which the router makes the egress interface, a macvlan; true: that of the host's IPv4 default route
//	EGRESS_MACVLAN_MODE       (private) mode of that macvlan: private, bridge, vepa or passthru
//	EGRESS_HOST_NETNS         (/proc/1/ns/net) file of the host's network namespace, in which that NIC is
//	EGRESS_ROUTER_DEBUG       (off) any value (also no, 0 and false) logs every step and the whole rule set
//
// Without an argument it does what the mode says. The arguments plan, help and
// version print what they are called after and change nothing; wait does
// nothing until SIGTERM, which is what a pod's second container is for. http-proxy
// and dns-proxy, or no argument under the names egress-http-proxy and
// egress-dns-proxy, are the proxies, with variables of their own, which help lists
// too.
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
	}))
}
