package rules

import (
	"slices"
	"strconv"
	"strings"
)

// The kernel walks a chain rule by rule, about 25 ns each, so a new connection to
// the last of 10,000 redirects takes ten times as long as one to the first. Large
// sets are therefore a tree of chains: each level divides the ports by 16, and
// the kernel walks at most 16 rules on each of at most four levels.
//
//	EGRESS-PREROUTING            -i eth0 -p tcp -j EGRESS-TCP
//	EGRESS-TCP                   -p tcp --dport 8192:12287 -g EGRESS-TCP-8192-12287
//	EGRESS-TCP-8192-12287        -p tcp --dport 9984:10239 -g EGRESS-TCP-9984-10239
//	EGRESS-TCP-9984-10239        -p tcp --dport 10000 -j DNAT ...
//
// The first step is a jump, so that a packet without a redirect returns to the
// fallback; the others are without return (-g), since no other range contains the
// port. Ranges do not depend on their content: one more line in a list changes
// only the chains from the root to that line. A redirect to several addresses has a chain
// of its own, so that it is one rule in that of its range, and a change of its addresses
// changes that chain alone.
const (
	// plainRedirects is the largest number of redirects in a plain chain, which
	// is easy to read. They delay a connection by at most a microsecond.
	plainRedirects = 32
	// fanOut is the number of ranges into which a chain divides its own, and the
	// largest number of redirects in a chain without ranges.
	fanOut = 16
)

// A portRange is the range of a chain: the ports from first to last.
type portRange struct {
	protocol    Protocol
	first, last uint32 // as numbers; 65536 exceeds a Port
}

// treeProtocols are the protocols with trees, in the order of their jumps.
var treeProtocols = []Protocol{TCP, UDP, SCTP}

// allPorts returns the range of a tree's root.
func allPorts(p Protocol) portRange { return portRange{p, 0, 1<<16 - 1} }

// name returns the name of the range's chain.
func (r portRange) name() string {
	name := ChainPrefix + strings.ToUpper(r.protocol.String())
	if r != allPorts(r.protocol) {
		name += "-" + strconv.Itoa(int(r.first)) + "-" + strconv.Itoa(int(r.last))
	}
	return name
}

// IsTreeChain reports whether a chain has a name of the trees of redirects.
func IsTreeChain(name string) bool {
	for _, p := range treeProtocols {
		root := allPorts(p).name()
		if name == root {
			return true
		}
		first, last, ok := strings.Cut(strings.TrimPrefix(name, root+"-"), "-")
		a, errA := strconv.ParseUint(first, 10, 16)
		b, errB := strconv.ParseUint(last, 10, 16)
		if ok && errA == nil && errB == nil && name == (portRange{p, uint32(a), uint32(b)}).name() {
			return true
		}
	}
	return false
}

// appendTree appends the jumps to the trees of the plan's redirects to the text of
// a chain, one for each protocol, and returns the chains of the trees. The jumps match
// as rule does.
func (p Plan) appendTree(b []byte, chain TextChain, rule Rule) ([]byte, []TextChain) {
	var reached []TextChain
	for _, protocol := range treeProtocols {
		var redirects []Redirect
		for _, r := range p.RedirectsOf(chain.Family) {
			if r.Protocol == protocol {
				redirects = append(redirects, r)
			}
		}
		if len(redirects) == 0 {
			continue
		}
		slices.SortFunc(redirects, func(a, b Redirect) int { return int(a.Port) - int(b.Port) })
		root := allPorts(protocol)
		jump := rule
		jump.Protocol, jump.Target = protocol, Target(root.name())
		b = append(append(append(b, "-A "...), chain.Name...), ' ')
		b = append(jump.append(b, chain.Family, true), '\n')
		reached = appendRange(reached, chain, root, redirects)
	}
	return b, reached
}

// appendRange appends the chain of a range, and the chains below it, to chains.
// The redirects are those in the range, sorted by port.
func appendRange(chains []TextChain, of TextChain, in portRange, redirects []Redirect) []TextChain {
	chain := TextChain{Family: of.Family, Table: of.Table, Name: in.name()}
	at, rule := len(chains), new(Rule)
	if len(redirects) <= fanOut {
		const line = 96 // bytes of a redirect, with room to spare
		chain.Saved = make([]byte, 0, line*len(redirects))
		chains = append(chains, chain)
		for _, r := range redirects {
			chains = chain.appendRedirect(chains, r, rule)
		}
		chains[at] = chain
		return chains
	}
	chains = append(chains, chain) // before the chains below it
	size := (in.last - in.first + 1) / fanOut
	for len(redirects) > 0 {
		r := redirects[0]
		first := uint32(r.Port) / size * size
		part := portRange{in.protocol, first, first + size - 1}
		if whole := (uint32(r.last()) + 1) / size * size; uint32(r.Port) == first && whole > first {
			// It has all ports of one or more parts, which need no chain.
			if whole <= uint32(r.last()) {
				redirects[0] = r.part(Port(whole), r.last())
				r = r.part(r.Port, Port(whole-1))
			} else {
				redirects = redirects[1:]
			}
			chains = chain.appendRedirect(chains, r, rule)
			continue
		}
		var below []Redirect
		for len(redirects) > 0 && uint32(redirects[0].Port) <= part.last {
			r := redirects[0]
			if uint32(r.last()) > part.last {
				redirects[0] = r.part(Port(part.last+1), r.last())
				below = append(below, r.part(r.Port, Port(part.last)))
				break
			}
			below, redirects = append(below, r), redirects[1:]
		}
		chain.appendRange(part)
		chains = appendRange(chains, of, part, below)
	}
	chains[at] = chain
	return chains
}

// appendRedirect appends the rule of a redirect. One to several addresses has a chain of
// its own, which is appended to chains. No other chain has its name: the chains of ranges
// have ports of several redirects. rule is one without matches, which calls share.
func (c *TextChain) appendRedirect(chains []TextChain, r Redirect, rule *Rule) []TextChain {
	if !r.Several() {
		r.spellOut(rule, c.appendRule)
		return chains
	}
	in := portRange{r.Protocol, uint32(r.Port), uint32(r.last())}
	c.appendRange(in)
	own := TextChain{Family: c.Family, Table: c.Table, Name: in.name()}
	r.spellOut(rule, own.appendRule)
	return append(chains, own)
}

// weight returns the number of rules of a plain chain with redirects.
func weight(redirects []Redirect) (n int) {
	for _, r := range redirects {
		n += r.Number()
	}
	return n
}

// appendRange appends the rule that leads to the chain of a range.
func (c *TextChain) appendRange(to portRange) {
	protocol := to.protocol.String()
	c.Saved = append(c.Saved, "-A "+c.Name+" -p "+protocol+" -m "+protocol+" --dport "...)
	c.Saved = strconv.AppendUint(c.Saved, uint64(to.first), 10)
	if to.last != to.first {
		c.Saved = append(c.Saved, ':')
		c.Saved = strconv.AppendUint(c.Saved, uint64(to.last), 10)
	}
	c.Saved = append(c.Saved, " -g "+to.name()+"\n"...)
}
