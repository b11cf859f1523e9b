package rules

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// portsFrom returns redirects of n ports, every step-th from the first.
func portsFrom(p Protocol, first, n, step int) []Redirect {
	var redirects []Redirect
	for i := range n {
		redirects = append(redirects, Redirect{Protocol: p, Port: Port(first + i*step), To: ip("203.0.113.26"), ToPort: Port(i + 1)})
	}
	return redirects
}

// A step is a rule of iptables, reduced to the parts that redirects use.
type step struct {
	protocol      string // empty: any
	first, last   int    // destination ports
	target        string // destination, or a chain
	jumps, leaves bool   // to that chain, with return and without
}

func parseStep(rule string) step {
	s := step{last: 1 << 16}
	words := strings.Fields(rule)
	for i, word := range words {
		switch word {
		case "-p":
			s.protocol = words[i+1]
		case "--dport":
			first, last, isRange := strings.Cut(words[i+1], ":")
			if !isRange {
				last = first
			}
			s.first, _ = strconv.Atoi(first)
			s.last, _ = strconv.Atoi(last)
		}
	}
	s.target = words[len(words)-1]
	s.jumps, s.leaves = words[len(words)-2] == "-j", words[len(words)-2] == "-g"
	return s
}

// A walker walks the chains of a plan as the kernel does.
type walker struct {
	chains map[string][]step
	rules  int // walked so far
}

func newWalker(p Plan) *walker {
	w := &walker{chains: make(map[string][]step)}
	for _, c := range p.IPTables() {
		if c.Table == NAT {
			for rule := range strings.Lines(string(c.Saved)) {
				w.chains[c.Name] = append(w.chains[c.Name], parseStep(rule))
			}
		}
	}
	return w
}

// walk returns the destination that a chain chooses for a packet, if any.
func (w *walker) walk(chain string, protocol Protocol, port int) (to string, found bool) {
	for _, s := range w.chains[chain] {
		w.rules++
		if s.protocol != "" && s.protocol != protocol.String() || port < s.first || port > s.last {
			continue
		}
		switch {
		case s.leaves:
			return w.walk(s.target, protocol, port)
		case s.jumps:
			if to, found = w.walk(s.target, protocol, port); found {
				return to, true
			}
		default:
			return s.target, true
		}
	}
	return "", false
}

// server returns the destination of a port by the target of its rule.
func server(t *testing.T, target string, port int) netip.AddrPort {
	t.Helper()
	shifted, base, shifts := strings.Cut(target, "/")
	address, ports, changes := strings.Cut(shifted, ":")
	to := port
	if changes {
		first, _, _ := strings.Cut(ports, "-")
		to, _ = strconv.Atoi(first)
	}
	if shifts {
		from, _ := strconv.Atoi(base)
		to += port - from
	}
	a, err := netip.ParseAddr(address)
	if err != nil {
		t.Fatalf("target %q: %v", target, err)
	}
	return netip.AddrPortFrom(a, uint16(to))
}

// mixed returns redirects of single ports and of ranges of any length.
func mixed(n int) []Redirect {
	random := rand.New(rand.NewPCG(7, 3))
	var redirects []Redirect
	for _, p := range []Protocol{TCP, SCTP} {
		for port := 1; port < 65000 && len(redirects) < n; port += 1 + random.IntN(40) {
			r := Redirect{Protocol: p, Port: Port(port), To: ip("203.0.113.25"), ToPort: Port(1 + random.IntN(30000))}
			if random.IntN(3) == 0 {
				port += 1 + random.IntN([]int{3, 100, 9000}[random.IntN(3)])
				r.Last = Port(min(port, 65535))
				switch random.IntN(3) {
				case 0:
					r.ToPort = 0
				case 1:
					r.Shifts = true
				}
			}
			redirects = append(redirects, r)
		}
	}
	return redirects
}

