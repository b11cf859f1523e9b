package cni

import (
	"context"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/egress-router/egress-router/internal/link"
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
	s, err := c.enter()
	if err != nil {
		return err
	}
	defer s.close()
	return s.pod.Do(func() error { return c.remove(ctx, s) })
}

// remove removes a router of the calling thread's namespace, which may be one that a killed
// call has left in part. It needs no configuration.
func (c *call) remove(ctx context.Context, s site) error {
	kernel, err := link.Open()
	if err != nil {
		return err
	}
	defer kernel.Close()
	if utils.ValidateInterfaceName(c.ifname) != nil {
		all, err := attached()
		if err != nil {
			return err
		}
		// Without a router's interface there may still be its rules.
		c.ifname = "egress-router"
		if len(all) > 0 {
			c.ifname = all[0].ifname
		}
	}
	egress, exists, err := find(kernel, c.ifname)
	if err != nil {
		return err
	}
	c.adjusts = strings.HasPrefix(egress.Alias, aliases[false]+" ")
	r := spec.Router{Forward: true}
	if d, _, err := c.describe(); err == nil { // without it, the rest is removed
		r.Sources = d.Sources
	}
	var macvlan *spec.Macvlan
	// An interface without an alias is one that a killed call has just created.
	if exists && egress.Macvlan && (egress.Alias == "" || strings.HasPrefix(egress.Alias, aliases[true]+" ")) {
		macvlan = &spec.Macvlan{HostNetns: s.hostFile()}
	}
	cluster, err := kernel.ClusterInterface(c.ifname, spec.DefaultReplyTable)
	if err != nil && !is[*link.MissingError](err) {
		return err
	}
	if err := newRouter(c.want(r, macvlan, cluster), c.log.warnings()).Remove(ctx, nil); err != nil {
		return err
	}
	if c.adjusts {
		return kernel.SetAlias(c.ifname, "")
	}
	return nil
}

// gc removes the routers of the network whose attachment is not valid any more. Outside of
// the namespaces of pods the plugin keeps nothing.
func (c *call) gc(ctx context.Context) error {
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
