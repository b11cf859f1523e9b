package config

import (
	"bytes"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/egress-router/egress-router/internal/election"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/rules"
)

// A Peers is how a router that stands by finds the others with its addresses, and how it
// speaks with them; the rest is spec.Standby.
type Peers struct {
	Names     []string // addresses, and names of which all addresses are peers
	Priority  uint8    // the router with a higher one claims first; nobody gives way to it
	Reference string   // address and port that is reachable while the cluster side works; empty: none
	Key       []byte   // that authenticates heartbeats; nil: none
	Endpoints string   // Service that the active router leads to itself; empty: none
	APIServer string   // host and port; empty: there is none
}

// Listed reports whether the other routers are a list of addresses, of which a router needs no
// look-up: a name may lag behind them.
func (p Peers) Listed() bool {
	isName := func(name string) bool { _, err := netip.ParseAddr(name); return err != nil }
	return !slices.ContainsFunc(p.Names, isName)
}

// mostPriority is the highest value of EGRESS_STANDBY_PRIORITY. The other limits are those of
// package election.
const mostPriority = 255

// leastKey is the least length of a key that nobody guesses, in bytes.
const leastKey = 16

// heartbeatPort is the UDP port of heartbeats on the cluster side. It is below the ephemeral
// ports (ip_local_port_range in ip-sysctl.rst), so that no socket of the pod has it by chance.
const heartbeatPort = 9467

// parseStandby reads the settings of a router that is one of several with its addresses.
func (c *Config) parseStandby(env Environment, readFile func(string) ([]byte, error), report func(*Error)) {
	on := false
	report(parseBool("EGRESS_STANDBY", env.Standby, &on))
	if !on {
		for _, v := range Variables() {
			if strings.HasPrefix(v.Name, "EGRESS_STANDBY_") && env.value(v.Name) != "" && env.Standby == "" {
				c.Warnings = append(c.Warnings, v.Name+" has no effect without EGRESS_STANDBY=true")
			}
		}
		return
	}
	switch {
	case c.Mode == Init:
		report(&Error{"EGRESS_STANDBY", "EGRESS_STANDBY=true is not possible in mode init, which ends at once: standing by takes a process that stays",
			remedy("use mode legacy, or mode monitor in a container of its own without an init container")})
		return
	case !c.Mode.Stays():
		report(&Error{"EGRESS_STANDBY", fmt.Sprintf("EGRESS_STANDBY=true is not possible in mode %s", c.Mode), remedy("use mode legacy or monitor, or unset the variable")})
		return
	}
	s := &spec.Standby{Port: heartbeatPort, Interval: election.DefaultInterval}
	c.Standby, c.Peers = s, Peers{Priority: election.DefaultPriority, Reference: env.APIServer}
	interval := parseTime("EGRESS_STANDBY_INTERVAL", orDefault(env.StandbyInterval, election.DefaultInterval.String()), notZero, &s.Interval)
	if n, err := strconv.Atoi(env.StandbyInterval); err == nil && n > 0 { // seconds are out of range
		interval.Hint = remedy("write %dms for %[1]d milliseconds", n)
	}
	report(interval)
	if s.Interval < election.MinInterval || s.Interval > election.MaxInterval || s.Interval%time.Millisecond != 0 {
		report(&Error{"EGRESS_STANDBY_INTERVAL", fmt.Sprintf("EGRESS_STANDBY_INTERVAL %s is out of range: expected %s to %s, in whole milliseconds", quote(env.StandbyInterval), election.MinInterval, election.MaxInterval), ""})
	}
	report(c.parsePeers(env.StandbyPeers))
	report(c.parsePriority(env.StandbyPriority))
	report(c.parseWitness(env.StandbyWitness))
	report(c.parseReference(env.StandbyReference))
	report(c.parseKey(env.StandbyKeyFile, readFile))
	report(c.parseEndpoints(env.StandbyEndpoints, env.APIServer))
	report(choose("EGRESS_STANDBY_FENCE", orDefault(env.StandbyFence, string(spec.FenceAuto)), string(spec.FenceAuto), string(spec.FenceRequire)))
	s.Fence = spec.Fence(orDefault(env.StandbyFence, string(spec.FenceAuto)))
	c.parseCarry(env, report)
}

// The values of EGRESS_STANDBY_CARRY.
const (
	carryOff   = "off"
	carryVXLAN = "vxlan"
)

