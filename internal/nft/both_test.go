package nft_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/iptables"
	"github.com/egress-router/egress-router/internal/netns/nstest"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/rules"
)

// Every valid rule has the same effect with every backend: on the packets of
// [traffic], at every hook, with marks, answers, the connections that they leave,
// the counters of drops and the drop log. The rules are all pairs of the matches of
// [matches] that [rules.Plan.Validate] accepts (in the short variant, a share of them), with
// the targets of each chain; the others are errors by definition. After each load the
// kernel lists what was loaded.
//
// Each backend has a router of its own. A plan has rules of both families.
func TestBackendsDoTheSame(t *testing.T) {
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "lock")) // that of the machine has other users
	plans := generate(t)
	backends := []backend{
		{name: "nftables", begin: func(ctx context.Context, _ rules.Plan) (transaction, error) {
			return nft.Begin(ctx, rules.IPv4, rules.IPv6)
		}},
		installed(t, "xtables-nft-multi"),
		installed(t, "xtables-legacy-multi"),
	}
	observed := make([][]string, len(backends))
	var running sync.WaitGroup
	for i, b := range backends {
		running.Go(func() {
			var err error
			if observed[i], err = b.observe(t.Context(), i, plans); err != nil {
				t.Errorf("%s: %v", b.name, err)
			}
		})
	}
	running.Wait()
	if t.Failed() {
		return
	}
	failed := 0
	for n, plan := range plans {
		for i, b := range backends[1:] {
			if diff := cmp.Diff(strings.Split(observed[0][n], "\n"), strings.Split(observed[i+1][n], "\n")); diff != "" && failed < 3 {
				failed++
				t.Errorf("plan %d: - nftables, + %s:\n%s\n%s", n, b.name, diff, plan)
			}
		}
	}
	t.Logf("%d plans, %d lines of packets and connections", len(plans), strings.Count(strings.Join(observed[0], "\n"), "\n"))
}

// A backend is one way to load rules.
type backend struct {
	name  string
	begin func(context.Context, rules.Plan) (transaction, error)
}

type transaction interface {
	Apply(context.Context, rules.Plan) (undo func() error, err error)
	Differs(rules.Plan) []string
	Drops(context.Context, rules.Plan) (rules.Drops, error)
}

// installed returns iptables of one flavour. multi is the file that is each of its
// programs.
func installed(t *testing.T, multi string) backend {
	file, err := exec.LookPath(multi)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		if err := os.Symlink(file, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	found, err := iptables.Find(t.Context(), rules.IPv4, rules.IPv6)
	if err != nil {
		t.Fatal(err)
	}
	return backend{multi, func(ctx context.Context, plan rules.Plan) (transaction, error) {
		tx, err := found.Begin(ctx, plan)
		if err != nil {
			return nil, err
		}
		if tx.Flavour() == iptables.NFTables {
			return flavoured{tx}, nil
		}
		return tx, nil
	}}
}

// flavoured is iptables whose counters are read as the router reads them.
type flavoured struct{ *iptables.Tx }

func (flavoured) Drops(_ context.Context, plan rules.Plan) (rules.Drops, error) {
	return nft.IPTablesDrops([]rules.Family{rules.IPv4, rules.IPv6}, plan)
}

// observe loads each plan into a router, and returns a text for each: the way of every
// packet, and the connections and counters afterwards.
func (b backend) observe(ctx context.Context, number int, plans []rules.Plan) (observed []string, err error) {
	s, err := newStation()
	if err != nil {
		return nil, err
	}
	defer s.close()
	err = s.router.Do(func() error {
		restore, err := pin(number)
		if err != nil {
			return err
		}
		defer restore()
		if err := s.open(); err != nil {
			return err
		}
		tx, err := b.begin(ctx, rules.Plan{})
		if err != nil {
			return err
		}
		invalid := rules.Plan{Chains: []rules.Chain{{Family: rules.IPv6, Table: rules.Filter, Hook: rules.Input, Rules: []rules.Rule{{Port: 80, Target: rules.Return}}}}}
		if _, err := tx.Apply(ctx, invalid); err == nil || !strings.Contains(err.Error(), "a port needs the protocol TCP, UDP or SCTP") {
			return fmt.Errorf("load an invalid rule: %v", err)
		}
		for n, plan := range plans {
			// The programs of both families wait for the same lock, on a busy machine for
			// longer than they are patient.
			_, err := tx.Apply(ctx, plan)
			for begin := time.Now(); err != nil && strings.Contains(err.Error(), "xtables lock") && time.Since(begin) < 10*time.Minute; {
				_, err = tx.Apply(ctx, plan)
			}
			if err != nil {
				return fmt.Errorf("load plan %d: %w\n%s", n, err, plan)
			}
			// Marks of packets change no connection, and the kernel lists these slowly.
			marks := slices.ContainsFunc(plan.Chains, func(c rules.Chain) bool {
				return slices.ContainsFunc(c.Rules, func(r rules.Rule) bool { return r.Target == rules.MarkPacket })
			})
			if n == 0 {
				if err := keepConnections(); err != nil {
					return err
				}
			}
			text, err := s.run(!marks)
			if err != nil {
				return fmt.Errorf("plan %d: %w\n%s", n, err, plan)
			}
			if tx, err = b.begin(ctx, plan); err != nil {
				return err
			}
			if found := tx.Differs(plan); len(found) > 0 {
				return fmt.Errorf("plan %d is not listed as loaded: %q\n%s", n, found, plan)
			}
			drops, err := tx.Drops(ctx, plan)
			if err != nil {
				return err
			}
			for _, at := range slices.SortedFunc(maps.Keys(drops), func(a, b rules.DropRule) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) }) {
				if drops[at] > 0 {
					text += fmt.Sprintf("%v: %d packets\n", at, drops[at])
				}
			}
			observed = append(observed, text)
		}
		return nil
	})
	return observed, err
}

