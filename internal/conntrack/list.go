package conntrack

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// A Connection is an entry of the kernel's table with a reserved address.
type Connection struct {
	Protocol  rules.Protocol
	State     string // of TCP, such as ESTABLISHED; empty: another protocol
	Replied   bool   // packets of both directions were seen
	Offloaded bool   // its packets take the kernel's flowtable; State and Left are not known then
	Closed    bool   // both sides closed it, or one reset it: it is not open any more
	// Redirected is set for a connection of a client, otherwise it is one of the pod's own.
	Redirected bool
	Client     netip.AddrPort
	Local      netip.AddrPort // destination of the client's packets
	Server     netip.AddrPort
	Reserved   netip.AddrPort // source that the server sees
	Accounted  bool           // Traffic is valid
	Traffic
	// Began is the time of the first packet, the zero Time unless the kernel keeps times of
	// connections (nf_conntrack_timestamp).
	Began time.Time
	Left  time.Duration // until the kernel removes the entry, unless a packet comes
}

// tcpStates are the names of the states of TCP connections, by their numbers
// (linux/netfilter/nf_conntrack_tcp.h), as conntrack(8) prints them.
var tcpStates = []string{"NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE", "SYN_SENT2"}

// List returns the connections with a reserved address of the calling thread's network
// namespace. It changes nothing, and needs CAP_NET_ADMIN.
func List(sources []netip.Addr) ([]Connection, error) {
	var found []Connection
	err := Each(sources, func(c Connection) { found = append(found, c) })
	return found, err
}

// Each calls visit for each connection that List returns, of which there may be a million.
func Each(sources []netip.Addr, visit func(Connection)) error {
	s, err := openSocket()
	if err != nil {
		return &KernelError{"open conntrack socket", err}
	}
	defer s.close()
	own := make(map[[16]byte]bool)
	for _, a := range sources {
		own[a.As16()] = true
	}
	if err := s.ask(messageGet, unix.NLM_F_DUMP, nil, func(m message) {
		if r, ok := decode(m.data); ok && own[r.reserved.addr] && r.server.addr != r.reserved.addr {
			visit(r.connection())
		}
	}); err != nil {
		return &KernelError{"list conntrack entries", err}
	}
	return nil
}

// connection returns the record for people.
func (r *record) connection() Connection {
	c := Connection{
		Protocol: r.protocol, Replied: r.status&statusSeenReply != 0, Closed: r.closed(), Offloaded: r.status&statusOffload != 0, Redirected: r.status&statusDNAT != 0,
		Client: r.client.addrPort(), Local: r.local.addrPort(), Server: r.server.addrPort(), Reserved: r.reserved.addrPort(),
		Accounted: r.accounted, Traffic: r.Traffic, Left: r.left,
	}
	if r.protocol == rules.TCP && !c.Offloaded && int(r.state) < len(tcpStates) {
		c.State = tcpStates[r.state]
	}
	if r.start > 0 {
		c.Began = time.Unix(0, r.start)
	}
	return c
}
