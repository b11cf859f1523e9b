// Package config converts the environment of the process to a Config: complete,
// typed and validated, before any change.
//
// It works in two steps. Read returns the variables as text, and is the only code
// that uses envconfig. Parse is pure: it returns all errors at once, each with the
// sentence that users of the original search for.
package config

import (
	"os"
	"reflect"
	"strings"

	"github.com/kelseyhightower/envconfig"

	"github.com/egress-router/egress-router/internal/wording"
)

// An Environment contains the value of every variable; an unset variable is empty,
// and an empty one counts as unset.
//
// All fields are strings, because envconfig's own conversions differ from the
// original's (it reads "010" as 8, and refuses any EGRESS_ROUTER_DEBUG that is
// not a Go boolean). Its default tag is not used, since it leaves an empty
// variable empty. The tags carry the full name with an empty prefix: with a
// prefix, envconfig falls back to the bare name and would take a stray SOURCE
// or GATEWAY.
//
// The doc tag describes the variable, the unset tag its default, and the spec tag is the
// field that it sets, if messages of other packages are about it.
type Environment struct {
	Mode             string `envconfig:"EGRESS_ROUTER_MODE" spec:"mode" unset:"legacy" doc:"what to do: init, legacy, monitor, http-proxy, dns-proxy or unit-test"`
	Source           string `envconfig:"EGRESS_SOURCE" spec:"source" unset:"required" doc:"reserved IPv4 address of the egress side, with its subnet's length (192.168.12.99/24); without a length, /32; with EGRESS_GRAMMAR=extended several, also of IPv6"`
	Gateway          string `envconfig:"EGRESS_GATEWAY" spec:"gateway" unset:"required" doc:"IPv4 address of the gateway on the physical network; with EGRESS_GRAMMAR=extended one for each family"`
	Destination      string `envconfig:"EGRESS_DESTINATION" spec:"destinations" unset:"required to redirect" doc:"redirects, one a line: IP, PORT PROTO IP, or PORT PROTO IP PORT"`
	DestinationFile  string `envconfig:"EGRESS_DESTINATION_FILE" unset:"none" doc:"file with the same lines, instead of EGRESS_DESTINATION; legacy and monitor reload it when it changes"`
	ConfigFile       string `envconfig:"EGRESS_CONFIG" unset:"none" doc:"file with the resource EgressRouter in YAML or JSON, instead of EGRESS_SOURCE, EGRESS_GATEWAY and EGRESS_DESTINATION; legacy and monitor reload its destinations when it changes"`
	Grammar          string `envconfig:"EGRESS_GRAMMAR" spec:"grammar" unset:"legacy" doc:"form of these lines: legacy, or extended, with several protocols, sctp, ranges of ports, several addresses, names, limits and comments at the end"`
	Interface        string `envconfig:"EGRESS_INTERFACE" spec:"interface" unset:"macvlan0" doc:"interface of the egress side, on the physical network"`
	ClusterInterface string `envconfig:"EGRESS_CLUSTER_INTERFACE" spec:"cluster interface" unset:"eth0" doc:"interface of the cluster side, by which clients connect"`
	ClusterCIDRs     string `envconfig:"EGRESS_CLUSTER_CIDRS" spec:"cluster networks" unset:"none" doc:"networks reached by the cluster side, such as that of the Services (10.96.0.0/12), separated by commas or spaces"`
	ReplyMark        string `envconfig:"EGRESS_REPLY_MARK" spec:"reply mark" unset:"0x1000" doc:"mark bits of connections from the cluster side, to change if another program uses the default"`
	ReplyTable       string `envconfig:"EGRESS_REPLY_TABLE" spec:"reply table" unset:"4711" doc:"number of the routing table of their replies, to change if another program uses the default"`
	Backend          string `envconfig:"EGRESS_ROUTER_BACKEND" spec:"backend" unset:"auto" doc:"how rules are loaded: iptables, nftables, or auto, which is iptables if it works, otherwise nftables"`
	Forward          string `envconfig:"EGRESS_FORWARD" unset:"redirected" doc:"what is forwarded from the cluster side: redirected connections only, or open, all connections, for a pod that is the gateway of others"`
	Helpers          string `envconfig:"EGRESS_HELPERS" spec:"helpers" unset:"none" doc:"protocols whose servers open further connections, separated by commas: amanda, ftp, h323, irc, netbios-ns, pptp, sane, sip, snmp, tftp; the kernel's helpers are attached to destinations with the protocol's port on the server"`
	Flowtable        string `envconfig:"EGRESS_FLOWTABLE" unset:"off" doc:"off, auto or require: packets of established tcp and udp connections bypass the rules, in the kernel's flowtable (since Linux 5.16); auto does without on another kernel, require refuses it"`
	MacvlanParent    string `envconfig:"EGRESS_MACVLAN_PARENT" spec:"macvlan parent" unset:"none" doc:"NIC of the host on which the router creates the egress interface, a macvlan; true: the NIC of the host's IPv4 default route"`
	MacvlanMode      string `envconfig:"EGRESS_MACVLAN_MODE" unset:"private" doc:"mode of that macvlan: private, bridge, vepa or passthru"`
	HostNetns        string `envconfig:"EGRESS_HOST_NETNS" spec:"host network namespace" unset:"/proc/1/ns/net" doc:"file of the host's network namespace, which contains that NIC"`
	Conflict         string `envconfig:"EGRESS_CONFLICT" spec:"conflict" unset:"warn" doc:"what to do if another host has the reserved address at the start: warn, refuse to take it, or defend it"`
	HealthInterval   string `envconfig:"EGRESS_HEALTH_INTERVAL" unset:"10s" doc:"interval at which legacy and monitor reconcile everything, besides on kernel events; 0: never"`
	AnnounceInterval string `envconfig:"EGRESS_ANNOUNCE_INTERVAL" unset:"60s" doc:"interval at which they announce the reserved address again; 0: never"`
	HealthListen     string `envconfig:"EGRESS_HEALTH_LISTEN" spec:"health address" unset:"none" doc:"address of the status page /, /healthz, /readyz and /metrics, on the cluster side: :PORT or IP:PORT"`
	Probe            string `envconfig:"EGRESS_PROBE" unset:"none" doc:"tcp: probe each tcp destination, from the reserved address"`
	ProbeInterval    string `envconfig:"EGRESS_PROBE_INTERVAL" unset:"30s" doc:"interval of these probes"`
	ProbeFailsReady  string `envconfig:"EGRESS_PROBE_FAILS_READY" unset:"false" doc:"true: not ready while no destination is reachable"`
	AuditLog         string `envconfig:"EGRESS_AUDIT_LOG" unset:"false" doc:"true: legacy and monitor log the start and the end of each redirected connection"`
	LogDrops         string `envconfig:"EGRESS_LOG_DROPS" unset:"false" doc:"true: legacy and monitor log an example of the packets that the rules drop or reject, for each reason at most one line in 10 seconds"`
	Standby          string `envconfig:"EGRESS_STANDBY" spec:"standby" unset:"false" doc:"true: legacy and monitor are one of several routers with the same reserved addresses, of which one sends"`
	StandbyPeers     string `envconfig:"EGRESS_STANDBY_PEERS" spec:"standby peers" unset:"required to stand by" doc:"the routers with these addresses: the name of a headless Service, or addresses on the cluster side, separated by commas; the own one may be among them"`
	StandbyPriority  string `envconfig:"EGRESS_STANDBY_PRIORITY" unset:"100" doc:"0 to 255: of several standbys the one with the highest priority takes over; none takes the addresses from an active router"`
	StandbyInterval  string `envconfig:"EGRESS_STANDBY_INTERVAL" unset:"20ms" doc:"interval of heartbeats and pings, 10ms to 1s; a take-over takes some 9 of them"`
	StandbyWitness   string `envconfig:"EGRESS_STANDBY_WITNESS" spec:"standby witness" unset:"the gateway" doc:"address that answers pings by way of the gateway, for a gateway that answers none"`
	StandbyReference string `envconfig:"EGRESS_STANDBY_REFERENCE" unset:"the API server" doc:"IP:PORT that takes TCP connections while the cluster side works, or none: a router that reaches neither it nor another router gives the addresses up"`
	StandbyKeyFile   string `envconfig:"EGRESS_STANDBY_KEY_FILE" spec:"standby key" unset:"none" doc:"file with a key of at least 16 bytes that authenticates heartbeats, the same for all routers"`
	StandbyEndpoints string `envconfig:"EGRESS_STANDBY_ENDPOINTS" unset:"none" doc:"name of a Service without selector in the pod's namespace, which the active router leads to itself; without it, a standby is not ready, so that a Service with a selector leaves it out"`
	StandbyFence     string `envconfig:"EGRESS_STANDBY_FENCE" unset:"auto" doc:"auto, or require: refuse to stand by on a kernel that cannot fence all packets (before Linux 5.16)"`
	StandbyCarry     string `envconfig:"EGRESS_STANDBY_CARRY" unset:"off" doc:"off, or vxlan: a connection continues when another router than that by which it enters takes over, by a tunnel between the routers on the cluster side"`
	StandbyPorts     string `envconfig:"EGRESS_STANDBY_PORTS" unset:"an equal part, in the order of EGRESS_STANDBY_PEERS if these are addresses" doc:"source ports of the connections that enter by this router, which no other router has: FIRST-LAST, or INDEX/COUNT for one of equal parts, from 0"`
	LogEnvironment
	Debug string `envconfig:"EGRESS_ROUTER_DEBUG" unset:"off" doc:"any value (also no, 0 and false) logs every step and all rules"`

	APIServer string `ignored:"true"` // its address and port, of which Kubernetes tells every container; empty: none
}