// pin keeps the calling thread on one processor, by number: a frame is received on the
// processor that sends it, in the order of sending (net/core/dev.c, enqueue_to_backlog).
func pin(number int) (restore func(), err error) {
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return nil, os.NewSyscallError("sched_getaffinity", err)
	}
	cpu := 0
	for skip := number % all.Count(); skip > 0 || !all.IsSet(cpu); cpu++ {
		if all.IsSet(cpu) {
			skip--
		}
	}
	one.Set(cpu)
	return func() { _ = unix.SchedSetaffinity(0, &all) }, os.NewSyscallError("sched_setaffinity", unix.SchedSetaffinity(0, &one))
}

// matches returns the matches of a family's rules: each field with values that match
// some of the packets.
func matches(f rules.Family) []rules.Rule {
	h := of[f]
	icmp, echo, unreachable, redirect := rules.ICMP, rules.EchoRequest, rules.Message(3), rules.RedirectMessage
	if f == rules.IPv6 {
		icmp, echo, unreachable, redirect = rules.ICMPv6, 128, 1, rules.RedirectMessageIPv6
	}
	discovery := []rules.Rule{{}}
	if f == rules.IPv6 {
		for _, m := range []rules.Message{rules.ListenerQuery, rules.NeighbourSolicitation, rules.NeighbourAdvert, rules.ListenerReportV2} {
			discovery = append(discovery, rules.Rule{Protocol: icmp, Message: m})
		}
		discovery = append(discovery, rules.Rule{Toward: netip.MustParsePrefix("ff02::/16")}, rules.Rule{From: netip.MustParsePrefix("::/128")}, rules.Rule{From: netip.MustParsePrefix("fe80::/10")})
	}
	return append(discovery, []rules.Rule{
		{From: only(h.client)}, {From: only(h.server)}, {NotFrom: only(h.client)}, {NotFrom: only(h.source)}, {Toward: only(h.router)}, {Toward: only(h.server)}, {NotToward: only(h.source)}, {NotToward: only(h.server)},
		{From: network(h.client, 11)}, {NotFrom: network(h.source, 13)}, {Toward: network(h.server, 21)}, {NotToward: network(h.router, 7)},
		{In: links[clusterSide]}, {In: links[egressSide]}, {Out: links[egressSide]}, {Out: links[clusterSide]}, {NotOut: links[egressSide]},
		{Protocol: rules.TCP}, {Protocol: rules.UDP}, {Protocol: icmp}, {Protocol: 253},
		{Protocol: rules.TCP, Port: 80}, {Protocol: rules.TCP, Port: 8080}, {Protocol: rules.UDP, Port: 53}, {Protocol: rules.UDP, Port: 69}, {Protocol: rules.TCP, SYN: true},
		{Protocol: rules.TCP, Port: 70, Last: 80}, {Protocol: rules.UDP, Port: 53, Last: 68}, {Protocol: rules.SCTP, Port: 80},
		{Clients: rules.Share{Bits: 1, End: 1}}, {Clients: rules.Share{Bits: 1}}, {Clients: rules.Share{Bits: 3, End: 5}}, {Clients: rules.Share{Bits: 8, End: 2}},
		{Protocol: icmp, Message: echo}, {Protocol: icmp, Message: unreachable}, {Protocol: icmp, Message: redirect},
		{Marked: connectionMark}, {Unmarked: connectionMark}, {RepliesTo: h.source}, {RepliesTo: h.client}, {RepliesNotTo: h.source}, {RepliesNotTo: h.client},
		{Confirmed: true}, {Redirected: true}, {Expected: true}, {Original: true}, {Reply: true}, {Unconnected: true}, {Invalid: true},
	}...)
}

