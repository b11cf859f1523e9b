package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/diagnose"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/sysctl"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// The times of a diagnosis, which takes at most five seconds with the time to read the
// rules.
const (
	// inquiryPause is the time for the answer to a request to a neighbour, which answers
	// within 30 ms, and of which there are three.
	inquiryPause = 300 * time.Millisecond
	nameLimit    = 1500 * time.Millisecond // for the addresses of all names
)

// An observer collects what a diagnosis is made of.
type observer struct {
	at      place
	c       config.Config
	log     *slog.Logger
	router  *router.Router
	kernel  *link.Kernel
	look    link.Look
	state   plan.State
	stateOK bool
	lacks   []string // capabilities that this process lacks
	o       diagnose.Observation

	usable        map[netip.Addr]bool // the reserved addresses that the interface has
	gatewayEchoes map[netip.Addr]*diagnose.Echo
}

func newObserver(at place, c config.Config, partial string, log *slog.Logger) *observer {
	return &observer{at: at, c: c, log: log, lacks: missing(capabilities...), usable: make(map[netip.Addr]bool), o: diagnose.Observation{
		Words: c.Names(),
		At:    time.Now(), Egress: c.Egress, Cluster: c.Cluster, Partial: partial, Forwards: c.Forward,
	}}
}

// lack returns why a process without a capability cannot observe something; empty: it has
// it.
func (w *observer) lack(name string) string {
	if slices.Contains(w.lacks, name) {
		return "this needs the capability " + name
	}
	return ""
}

// observe collects everything. It changes nothing.
func (w *observer) observe(ctx context.Context) (diagnose.Observation, error) {
	kernel, err := link.Open()
	if err != nil {
		return w.o, err
	}
	defer kernel.Close()
	w.kernel = kernel
	if file := w.at.resolvConf(); file != "" {
		keepNameServersOf(&w.c, file, w.log)
	}
	_ = placeCarry(&w.c)                // an error of the cluster interface is found elsewhere
	_, _ = settleFlowtable(&w.c, w.log) // the router itself reports an error
	w.router = newRouter(w.c, w.log)
	w.reported(ctx)
	w.lookUp(ctx)
	w.router.Want = wanted(w.c)
	w.interfaces()
	if w.o.Shut = shut(w.c.Egress); w.o.Shut {
		w.holders(ctx)
		return w.o, ctx.Err()
	}

	targets, configured, err := w.targets()
	if err != nil {
		return w.o, err
	}
	w.o.Configured = configured
	var all sync.WaitGroup
	all.Go(func() { w.drift(ctx) })
	all.Go(func() { w.neighbours(ctx) })
	all.Go(func() { w.probe(ctx, targets) })
	all.Wait()
	for i := range w.o.Gateways {
		w.o.Gateways[i].Echo = *w.gatewayEchoes[w.o.Gateways[i].Address]
	}
	w.connections()
	return w.o, ctx.Err()
}

// shut reports whether there is a gate of the egress interface, and it is shut.
func shut(egress string) bool {
	if loaded, err := nft.GateLoaded(); err != nil || !loaded {
		return false
	}
	for _, partial := range []bool{false, true} {
		if left, err := (nft.Gate{Interface: egress, WithoutEgress: partial}).Left(); err == nil {
			return left == 0
		}
	}
	return false
}

// reported asks a running router, for what this process may not observe itself.
func (w *observer) reported(ctx context.Context) {
	reports, err := health.Ask(ctx)
	if _, none := errors.AsType[*health.NoProgramError](err); err != nil && !none {
		w.o.HealthError = err.Error()
	}
	for _, r := range reports {
		if r.Program != health.Router {
			continue
		}
		for _, c := range r.Checks {
			w.o.Reported = append(w.o.Reported, diagnose.Reported{Name: c.Name, State: c.State.String(), Detail: c.Detail, Fault: diagnose.Fault(c.Fault)})
		}
		for _, m := range r.Routers {
			w.o.Routers = append(w.o.Routers, diagnose.Router{Address: m.Address, Own: m.Own, Holds: m.Holds, MAC: m.MAC})
		}
	}
}

