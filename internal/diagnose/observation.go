// Package diagnose tells why traffic does not arrive. It is pure: an Observation is
// everything that was found in a network namespace and on the physical network, and
// Diagnose derives from it one finding for each check, in the order in which a packet of a
// client meets them, and one sentence for the operator of the server.
package diagnose

import (
	"errors"
	"net/netip"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/wording"
)

// An Observation is the state in which a router was found. Fields named Unknown are why the
// values beside them were not observed, such as a missing privilege; empty: they were.
type Observation struct {
	At      time.Time
	Egress  string // interface of the physical network
	Cluster string // interface of the clients
	Partial string // why the configuration is not known, only what the namespace shows; empty: it is
	// Words are the names of the fields of the configuration for its user; nil: those without
	// a front end.
	Words wording.Names `json:"-"`

	// Shut: another router holds the reserved addresses, so that nothing leaves with them here.
	Shut bool

	Interface   Interface
	Addresses   []Address
	Gateways    []Gateway // one of each family with a reserved address
	Drift       Drift
	Forwards    bool // the configuration forwards; false: a proxy connects to the servers
	Drops       Drops
	Table       Table
	Clients     Clients
	Ports       []Ports // those most in use first
	Names       []Name
	Probed      []Destination
	Configured  int        // number of the destinations, of which Probed are a sample if it is larger
	Reported    []Reported // checks of a running router, by its health socket
	Routers     []Router   // those with the same addresses that the running router knows; none: it is the only one
	HealthError string     // why a running router did not report; empty: it did, or none runs
}

// text returns a text for the user of the configuration.
func (o Observation) text(format string, args ...any) string {
	return wording.Textf(format, args...).In(o.Words)
}

// name returns the name of a field.
func (o Observation) name(f wording.Field) string { return o.text("%s", f) }

// several returns the setting that allows several reserved addresses.
func (o Observation) several() string { return o.text("%s", wording.Set(wording.Grammar, "extended")) }

// An Interface is the egress interface.
type Interface struct {
	Unknown  string
	Missing  string // the error with the interfaces that exist; empty: it exists
	Kind     string // such as "macvlan in mode private"
	Private  bool   // a macvlan that does not reach others on its NIC
	Parent   string // the NIC below, as far as it is known
	MAC      string
	MTU      int // bytes
	Up       bool
	Carrier  bool
	Troubles []string // counters of drops and errors that are not 0, of it and of the NIC below
	Received uint64   // frames since its creation
	Sent     uint64
}

// An Address is a reserved address.
type Address struct {
	Prefix    netip.Prefix
	Present   bool
	Duplicate bool   // the kernel's duplicate address detection found another host
	Unknown   string // of Holder
	Holder    string // hardware address of another host that answers for it; empty: none did
}

// A Gateway is the gateway of one family.
type Gateway struct {
	Address  netip.Addr
	Source   netip.Addr // sender of the requests
	Protocol string     // ARP or NDP
	Unknown  string
	Requests int
	MAC      string        // of the answer; empty: there was none
	Took     time.Duration // until the answer
	Heard    string        // hardware address from which the gateway asked for others meanwhile
	Listed   string        // hardware address in the neighbour table; empty: none
	// Age of the last confirmation in the neighbour table; negative: none.
	Confirmed time.Duration
	Echo      Echo
}

// An Echo is the result of ICMP echo requests of several sizes that must not be fragmented.
type Echo struct {
	Unknown  string
	Answered bool       // a small one
	Size     int        // largest size of a packet that was tried, in bytes: the MTU of the interface
	Largest  int        // largest size that was answered
	Reported int        // MTU in an ICMP error; 0: none came
	By       netip.Addr // sender of that error
	TTL      int        // of an answer
}

// A Drift is the difference between the configuration and the kernel.
type Drift struct {
	Unknown string // of all
	Rules   string // why the rules were not compared; empty: they were
	Backend string
	Changes []Change
}

// A Part is what a change is about.
type Part string

// The parts, by the check that reports them.
const (
	LinkPart       Part = "interface"
	AddressPart    Part = "address"
	RoutesPart     Part = "routes"
	RulesPart      Part = "rules"
	ForwardingPart Part = "forwarding"
	SettingsPart   Part = "settings"
)