// only returns the network of one address, and network a larger one.
func only(a netip.Addr) netip.Prefix { return network(a, a.BitLen()) }

func network(a netip.Addr, bits int) netip.Prefix { return netip.PrefixFrom(a, bits).Masked() }

// connectionMark is the mark of connections from the cluster side.
const connectionMark rules.Mark = 1 << 12

// both returns the rule with the matches of both; ok is false if they differ in a field.
func both(a, b rules.Rule) (r rules.Rule, ok bool) {
	r = a
	into, from := reflect.ValueOf(&r).Elem(), reflect.ValueOf(b)
	for i := range into.NumField() {
		switch {
		case from.Field(i).IsZero():
		case !into.Field(i).IsZero() && !into.Field(i).Equal(from.Field(i)):
			return r, false
		default:
			into.Field(i).Set(from.Field(i))
		}
	}
	return r, true
}

// helpers are the helpers of every plan.
var helpers = []rules.Helper{{Name: "tftp", Protocol: rules.UDP, Port: 69}}

// environment returns the rules of both families that make connections of each kind: some
// are marked, translated or expected. It has every chain that both backends have.
func environment() rules.Plan {
	plan := rules.Plan{Helpers: helpers}
	for _, f := range families {
		h := of[f]
		plan.Redirects = append(plan.Redirects,
			rules.Redirect{Protocol: rules.TCP, Port: 79, Last: 90, To: h.server, ToPort: 8079, Shifts: true},
			rules.Redirect{Protocol: rules.UDP, Port: 50, Last: 60, To: h.server}, rules.Redirect{Protocol: rules.UDP, Port: 69, To: h.server})
		plan.Chains = append(plan.Chains,
			rules.Chain{Family: f, Table: rules.Raw, Hook: rules.Prerouting, Rules: []rules.Rule{
				{In: links[clusterSide], Protocol: rules.UDP, Port: 69, Target: rules.AttachHelper, Helper: "tftp"},
			}},
			rules.Chain{Family: f, Table: rules.Mangle, Hook: rules.Prerouting, Rules: []rules.Rule{
				{In: links[clusterSide], Original: true, Target: rules.MarkConnection, Mark: connectionMark},
			}},
			rules.Chain{Family: f, Table: rules.NAT, Hook: rules.Prerouting, Rules: []rules.Rule{
				{In: links[clusterSide], Target: rules.Redirected},
				{In: links[clusterSide], Toward: only(h.router), Protocol: rules.UDP, Target: rules.DNAT, To: h.second},
			}},
			rules.Chain{Family: f, Table: rules.Filter, Hook: rules.Forward},
			rules.Chain{Family: f, Table: rules.Filter, Hook: rules.Input},
			rules.Chain{Family: f, Table: rules.Mangle, Hook: rules.Output},
			rules.Chain{Family: f, Table: rules.Mangle, Hook: rules.Postrouting},
			rules.Chain{Family: f, Table: rules.NAT, Hook: rules.Postrouting, Rules: []rules.Rule{{Out: links[egressSide], Target: rules.SNAT, To: h.source}}},
		)
	}
	return plan
}

// targets returns rules for the targets of a family besides MarkPacket, with the matches
// that they need.
func targets(f rules.Family) []rules.Rule {
	h := of[f]
	return []rules.Rule{
		{Target: rules.Redirected}, {Target: rules.DNAT, To: h.second}, {Target: rules.DNAT, To: h.second, Protocol: rules.TCP, ToPort: 8443},
		{Target: rules.DNAT, To: h.second, Protocol: rules.UDP, Port: 53, ToPort: 5353}, {Target: rules.SNAT, To: h.free},
		// The kernel keeps a port that is in the range, and takes another one at random.
		{Target: rules.SNAT, To: h.free, Protocol: rules.UDP, ToPort: 2, ToLast: 65535},
		{Target: rules.MarkConnection, Mark: 0x500}, {Target: rules.MarkConnection, Mark: connectionMark},
		{Target: rules.AttachHelper, Protocol: rules.UDP, Helper: "tftp"}, {Target: rules.ClampMSS, Protocol: rules.TCP, SYN: true},
		{Target: rules.Return}, {Target: rules.Drop}, {Target: rules.Reject}, {Target: rules.LogPacket},
	}
}