// lookUp sets the addresses of the names of the destinations.
func (w *observer) lookUp(ctx context.Context) {
	names := w.c.Set.Names()
	if len(names) == 0 {
		return
	}
	looking, cancel := context.WithTimeout(ctx, nameLimit)
	defer cancel()
	f := newFollowerOf(w.c, w.at.resolvConf(), w.log)
	f.Changed = func() {}
	f.Follow(names, true)
	if file := w.at.resolvConf(); file != "" {
		go f.Run(looking)
		f.Await(looking)
	}
	states, _, _ := f.States()
	if w.lack("NET_ADMIN") == "" {
		adopt(ctx, f, w.router, w.log)
	}
	w.c.Set = w.c.Set.Resolve(f.Resolution)
	for _, s := range states {
		n := diagnose.Name{Name: s.Name, Addresses: s.Addresses, Failure: s.Failure}
		switch {
		case w.at.resolvConf() == "":
			if n.Addresses = f.Resolution(s.Name).Addresses; len(n.Addresses) == 0 {
				n.Failure = "the rules have no address, and the pod's name servers are not known here; --pid finds them"
			}
		case len(s.Addresses) == 0:
			n.Failure = cmp.Or(s.Failure, fmt.Sprintf("no name server answered in %s", nameLimit))
			n.Addresses = f.Resolution(s.Name).Addresses
		}
		w.o.Names = append(w.o.Names, n)
	}
}

// interfaces observes the egress interface and its addresses.
func (w *observer) interfaces() {
	i := &w.o.Interface
	var err error
	w.look, err = w.kernel.Look(w.c.Egress)
	if gone, is := errors.AsType[*link.MissingError](err); is {
		i.Missing = gone.Error()
	} else if err != nil {
		i.Unknown = err.Error()
	} else {
		*i = diagnose.Interface{
			Kind: w.look.Kind, Parent: w.look.Parent, MAC: w.look.MAC.String(), MTU: w.look.MTU, Up: w.look.Up, Carrier: w.look.Carrier,
			Received: w.look.Received, Sent: w.look.Sent,
		}
		if w.look.Mode != "" {
			i.Kind += " in mode " + w.look.Mode
			i.Private = w.look.Mode == "private"
		}
		nics := nicsOf(w.kernel, w.c, w.look, w.log)
		if i.Troubles = nics.troubles(); len(nics) > 1 {
			i.Parent = nics[1].text
		}
	}
	w.state, err = w.kernel.Observe(w.router.Want.Network)
	w.stateOK = err == nil
	if w.o.Partial != "" {
		w.o.Forwards = w.state.Forwards
	}
	for _, s := range w.c.Sources {
		a := diagnose.Address{Prefix: s.Prefix}
		a.Present = slices.ContainsFunc(w.state.Addresses, func(p netip.Prefix) bool { return p.Addr() == s.Prefix.Addr() })
		if six := w.state.IPv6; six != nil {
			a.Duplicate = slices.Contains(six.Duplicate, s.Prefix.Addr())
		}
		w.o.Addresses = append(w.o.Addresses, a)
		w.usable[s.Prefix.Addr()] = a.Present && !a.Duplicate
	}
}

// present reports whether the egress interface has an address that can be used.
func (w *observer) present(a netip.Addr) bool { return w.usable[a] }