// A LogEnvironment contains the variables of every mode and both proxies.
type LogEnvironment struct {
	// Names are those of all variables of the process that are set, to find misspelt ones.
	Names     []string `ignored:"true"`
	LogFormat string   `envconfig:"EGRESS_LOG_FORMAT" unset:"text" doc:"format of log lines: text or json"`
	LogLevel  string   `envconfig:"EGRESS_LOG_LEVEL" unset:"info" doc:"minimum level of log lines: debug, info, warn or error"`
}

// Read returns the variables of this process.
func Read() (Environment, error) {
	env := Environment{LogEnvironment: LogEnvironment{Names: names()}, APIServer: apiServer()}
	err := envconfig.Process("", &env)
	return env, err
}

// names returns the names of the variables of this process that are not empty.
func names() (set []string) {
	for _, v := range os.Environ() {
		if name, value, _ := strings.Cut(v, "="); value != "" {
			set = append(set, name)
		}
	}
	return set
}

// value returns the value of a variable by its name.
func (e Environment) value(name string) string {
	v := reflect.ValueOf(e)
	for i := range v.NumField() {
		if v.Type().Field(i).Tag.Get("envconfig") == name {
			return v.Field(i).String()
		}
	}
	return ""
}

// File returns the file with the destinations; empty: they are in a variable.
func (e Environment) File() string {
	if e.ConfigFile != "" {
		return e.ConfigFile
	}
	return e.DestinationFile
}

// A Variable describes one variable for help texts.
type Variable struct {
	Name  string
	Field wording.Field // empty: none
	Unset string        // default
	Doc   string
}

// Variables lists every variable of the router, in display order.
func Variables() []Variable { return variables(reflect.TypeFor[Environment]()) }

func variables(environment reflect.Type) []Variable {
	var list []Variable
	for field := range environment.Fields() {
		if field.Anonymous { // shared variables
			list = append(list, variables(field.Type)...)
			continue
		}
		tag := field.Tag
		if name := tag.Get("envconfig"); name != "" {
			list = append(list, Variable{Name: name, Field: wording.Field(tag.Get("spec")), Unset: tag.Get("unset"), Doc: tag.Get("doc")})
		}
	}
	return list
}