// parseCarry parses how connections continue while another router holds the addresses.
func (c *Config) parseCarry(env Environment, report func(*Error)) {
	const variable, ports = "EGRESS_STANDBY_CARRY", "EGRESS_STANDBY_PORTS"
	choice := orDefault(env.StandbyCarry, carryOff)
	report(choose(variable, choice, carryOff, carryVXLAN))
	if choice != carryVXLAN {
		if env.StandbyPorts != "" {
			c.Warnings = append(c.Warnings, ports+" has no effect without "+variable+"="+carryVXLAN)
		}
		return
	}
	if len(c.Sources) > 0 && len(c.Sources.Of(false)) == 0 {
		report(&Error{variable, variable + "=vxlan carries connections of IPv4, and there is no reserved IPv4 address", remedy("unset it")})
		return
	}
	if c.ReplyMark&spec.CarryMarks != 0 {
		report(&Error{variable, fmt.Sprintf("%s=vxlan marks packets with the bits 0x%x, of which EGRESS_REPLY_MARK has some: expected others", variable, spec.CarryMarks), remedy("set EGRESS_REPLY_MARK to other bits, such as its default")})
	}
	for table := c.ReplyTable + 1; table <= c.ReplyTable+mostParts; table++ {
		if !spec.UsableTable(table) {
			report(&Error{variable, fmt.Sprintf("%s=vxlan uses the routing tables %d to %d, behind EGRESS_REPLY_TABLE: expected none of 253, 254 and 255, and at most %d",
				variable, c.ReplyTable+1, c.ReplyTable+mostParts, math.MaxInt32), remedy("set EGRESS_REPLY_TABLE to another table")})
			break
		}
	}
	c.Standby.Carry = &spec.Carry{}
	if len(c.Helpers) > 0 {
		c.Warnings = append(c.Warnings, "EGRESS_HELPERS with "+variable+"=vxlan: a further connection, such as the data of FTP, keeps the source port of its client, and fails if that is one of another router")
	}
	if env.StandbyPorts == "" {
		for _, name := range c.Peers.Names {
			if _, err := netip.ParseAddr(name); err != nil {
				report(&Error{ports, fmt.Sprintf("%s is not set, and EGRESS_STANDBY_PEERS %s is a name: the parts of the routers follow from addresses only", ports, quote(name)),
					remedy("set it to another range on each router, such as $(INDEX)/2 with the index of the pod of a StatefulSet")})
				return
			}
		}
		return
	}
	first, last, why := parsePorts(env.StandbyPorts)
	if why != "" {
		report(&Error{ports, fmt.Sprintf("%s %s is not a range of ports: %s", ports, quote(env.StandbyPorts), why), remedy("write such as 1024-33279, or 0/2 for the first one of two equal parts")})
		return
	}
	c.Standby.Carry.First, c.Standby.Carry.Last = first, last
}

// The source ports that routers divide among them, without those below 1024, by which some
// servers recognise a privileged client (rresvport(3)).
const firstSource, lastSource = 1024, 65535

// mostParts is the largest number of routers with a tunnel: this one and its peers.
const mostParts = spec.MostCarryPeers + 1

// Part returns the ports of one of some equal parts, by its index from 0.
func Part(index, count int) (first, last rules.Port) {
	size := (lastSource + 1 - firstSource) / count
	return rules.Port(firstSource + index*size), rules.Port(firstSource + (index+1)*size - 1) //nolint:gosec // ports
}

// parsePorts parses a range of ports, or returns why it is none.
func parsePorts(s string) (first, last rules.Port, why string) {
	number := func(s string) int {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil || strconv.FormatUint(n, 10) != s {
			return -1
		}
		return int(n)
	}
	if a, b, is := strings.Cut(s, "/"); is {
		index, count := number(a), number(b)
		if index < 0 || count < 1 || count > mostParts || index >= count {
			return 0, 0, fmt.Sprintf("the index of a part is less than their number, which is at most %d", mostParts)
		}
		first, last = Part(index, count)
		return first, last, ""
	}
	a, b, is := strings.Cut(s, "-")
	low, high := number(a), number(b)
	switch {
	case !is || low < 0 || high < 0:
		return 0, 0, "expected two numbers"
	case low < firstSource || high < low+1:
		return 0, 0, fmt.Sprintf("expected more than one port, from %d to %d", firstSource, lastSource)
	}
	return rules.Port(low), rules.Port(high), "" //nolint:gosec // numbers of 16 bits
}