// neighbours asks the gateways, and other hosts for the reserved addresses.
func (w *observer) neighbours(ctx context.Context) {
	why := w.mute()
	var all sync.WaitGroup
	all.Go(func() { w.holders(ctx) })
	families := w.c.Sources.Families()
	w.o.Gateways = make([]diagnose.Gateway, len(families))
	for i, first := range families {
		g := &w.o.Gateways[i]
		*g = diagnose.Gateway{Address: first.Gateway, Source: first.Prefix.Addr(), Protocol: router.ProtocolOf(first.Gateway), Unknown: why, Confirmed: -1}
		if mac, age, err := w.kernel.Neighbour(w.look.Index, first.Gateway); err == nil && mac != nil {
			g.Listed, g.Confirmed = mac.String(), age
		}
		if why == "" {
			all.Go(func() { w.inquire(ctx, g) })
		}
	}
	all.Wait()
}

// mute returns why neighbours cannot be asked; empty: they can.
func (w *observer) mute() string {
	if !w.look.Up {
		return w.c.Egress + " is not up"
	}
	return w.lack("NET_RAW")
}

// holders asks other hosts for the reserved addresses.
func (w *observer) holders(ctx context.Context) {
	why := w.mute()
	var all sync.WaitGroup
	for i := range w.o.Addresses {
		a := &w.o.Addresses[i]
		if a.Unknown = why; why == "" {
			all.Go(func() { w.holder(ctx, a) })
		}
	}
	all.Wait()
}

// inquire asks a gateway. Without the reserved address the request has no sender, so that
// it claims nothing.
func (w *observer) inquire(ctx context.Context, g *diagnose.Gateway) {
	source := g.Source
	if !w.present(source) {
		source = netip.Addr{}
	}
	found, err := arp.Inquire(ctx, w.look.Index, w.look.MAC, source, g.Address, inquiryPause)
	if g.Requests, g.Took = found.Requests, found.Took; err != nil {
		g.Unknown = err.Error()
	}
	if found.MAC != nil {
		g.MAC = found.MAC.String()
	}
	if found.Heard != nil {
		g.Heard = found.Heard.String()
	}
}

// holder asks for another host with a reserved address, twice, since one probe can get
// lost. A probe claims nothing (RFC 5227, section 1.1).
func (w *observer) holder(ctx context.Context, a *diagnose.Address) {
	for range 2 {
		q, err := arp.Ask(w.look.Index, w.look.MAC, a.Prefix.Addr())
		if err != nil {
			a.Unknown = err.Error()
			return
		}
		mac, err := q.Answer(ctx, time.Now().Add(inquiryPause))
		if err != nil {
			a.Unknown = err.Error()
			return
		}
		if mac != nil {
			a.Holder = mac.String()
			return
		}
	}
}

// drift compares the namespace with the configuration.
func (w *observer) drift(ctx context.Context) {
	d := &w.o.Drift
	w.o.Drops.Unknown = w.lack("NET_ADMIN")
	if w.o.Partial != "" {
		d.Unknown, w.o.Drops.Unknown = "the configuration is not known", cmp.Or(w.o.Drops.Unknown, "the rules are not known")
		return
	}
	var steps []plan.Group
	if d.Rules = w.lack("NET_ADMIN"); d.Rules != "" {
		if !w.stateOK {
			d.Unknown = "the network was not read"
			return
		}
		want := w.router.Want
		want.Start = true
		steps = plan.Steps(want, plan.Have{State: w.state})
	} else {
		found, err := w.router.Check(ctx)
		if err != nil {
			d.Unknown, w.o.Drops.Unknown = wording.OneLine(err.Error()), "the rules were not read"
			return
		}
		d.Backend, steps = found.Backend, found.Steps
		w.drops(ctx, found)
	}
	for _, g := range steps {
		for _, s := range g.Steps {
			if part := w.partOf(s); part != "" {
				d.Changes = append(d.Changes, diagnose.Change{Part: part, Text: s.String()})
			}
		}
	}
}

