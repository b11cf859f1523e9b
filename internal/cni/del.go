package cni

import (
	"context"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
)

// del takes the router out of a pod. It never fails, since a runtime repeats a failed call,
// and a pod that cannot be deleted blocks others: what cannot be removed is logged, and goes
// with the namespace.
func (c *call) del(ctx context.Context) error {
	c.log.line(levelDebug, "Called CNI DEL")
	if isGone(c.netns) {
		return nil
	}
	if err := c.removeFrom(ctx); err != nil {
		c.log.line(levelError, "DEL: %v", err)
		c.stderr.Warn("router not removed", "error", err)
	}
	return nil
}

// removeFrom removes the router of a namespace.
func (c *call) removeFrom(ctx context.Context) error {
	s, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	return s.pod.Do(func() error { return c.remove(ctx, s) })
}

// remove removes the router of the attachment from the calling thread's namespace. A killed
// call may have left it in part. It needs no configuration, and leaves the router of another
// attachment or of a container, and the interface of another plugin: a runtime calls DEL also
// after an ADD that was refused because of these.
func (c *call) remove(ctx context.Context, s site) error {
	kernel, err := link.Open()
	if err != nil {
		return err
	}
	defer kernel.Close()
	all, err := attached(kernel)
	if err != nil {
		return err
	}
	if utils.ValidateInterfaceName(c.ifname) != nil {
		// Without a router's interface there may still be its rules.
		c.ifname = "egress-router"
		if len(all) > 0 {
			c.ifname = all[0].ifname
		}
	}
	_, exists, err := find(kernel, c.ifname)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(all, func(a attachment) bool { return a.ifname == c.ifname })
	if at < 0 && (exists || len(all) > 0) {
		return nil
	}
	have, cluster, err := c.observe(kernel)
	if err != nil {
		return err
	}
	// After the end of its interface a router has no default route.
	if at < 0 && slices.ContainsFunc(slices.Concat(have.Routes, routesOf(have, true)), func(r plan.Route) bool {
		return r.IsDefault() && r.Type == 0 && r.Index != have.Cluster.Index
	}) {
		return nil
	}
	r := spec.Router{Forward: true}
	var keeps []netip.Prefix
	var macvlan *spec.Macvlan
	if at >= 0 && all[at].made {
		macvlan = &spec.Macvlan{HostNetns: s.hostFile()}
	} else if at >= 0 {
		r.Sources, keeps = all[at].sources(have)
	}
	remover := newRouter(c.want(r, macvlan, cluster), c.log.warnings())
	remover.Keeps = keeps
	if at >= 0 {
		remover.Forwarded = all[at].forwarded
	}
	if err := remover.Remove(ctx, nil); err != nil {
		return err
	}
	if at >= 0 && !all[at].made {
		return kernel.SetAlias(c.ifname, all[at].before)
	}
	return nil
}

// observe returns the state of the network, also of IPv6, and the interface of the cluster
// side, empty if it is missing.
func (c *call) observe(kernel *link.Kernel) (have plan.State, cluster string, err error) {
	if cluster, err = kernel.ClusterInterface(c.ifname, spec.DefaultReplyTable); err != nil && !is[*link.MissingError](err) {
		return have, "", err
	}
	var r spec.Router
	if link.HasIPv6() { // an address that no host has (RFC 6666)
		none := netip.MustParseAddr("100::1")
		r.Sources = spec.Sources{{Prefix: netip.PrefixFrom(none, 128), Gateway: none}}
	}
	have, err = kernel.Observe(c.want(r, nil, cluster).Network)
	if is[*link.MissingError](err) {
		err = nil
	}
	return have, cluster, err
}

// routesOf returns the routes of a family.
func routesOf(have plan.State, ipv6 bool) []plan.Route {
	switch {
	case !ipv6:
		return have.Routes
	case have.IPv6 == nil:
		return nil
	}
	return have.IPv6.Routes
}

// sources returns the addresses of an adjusted interface as the sources of its router, and
// those of them that were there before.
func (a attachment) sources(have plan.State) (all spec.Sources, before []netip.Prefix) {
	for _, p := range have.Addresses {
		ipv6 := p.Addr().Is6()
		if ipv6 && p.Addr().IsLinkLocalUnicast() {
			continue
		}
		if !slices.Contains(a.added, sign(p)) {
			before = append(before, p)
		}
		s := spec.Source{Prefix: p}
		first := false
		for _, r := range routesOf(have, ipv6) {
			if r.IsDefault() && r.Index == have.Index && r.Gateway.IsValid() {
				s.Gateway, first = r.Gateway, r.Source == p.Addr()
			}
		}
		if first {
			all = slices.Insert(all, 0, s)
		} else {
			all = append(all, s)
		}
	}
	return all, before
}

// gc removes the routers of the network whose attachment is not valid any more. Outside of
// the namespaces of pods the plugin keeps nothing. The list of valid ones is required (CNI
// specification 1.1, GC): without it nothing is known to be invalid. libcni writes an empty
// one as null, and leaves it out for cnitool, which has called DEL for all before.
func (c *call) gc(ctx context.Context) error {
	if !c.conf.listsValid {
		c.log.line(levelWarning, "GC without cni.dev/valid-attachments: nothing is removed")
		return nil
	}
	return c.process.eachNamespace(func(file string, routers []attachment) error {
		for _, a := range routers {
			if a.network != short(c.conf.Name) || slices.ContainsFunc(c.conf.Valid, a.is) {
				continue
			}
			stale := *c
			stale.container, stale.ifname, stale.netns = a.container, a.ifname, file
			if err := stale.removeFrom(ctx); err != nil {
				return err
			}
			c.log.line(levelWarning, "Removed router of container %s from %s", a.container, file)
		}
		return nil
	})
}

// is reports whether an attachment is one of those that the runtime has.
func (a attachment) is(valid types.GCAttachment) bool {
	return a.container == short(valid.ContainerID) && a.ifname == valid.IfName
}