// PlaceCarry sets the range of source ports of a router with an address on the cluster side, if
// it follows from the addresses of all routers.
func (c *Config) PlaceCarry(own netip.Addr) {
	if c.Standby == nil || c.Standby.Carry == nil || c.Standby.Carry.First != 0 {
		return
	}
	all := []netip.Addr{own}
	for _, name := range c.Peers.Names {
		if a, err := netip.ParseAddr(name); err == nil && a.Is4() {
			all = append(all, a)
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	all = slices.Compact(all)
	if len(all) > mostParts {
		return // the tunnel has no room for them
	}
	s, carry := *c.Standby, *c.Standby.Carry // other copies of the configuration stay
	carry.First, carry.Last = Part(slices.Index(all, own), len(all))
	s.Carry, c.Standby = &carry, &s
}

// parsePeers parses the addresses and names of the other routers.
func (c *Config) parsePeers(list string) *Error {
	const variable = "EGRESS_STANDBY_PEERS"
	c.Peers.Names = strings.FieldsFunc(list, func(r rune) bool { return r == ',' || unicode.IsSpace(r) })
	if len(c.Peers.Names) == 0 {
		return &Error{variable, variable + " is not set: a router that stands by needs to know the others",
			remedy("set it to the name of a headless Service that selects all of them, or to their addresses on the cluster side, separated by commas")}
	}
	for _, name := range c.Peers.Names {
		if _, err := netip.ParseAddr(name); err == nil {
			continue
		}
		if why := faultOfName(name); why != "" {
			return &Error{variable, fmt.Sprintf("%s %s is neither an address nor a name: %s", variable, quote(name), why), ""}
		}
	}
	return nil
}

// faultOfName returns why a word is no name of a host (RFC 1123, section 2.1; RFC 1035,
// section 2.3.4; the underscore is that of RFC 2782); empty: it may be one.
func faultOfName(name string) string {
	if strings.Contains(name+".", "-.") {
		return "a label ends with -"
	}
	return rules.FaultOfName(name)
}

func (c *Config) parsePriority(s string) *Error {
	if s == "" {
		return nil
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil || strconv.FormatUint(n, 10) != s {
		return &Error{"EGRESS_STANDBY_PRIORITY", fmt.Sprintf("EGRESS_STANDBY_PRIORITY %s is not a priority: expected a number from 0 to %d", quote(s), mostPriority), ""}
	}
	c.Peers.Priority = uint8(n)
	return nil
}

// parseWitness parses the host whose answers to pings decide; the gateway by default.
func (c *Config) parseWitness(s string) *Error {
	const variable = "EGRESS_STANDBY_WITNESS"
	if len(c.Sources) == 0 {
		return nil // a fault of its own
	}
	first := c.Sources[0]
	c.Standby.Witness = first.Gateway
	if s == "" {
		return nil
	}
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil || a.Zone() != "" || a.Is4In6():
		return &Error{variable, fmt.Sprintf("%s %s is not an address", variable, quote(s)), remedy("write the address of the gateway, or of a host beyond it that answers pings")}
	case a.Is6() != first.Prefix.Addr().Is6():
		return &Error{variable, fmt.Sprintf("%s %s is not of the family of %s, the first reserved address", variable, a, first.Prefix.Addr()), ""}
	case c.Sources.Have(a):
		return &Error{variable, fmt.Sprintf("%s %s is a reserved address: expected the gateway, or a host beyond it", variable, a), ""}
	case a != first.Gateway && first.Prefix.Contains(a):
		return &Error{variable, fmt.Sprintf("%s %s is in the subnet of the reserved address and not the gateway", variable, a),
			remedy("the answer shows to whom the gateway sends: write the gateway, or an address beyond it")}
	}
	c.Standby.Witness = a
	return nil
}

// noReference is the value of EGRESS_STANDBY_REFERENCE for none.
const noReference = "none"

func (c *Config) parseReference(s string) *Error {
	switch s {
	case "":
		return nil
	case noReference:
		c.Peers.Reference = ""
		return nil
	}
	at, err := netip.ParseAddrPort(s)
	if err != nil || at.Port() == 0 {
		return &Error{"EGRESS_STANDBY_REFERENCE", fmt.Sprintf("EGRESS_STANDBY_REFERENCE %s is not an address and a port: expected such as 10.96.0.1:443, or none", quote(s)), ""}
	}
	c.Peers.Reference = at.String()
	return nil
}

// parseEndpoints parses the name of a Service (RFC 1035 label, as Kubernetes requires).
func (c *Config) parseEndpoints(name, apiServer string) *Error {
	const variable = "EGRESS_STANDBY_ENDPOINTS"
	switch {
	case name == "":
		return nil
	case faultOfName(name) != "" || strings.ContainsAny(name, "._") || name != strings.ToLower(name) || len(name) > 63 || name[0] <= '9':
		return &Error{variable, fmt.Sprintf("%s %s is not the name of a Service", variable, quote(name)), remedy("write the name alone, without the namespace")}
	}
	c.Peers.Endpoints, c.Peers.APIServer = name, apiServer
	return nil
}

func (c *Config) parseKey(file string, readFile func(string) ([]byte, error)) *Error {
	const variable = "EGRESS_STANDBY_KEY_FILE"
	if file == "" {
		able := fmt.Sprintf("any pod that reaches UDP port %d can end the service of this address", heartbeatPort)
		if c.Peers.Listed() {
			able = "a pod that has or forges an address of EGRESS_STANDBY_PEERS can end the service of this address, or any pod if only this router's is there"
		}
		c.Warnings = append(c.Warnings, "heartbeats are not authenticated: "+able+"; set "+variable)
		return nil
	}
	content, err := readFile(file)
	if err != nil {
		return &Error{variable, fmt.Sprintf("%s %s cannot be read: %v", variable, quote(file), cause(err)), remedy("mount a Secret with at least %d random bytes, the same for all routers of the address", leastKey)}
	}
	key := bytes.TrimSpace(content)
	if len(key) < leastKey {
		return &Error{variable, fmt.Sprintf("%s %s has %d bytes: expected at least %d", variable, quote(file), len(key), leastKey), remedy(`take a random key, such as the output of "openssl rand -hex 32"`)}
	}
	c.Peers.Key = key
	return nil
}

// apiServer returns the address and port of the API server, which Kubernetes tells every
// container; empty: there is none.
func apiServer() string {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	at, err := netip.ParseAddrPort(net.JoinHostPort(host, port))
	if err != nil {
		return ""
	}
	return at.String()
}