// drops reads the counters of the rules.
func (w *observer) drops(ctx context.Context, found router.Missing) {
	drops, err := found.Drops(ctx)
	if err != nil {
		w.o.Drops.Unknown = wording.OneLine(err.Error())
		return
	}
	if w.o.Drops.Foreign, err = nft.ForeignDrops(); err != nil {
		w.o.Drops.Unknown = err.Error()
		return
	}
	packets := make(map[rules.Reason]uint64)
	for rule, n := range drops {
		packets[rule.Reason] += n
	}
	for _, reason := range rules.Reasons {
		w.o.Drops.Reasons = append(w.o.Drops.Reasons, diagnose.Drop{Reason: string(reason), Packets: packets[reason]})
	}
}

// partOf returns what a step is about; empty: it changes nothing, or only follows another.
func (w *observer) partOf(s plan.Step) diagnose.Part {
	switch s := s.(type) {
	case plan.Create:
		return diagnose.LinkPart
	case plan.Load, plan.RemoveStray:
		return diagnose.RulesPart
	case plan.Change:
		switch s.Op {
		case plan.SetUp, plan.SetDown:
			return diagnose.LinkPart
		case plan.AddAddress, plan.RemoveAddress:
			return diagnose.AddressPart
		case plan.WriteSysctl:
			if strings.HasSuffix(s.Sysctl, "forward") || strings.HasSuffix(s.Sysctl, "forwarding") {
				return diagnose.ForwardingPart
			}
			return diagnose.SettingsPart
		case plan.ReplaceRoute, plan.AppendRoute, plan.DeleteRoute, plan.AddRule, plan.DeleteRule:
			// The routes to name servers are those of a resolv.conf that is not known.
			if w.at.resolvConf() == "" && (s.Route.Kept || s.Old != nil && s.Old.Kept) {
				return ""
			}
			return diagnose.RoutesPart
		}
	}
	return ""
}

// tableNow returns the fill of the kernel's table of connections.
func tableNow() (t diagnose.Table) {
	var err error
	if t.Entries, err = sysctl.ReadInt("net.netfilter.nf_conntrack_count"); err != nil {
		t.Unknown = err.Error()
	}
	t.Limit, _ = sysctl.ReadInt("net.netfilter.nf_conntrack_max") // a namespace may lack it
	return t
}

// connections observes the kernel's table of connections, after the probes.
func (w *observer) connections() {
	w.o.Table = tableNow()
	c := &w.o.Clients
	if c.Unknown = w.lack("NET_ADMIN"); c.Unknown != "" {
		return
	}
	list, err := conntrack.List(w.c.Sources.Addresses())
	if err != nil {
		c.Unknown = err.Error()
		return
	}
	type server struct {
		protocol rules.Protocol
		server   netip.AddrPort
		reserved netip.Addr
	}
	inUse := make(map[server]int)
	c.Unreplied = make(map[netip.AddrPort]int)
	replied := make(map[netip.AddrPort]bool) // the pod's own
	for _, e := range list {
		inUse[server{e.Protocol, e.Server, e.Reserved.Addr()}]++
		switch {
		case !e.Redirected:
			replied[e.Reserved] = replied[e.Reserved] || e.Replied
		case e.Replied:
			c.Known++
		default:
			c.Known++
			c.Unreplied[e.Server]++
		}
	}
	for i := range w.o.Probed {
		d := &w.o.Probed[i]
		d.ConntrackOK = d.Probe.Outcome == diagnose.Silent && d.Protocol == "tcp" && replied[d.Probe.Source]
	}
	for s, n := range inUse {
		if s.protocol == rules.TCP || s.protocol == rules.UDP {
			w.o.Ports = append(w.o.Ports, diagnose.Ports{Protocol: s.protocol.String(), Server: s.server, InUse: n, Limit: portLimit(rangedPorts(w.c), s.server.Addr())})
		}
	}
	slices.SortFunc(w.o.Ports, func(a, b diagnose.Ports) int {
		return cmp.Or(cmp.Compare(b.InUse, a.InUse), a.Server.Compare(b.Server), cmp.Compare(a.Protocol, b.Protocol))
	})
}
