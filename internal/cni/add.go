package cni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/object"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
)

// add makes a router of a pod. It checks everything before it changes anything, and rolls
// back after a failure.
func (c *call) add(ctx context.Context) (err error) {
	c.logRequest()
	_, c.adjusts = c.previous()
	made, mac, err := c.router()
	if err != nil {
		return err
	}
	end, err := c.takeTurn(ctx, made)
	if err != nil {
		return err
	}
	defer end()
	p, err := c.prepare(ctx, made, mac)
	if err != nil {
		return err
	}
	for _, w := range p.made.Warnings {
		c.log.line(levelWarning, "%s", w)
	}
	defer p.close()
	changed := false
	defer func() {
		if changed && err != nil { // the runtime has no result
			err = errors.Join(err, p.pod.Do(func() error { return c.remove(context.WithoutCancel(ctx), p.site) }))
		}
	}()
	var egress link.Interface
	if err := p.pod.Do(func() error {
		before, err := p.inspect(c)
		if err != nil {
			return err
		}
		if err := p.apply(ctx, c, before); err != nil {
			return err
		}
		changed = true
		c.logResult(p.made, p.macvlan != nil, p.cluster, before)
		egress, err = c.egress()
		return err
	}); err != nil {
		return err
	}
	result, err := c.result(p.made, egress).GetAsVersion(c.version)
	if err != nil {
		return newError(types.ErrInternal, "", "convert result to version %s: %v", c.version, err)
	}
	return c.print(result)
}

// A prepared router is a valid one at its site.
type prepared struct {
	site
	made    object.Description
	macvlan *spec.Macvlan // nil: an earlier plugin has made the interface
	cluster string        // interface of the cluster side
	want    plan.Want
}

// router returns the router of the configuration and the node, with its hardware address.
func (c *call) router() (d object.Description, mac net.HardwareAddr, err error) {
	if d, mac, err = c.describe(); err == nil {
		err = c.complete(&d)
	}
	return d, mac, err
}

// prepare reads the pod for a router. The caller closes the site.
func (c *call) prepare(ctx context.Context, made object.Description, mac net.HardwareAddr) (p prepared, err error) {
	p.made = made
	if p.site, err = c.enter(ctx); err != nil {
		return p, err
	}
	if !c.adjusts {
		p.macvlan = &spec.Macvlan{
			Parent: p.made.Master, Mode: spec.MacvlanMode(p.made.Mode), HostNetns: p.hostFile(),
			MTU: p.made.MTU, MAC: mac,
		}
	}
	if err = p.pod.Do(func() error { return p.find(c) }); err != nil {
		p.close()
	}
	return p, err
}

// find finds the interface of the cluster side, with which the router is complete.
func (p *prepared) find(c *call) error {
	kernel, err := link.Open()
	if err != nil {
		return err
	}
	defer kernel.Close()
	if p.cluster, err = kernel.ClusterInterface(c.ifname, spec.DefaultReplyTable); err != nil {
		if is[*link.MissingError](err) {
			return newError(CodeCluster, "the pod needs a first interface, by which clients reach it, from another attachment", "find cluster side: %v", err)
		}
		return err
	}
	p.want = c.want(p.made.Router, p.macvlan, p.cluster)
	return nil
}

const otherHint = "a pod can have one router: remove the other attachment or container, or have the runtime call DEL first"

// inspect checks that the namespace can get a router, and returns its state before.
func (p *prepared) inspect(c *call) (plan.State, error) {
	kernel, err := link.Open()
	if err != nil {
		return plan.State{}, err
	}
	defer kernel.Close()
	before, err := kernel.Observe(p.want.Network)
	missing := is[*link.MissingError](err)
	switch {
	case p.macvlan != nil && err == nil:
		return before, newError(CodeInterface, "the runtime has to call DEL first, and attachments of a pod need a name each", "create %q: an interface of that name exists already", c.ifname)
	case p.macvlan == nil && missing:
		return before, newError(CodeInterface, "check the plugin before this one in the list", "adjust %q: prevResult has the interface: %v", c.ifname, err)
	case err != nil && !missing:
		return before, err
	}
	stray, err := nft.FindAll(families())
	all, listErr := attached(kernel)
	switch err = errors.Join(err, listErr); {
	case err != nil:
	case len(all) > 0:
		err = newError(CodeOther, otherHint, "load rules: the namespace has the router of %q", all[0].ifname)
	case stray != nil:
		err = newError(CodeOther, otherHint, "load rules: the namespace has those of another egress-router: %s", stray)
	}
	return before, err
}