// valid returns the rule of chain c with the matches and the target of all parts; ok is
// false if no rule is valid that has these.
func valid(c rules.Chain, parts ...rules.Rule) (r rules.Rule, ok bool) {
	for _, part := range parts {
		if r, ok = both(r, part); !ok {
			return r, false
		}
	}
	if r.Drops() || r.Target == rules.LogPacket {
		r.Reason = rules.Invalid
	}
	c.Rules = []rules.Rule{r}
	return r, rules.Plan{Chains: []rules.Chain{c}, Helpers: helpers}.Validate() == nil
}

// pairs returns rules that mark packets: with each match alone, and with every share-th of
// the valid pairs of matches, from the first-th.
func pairs(c rules.Chain, first, share int) (all []rules.Rule) {
	n := first
	single, seen := matches(c.Family), make(map[rules.Rule]bool)
	for i, a := range single {
		for _, b := range single[i:] {
			if r, ok := valid(c, a, b, rules.Rule{Target: rules.MarkPacket, Mark: 1}); ok && !seen[r] {
				seen[r] = true
				if n++; n%share == 0 || a == (rules.Rule{}) || a == b {
					all = append(all, r)
				}
			}
		}
	}
	return all
}

// draw returns n rules with the other targets of the chain in turn, and random pairs of
// matches.
func draw(c rules.Chain, n int, random *rand.Rand) (all []rules.Rule) {
	single, targets := matches(c.Family), targets(c.Family)
	for i := 0; len(all) < n; i++ {
		if r, ok := valid(c, single[random.IntN(len(single))], single[random.IntN(len(single))], targets[i%len(targets)]); ok {
			all = append(all, r)
		}
	}
	return all
}

// generate returns the plans of the test: the environment, with rules in front of one
// chain of each family. A rule that marks packets hides no other, so that a plan has one
// for each bit of the mark. Plans with other targets have a few rules.
func generate(t *testing.T) (plans []rules.Plan) {
	t.Helper()
	// In the short variant, each match alone and a sixth of the pairs, another sixth for
	// the next chain.
	perChain, perPlan, share := 2, len(rules.Reasons), 6 // plans, and rules in each
	if nstest.Long() {
		perChain, share = 40, 1
	}
	random := rand.New(rand.NewPCG(16, 1))
	missing := make(map[string]bool) // fields of no rule
	for field := range reflect.TypeFor[rules.Rule]().Fields() {
		missing[field.Name] = true
	}
	base := environment()
	half := len(base.Chains) / len(families)
	for at, c4 := range base.Chains[:half] {
		c6 := base.Chains[half+at]
		add := func(size int, four, six []rules.Rule) {
			part := func(list []rules.Rule, n int) []rules.Rule {
				return distinct(list[min(len(list), n):min(len(list), n+size)])
			}
			for n := 0; n < max(len(four), len(six)); n += size {
				plan := base
				plan.Chains = slices.Clone(base.Chains)
				plan.Chains[at].Rules = slices.Concat(part(four, n), c4.Rules)
				plan.Chains[half+at].Rules = slices.Concat(part(six, n), c6.Rules)
				for port := range rules.Port(len(plans) % 2 * 40) { // a tree of redirects
					for _, f := range families {
						plan.Redirects = append(slices.Clip(plan.Redirects), rules.Redirect{Protocol: rules.TCP, Port: 20000 + port, To: of[f].second})
					}
				}
				if err := plan.Validate(); err != nil {
					t.Fatal(err)
				}
				plans = append(plans, plan)
				for _, r := range slices.Concat(plan.Chains[at].Rules, plan.Chains[half+at].Rules) {
					for field, value := range reflect.ValueOf(r).Fields() {
						if !value.IsZero() {
							delete(missing, field.Name)
						}
					}
				}
			}
		}
		add(32, pairs(c4, at, share), pairs(c6, at, share))
		add(perPlan, draw(c4, perChain*perPlan, random), draw(c6, perChain*perPlan, random))
	}
	delete(missing, "Shifts") // of redirects only, which the environment has
	delete(missing, "OneOf")  // of redirects only, at random
	delete(missing, "Name")   // of redirects only, and no match
	delete(missing, "Limits") // the same, in nftables with every backend
	if len(missing) > 0 {
		t.Errorf("fields of no rule: %v", missing)
	}
	return plans
}

// distinct returns the rules with a bit of the mark, or a prefix in the drop log, that
// none of the others has.
func distinct(list []rules.Rule) []rules.Rule {
	list = slices.Clone(list)
	for i := range list {
		if list[i].Target == rules.MarkPacket {
			list[i].Mark = 1 << i
		}
		if list[i].Reason != "" {
			list[i].Reason = rules.Reasons[i]
		}
	}
	return list
}
