package cni

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/spec"
)

// check compares the pod with its router: interface, addresses, routes, sysctls and rules.
// It changes nothing. The rules of a pod with a container in mode monitor are those of the
// container: the runtime calls CHECK with the destinations of ADD, which may be former ones.
func (c *call) check(ctx context.Context) error {
	if c.conf.prevResult == nil {
		return newError(types.ErrInvalidNetworkConfig, "the runtime has to pass the result of ADD", "prevResult is missing")
	}
	if err := c.findMaker(ctx); err != nil {
		return err
	}
	made, mac, err := c.router()
	if err != nil {
		return err
	}
	p, err := c.prepare(ctx, made, mac)
	if err != nil {
		return err
	}
	defer p.close()
	var found []string
	if err := p.pod.Do(func() error {
		egress, err := c.egress()
		if err != nil {
			return err
		}
		found = c.compare(p, egress)
		missing, err := newRouter(p.want, c.log.warnings()).Check(ctx)
		for _, g := range missing.Steps {
			for _, s := range g.Steps {
				if _, loads := s.(plan.Load); loads && c.conf.MonitorPort != 0 {
					continue
				}
				if text, differs := difference(s); differs {
					found = append(found, text)
				}
			}
		}
		return err
	}); is[*link.MacvlanError](err) {
		return newError(CodeNIC, "delete the pod: its successor is configured anew; "+hintOf(err), "%v", err)
	} else if err != nil {
		return err
	}
	if len(found) == 0 {
		return nil
	}
	return newError(CodeDrift, "delete the pod: its successor is configured anew", "%s differs from its configuration: %s", c.ifname, strings.Join(found, "; "))
}

// findMaker finds out whether an earlier plugin has made the interface, which the result of ADD
// does not contain.
func (c *call) findMaker(ctx context.Context) error {
	s, err := c.enter(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	return s.pod.Do(func() error {
		egress, err := c.egress()
		a, found := attachmentOf(egress)
		c.adjusts = found && !a.made
		return err
	})
}

// compare returns the differences between the interface and the result of ADD.
func (c *call) compare(p prepared, egress link.Interface) (found []string) {
	before := c.conf.prevResult
	index, there := c.previous()
	if !there {
		return []string{"prevResult has no interface " + c.ifname}
	}
	if mac := before.Interfaces[index].Mac; egress.Name != "" && mac != "" && !strings.EqualFold(mac, egress.MAC.String()) {
		found = append(found, "hardware address "+egress.MAC.String()+" instead of "+mac)
	}
	for _, s := range p.made.Sources {
		if !slices.ContainsFunc(before.IPs, func(ip *types100.IPConfig) bool { return ip.Address.IP.Equal(net.IP(s.Prefix.Addr().AsSlice())) }) {
			found = append(found, "prevResult has no address "+s.Prefix.String())
		}
	}
	return found
}

// difference returns what a step would repair, if it changes the namespace. After ADD some
// versions of Multus replace the default route by one without a source: packets of the pod
// have the same one all the same, which is the first of their interface.
func difference(s plan.Step) (text string, differs bool) {
	switch s := s.(type) {
	case plan.Change:
		if s.Op == plan.ReplaceRoute && s.Old != nil && s.Route.IsDefault() {
			same := *s.Old
			same.Source = s.Route.Source
			if same.String() == s.Route.String() {
				return "", false
			}
		}
		return s.Found(), true
	case plan.Load, plan.Create, plan.RemoveStray:
		return s.String(), true
	}
	return "", false
}

// status reports whether the node can make a router.
func (c *call) status(ctx context.Context) error {
	unavailable := func(err error) error {
		if e, known := errors.AsType[*types.Error](err); known {
			return newError(types.ErrPluginNotAvailable, e.Details, "%s", e.Msg)
		}
		return newError(types.ErrPluginNotAvailable, hintOf(err), "%v", err)
	}
	if _, err := nft.BeginAll(ctx, families()...); err != nil {
		return unavailable(err)
	}
	kernel, err := link.Open()
	if err != nil {
		return unavailable(err)
	}
	defer kernel.Close()
	d, _, err := c.describe()
	if err != nil {
		return err
	}
	if err := c.complete(&d); err != nil {
		return unavailable(err)
	}
	if _, err := kernel.FindParent(plan.Macvlan{Macvlan: spec.Macvlan{Parent: d.Master}}); err != nil {
		return unavailable(err)
	}
	return nil
}