// apply configures the namespace. An interface of another plugin gets the alias by which it
// is known that this one did not make it, and what it had before.
func (p *prepared) apply(ctx context.Context, c *call, before plan.State) error {
	if p.macvlan != nil {
		p.macvlan.Alias = strings.TrimSpace(c.alias(madeBeginning, before))
		p.want = c.want(p.made.Router, p.macvlan, p.cluster)
		return newRouter(p.want, c.log.warnings()).Apply(ctx)
	}
	r := newRouter(p.want, c.log.warnings())
	kernel, err := link.Open()
	if err != nil {
		return err
	}
	defer kernel.Close()
	now, _, err := find(kernel, c.ifname)
	if err == nil {
		err = kernel.SetAlias(c.ifname, c.adjustedAlias(p.made.Sources, before, now.Alias))
	}
	if err != nil {
		return err
	}
	if err = r.Apply(ctx); err != nil {
		_ = kernel.SetAlias(c.ifname, now.Alias) // the error that is rolled back counts
	}
	return err
}

// find returns an interface of the calling thread's namespace.
func find(kernel *link.Kernel, name string) (found link.Interface, exists bool, err error) {
	all, err := kernel.Interfaces()
	i := slices.IndexFunc(all, func(i link.Interface) bool { return i.Name == name })
	if err != nil || i < 0 {
		return found, false, err
	}
	return all[i], true, nil
}

// egress returns the egress interface.
func (c *call) egress() (link.Interface, error) {
	kernel, err := link.Open()
	if err != nil {
		return link.Interface{}, err
	}
	defer kernel.Close()
	found, _, err := find(kernel, c.ifname)
	return found, err
}

// result returns the result of ADD: the interface, and each reserved address with its gateway.
// An earlier plugin's result stays.
func (c *call) result(d object.Description, egress link.Interface) *types100.Result {
	r := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, DNS: c.conf.DNS}
	if before := c.conf.prevResult; before != nil {
		r.Interfaces, r.IPs, r.Routes = before.Interfaces, before.IPs, before.Routes
		if r.DNS.IsEmpty() {
			r.DNS = before.DNS
		}
	}
	index, found := c.previous()
	if !found {
		index = len(r.Interfaces)
		r.Interfaces = append(r.Interfaces, &types100.Interface{Name: egress.Name, Mac: egress.MAC.String(), Mtu: egress.MTU, Sandbox: c.netns})
	}
	for _, s := range d.Sources {
		a := s.Prefix
		address := net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}
		if !slices.ContainsFunc(r.IPs, func(ip *types100.IPConfig) bool { return ip.Address.String() == address.String() }) {
			r.IPs = append(r.IPs, &types100.IPConfig{Interface: new(index), Address: address, Gateway: s.Gateway.AsSlice()})
		}
	}
	return r
}

// logRequest logs the addresses as they are given, with the original's lines.
func (c *call) logRequest() {
	ip := c.conf.IP
	if ip == nil {
		return
	}
	c.log.line(levelDebug, "Gateway: %s", strings.Join(ip.Gateway, " "))
	c.log.line(levelDebug, "IP Source Addresses: %v", ip.Addresses)
	c.log.line(levelDebug, "IP Destinations: %v", ip.Destinations)
}

// logResult logs what ADD has done, with the original's lines and in their order, in which an
// administrator searches for them. The order of the steps is another one. Nothing is run by
// iptables: its notation is that of the log.
func (c *call) logResult(d object.Description, made bool, cluster string, before plan.State) {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	if made {
		add("Created macvlan interface")
		add("Renamed macvlan to %q", c.ifname)
	}
	for _, s := range d.Sources.Families() {
		add("Adding route to gateway %s on macvlan interface", s.Gateway)
		state := before
		if s.Gateway.Is6() && before.IPv6 != nil {
			state = plan.State{Routes: before.IPv6.Routes, Cluster: before.IPv6.Cluster}
		}
		if r, known := state.ClusterDefault(); known && r.Gateway.IsValid() {
			add("deleted default route {Ifindex: %d Dst: <nil> Src: <nil> Gw: %s Flags: [] Table: 254}", r.Index, r.Gateway)
		}
		add("Added new default route with gateway %s", s.Gateway)
	}
	const rule = "Added iptables rule: iptables -t nat "
	for _, r := range d.Set.Redirects {
		to := r.To.String()
		if r.ToPort != 0 {
			to = r.Server(r.Port).String()
		}
		add(rule+"PREROUTING -i %s -p %s --dport %s -j DNAT --to-destination %s", cluster, strings.ToUpper(r.Protocol.String()), r.LocalPorts(), to)
	}
	for _, a := range d.Set.Fallbacks() {
		add(rule+"PREROUTING -i %s -j DNAT --to-destination %s", cluster, a)
	}
	for _, s := range d.Sources.Families() {
		add(rule+"-o %s -j SNAT --to-source %s", c.ifname, s.Prefix.Addr())
	}
	c.log.lines(levelDebug, lines...)
}