// A Change is a step that a run of the router would take.
type Change struct {
	Part Part
	Text string
}

// Drops are the packets that the router's rules have dropped since they were loaded.
type Drops struct {
	Unknown string
	Reasons []Drop
	// Foreign are chains of other programs that drop what their rules do not accept.
	Foreign []string
}

// A Drop is the number of packets of one reason.
type Drop struct {
	Reason  string
	Packets uint64
}

// A Table is the kernel's table of connections.
type Table struct {
	Unknown string
	Entries int
	Limit   int
}

// Clients are the redirected connections of clients that the kernel tracks.
type Clients struct {
	Unknown   string
	Known     int                    // open or recently closed
	Unreplied map[netip.AddrPort]int // without an answer, by server
}

// Ports are the source ports in use to one server.
type Ports struct {
	Protocol string
	Server   netip.AddrPort
	InUse    int
	Limit    int
}

// A Name is a name among the destinations.
type Name struct {
	Name      string
	Addresses []netip.Addr
	Failure   string
}

// An Outcome is how a probe of a TCP port ended.
type Outcome string

// The outcomes.
const (
	Connected   Outcome = "connected"
	Refused     Outcome = "refused"     // a reset answered the SYN
	Reset       Outcome = "reset"       // a reset came after the connection was accepted
	Silent      Outcome = "silent"      // no answer in time
	Unreachable Outcome = "unreachable" // an ICMP error came, or the kernel has no neighbour
	Unsent      Outcome = "unsent"      // the kernel refused to send
)

// OutcomeOf returns how a connection ended from the error of connect(2). A reset and an ICMP
// port unreachable are both ECONNREFUSED.
func OutcomeOf(err error) Outcome {
	var timeout interface{ Timeout() bool }
	switch {
	case err == nil:
		return Connected
	case errors.Is(err, syscall.ECONNREFUSED):
		return Refused
	case errors.Is(err, syscall.ECONNRESET):
		return Reset
	case errors.Is(err, syscall.EADDRNOTAVAIL), errors.Is(err, syscall.EPERM): // no address or port to send from; a filter
		return Unsent
	case errors.As(err, &timeout) && timeout.Timeout():
		return Silent
	}
	return Unreachable
}

// Fault returns the fault of a server whose connections end so, while the gateway answers;
// empty: none, or one of another check.
func (o Outcome) Fault() Fault {
	switch o {
	case Refused:
		return ServerRefuses
	case Reset:
		return ResetBetween
	case Silent:
		return DroppedBeyond
	case Unreachable:
		return ServerUnreachable
	case Connected, Unsent:
	}
	return ""
}

// A Destination is one server of a line, with what was probed.
type Destination struct {
	Protocol string // tcp, udp, sctp; empty: the fallback, of any
	Local    string // ports of the pod; empty: the fallback
	To       netip.AddrPort
	Name     string // of the server; empty: the line has an address

	Route       string // of packets with the reserved address; empty: there is none
	RouteKnown  bool
	Astray      bool // the route leads to another interface
	Probe       Probe
	Echo        Echo
	PathMTU     int    // of the route, as the kernel knows it, in bytes; 0: unknown
	Stray       string // interface by which its answers arrived, if not the egress interface
	ConntrackOK bool   // the kernel tracked an answer to the probe
}

// A Probe is the result of one connection, or of one empty datagram.
type Probe struct {
	Unknown string // why none was sent
	Outcome Outcome
	Sent    int // SYN segments
	Took    time.Duration
	Text    string     // error
	By      netip.Addr // sender of an ICMP error
	At      time.Time
	Source  netip.AddrPort
	TTL     int // of the reset
}

// A Reported is a check in the health of a running router.
type Reported struct {
	Name, State, Detail string
	Fault               Fault
}

// A Router is one of several with the same addresses.
type Router struct {
	Address netip.Addr // on the cluster side
	Own     bool       // it is the one that is observed
	Holds   bool       // it holds the addresses now
	MAC     string     // on the physical network; empty: unknown
}
