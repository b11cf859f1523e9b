package conntrack

import (
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// Masters returns the connections of the calling thread's network namespace that a
// helper expected, each with the connection whose messages announced it: its master.
// A master without an entry is the zero Connection.
func Masters() (map[rules.Connection]rules.Connection, error) {
	s, err := openSocket()
	if err != nil {
		return nil, &KernelError{"open conntrack socket", err}
	}
	defer s.close()
	type tuple struct {
		protocol rules.Protocol
		src, dst endpoint
	}
	all := make(map[tuple]rules.Connection)
	masters := make(map[rules.Connection]tuple)
	err = s.ask(messageGet, unix.NLM_F_DUMP, nil, func(m message) {
		r, ok := decode(m.data)
		if !ok {
			return
		}
		c := rules.Connection{
			Protocol: r.protocol, From: r.client.addrPort().Addr(), To: r.local.addrPort(),
			RepliesFrom: r.server.addrPort(), RepliesTo: r.reserved.addrPort().Addr(),
		}
		all[tuple{r.protocol, r.client, r.local}] = c
		for kind, data, rest, more := attribute(m.data[genericLength:]); more; kind, data, rest, more = attribute(rest) {
			if kind == ctaTupleMaster {
				protocol, src, dst := decodeTuple(data)
				masters[c] = tuple{protocol, src, dst}
			}
		}
	})
	if err != nil {
		return nil, &KernelError{"list conntrack entries", err}
	}
	found := make(map[rules.Connection]rules.Connection)
	for c, master := range masters {
		found[c] = all[master]
	}
	return found, nil
}