// In every set, every port leads to the destination of its line, and ports without
// a line to the fallback.
func TestTreeLeads(t *testing.T) {
	random := rand.New(rand.NewPCG(4, 2))
	var scattered []Redirect
	for i, port := range random.Perm(1 << 16)[:5000] {
		if port == 0 {
			continue
		}
		scattered = append(scattered, Redirect{Protocol: []Protocol{TCP, UDP}[i%2], Port: Port(port), To: ip("203.0.113.25"), ToPort: Port(i + 1)})
	}
	for name, redirects := range map[string][]Redirect{
		"plain":           portsFrom(TCP, 1, plainRedirects, 7),
		"one more":        portsFrom(TCP, 1, plainRedirects+1, 7),
		"ten thousand":    portsFrom(TCP, 10001, 10000, 1),
		"both ends":       append(portsFrom(TCP, 1, 40, 1), portsFrom(TCP, 65496, 40, 1)...),
		"two protocols":   append(portsFrom(TCP, 1, 100, 2), portsFrom(UDP, 2, 100, 2)...),
		"few of one":      append(portsFrom(TCP, 1000, 100, 1), portsFrom(UDP, 53, 1, 1)...),
		"every port":      portsFrom(UDP, 1, 65535, 1),
		"scattered":       scattered,
		"all in one leaf": portsFrom(TCP, 4096, 16, 1),
		"few ranges":      mixed(20),
		"ranges":          mixed(3000),
		"all but some":    append(portsFrom(TCP, 1, 40, 1), Redirect{Protocol: TCP, Port: 41, Last: 65535, To: ip("203.0.113.25")}),
	} {
		t.Run(name, func(t *testing.T) {
			lookup := NewLookup(redirects)
			w := newWalker(NewPlan(Set{Redirects: redirects, Fallback: ip("203.0.113.27")}, sides))
			most := 0
			for port := 1; port < 1<<16; port++ {
				for _, p := range []Protocol{TCP, UDP, SCTP} {
					to := netip.AddrPortFrom(ip("203.0.113.27"), uint16(port))
					if i, ok := lookup.Find(IPv4, p, Port(port)); ok {
						to = redirects[i].Server(Port(port))
					}
					w.rules = 0
					if got, _ := w.walk("EGRESS-PREROUTING", p, port); server(t, got, port) != to {
						t.Fatalf("%s port %d leads to %q, want %s", p, port, got, to)
					}
					most = max(most, w.rules)
				}
			}
			// A jump for each protocol, four levels, the fallback.
			if limit := max(3+4*(fanOut+1)+1, plainRedirects+1); most > limit {
				t.Errorf("a packet meets %d rules, want %d at most", most, limit)
			}
			for chain, rules := range w.chains {
				if len(rules) > plainRedirects+1 {
					t.Errorf("%s has %d rules", chain, len(rules))
				}
				if len(chain) > 28 { // XT_EXTENSION_MAXNAMELEN, linux/netfilter/x_tables.h
					t.Errorf("the name %s is too long", chain)
				}
			}
		})
	}
}

// Adding a line changes only the chains from the root to it.
func TestTreeIsStable(t *testing.T) {
	redirects := portsFrom(TCP, 10001, 1000, 3)
	texts := func(r []Redirect) map[string][]byte {
		found := make(map[string][]byte)
		for _, c := range NewPlan(Set{Redirects: r}, sides).IPTables() {
			if c.Table == NAT {
				found[c.Name] = c.Saved
			}
		}
		return found
	}
	before, after := texts(redirects), texts(append(redirects, Redirect{Protocol: TCP, Port: 10002, To: ip("203.0.113.25")}))
	var changed []string
	for name := range after {
		if !bytes.Equal(before[name], after[name]) {
			changed = append(changed, name)
		}
	}
	if diff := cmp.Diff([]string{"EGRESS-TCP-10000-10015"}, changed); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

func TestIsTreeChain(t *testing.T) {
	for name, want := range map[string]bool{
		"EGRESS-TCP": true, "EGRESS-UDP": true, "EGRESS-TCP-4096-8191": true, "EGRESS-UDP-0-4095": true,
		"EGRESS-PREROUTING": false, "EGRESS-MYLOG": false, "EGRESS-TCP-": false, "EGRESS-TCP-1": false, "EGRESS-TCP-01-2": false,
		"EGRESS-TCP-1-2-3": false, "EGRESS-TCP-1-65536": false, "EGRESS-ICMP": false, "EGRESS-TCPX": false, "TCP-1-2": false,
	} {
		if got := IsTreeChain(name); got != want {
			t.Errorf("IsTreeChain(%q) = %v, want %v", name, got, want)
		}
	}
}
