package cni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/object"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/spec"
	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// A site is the place of a router: the namespace of the pod, and that of the node, in which
// the plugin runs.
type site struct {
	host, pod *netns.Namespace
}

// enter opens the namespaces of a call.
func (c *call) enter() (s site, err error) {
	if s.host, err = netns.Current(); err != nil {
		return s, err
	}
	if s.pod, err = netns.Open(c.netns); err == nil && s.pod.Equal(s.host) {
		err = errors.New("it is the namespace of the plugin, expected that of a pod")
	}
	if err != nil {
		s.close()
		return site{}, newError(types.ErrInvalidNetNS, cmp.Or(hintOf(err), "the runtime has to create the namespace first"), "CNI_NETNS is %q: %v", c.netns, err)
	}
	return s, nil
}

func (s site) close() {
	_ = s.host.Close() // nothing was written
	if s.pod != nil {
		_ = s.pod.Close()
	}
}

// hostFile is the file of the node's namespace. The first thread of the process may be in the
// pod's, so it is not /proc/self/ns/net.
func (s site) hostFile() string { return fmt.Sprintf("/proc/self/fd/%d", s.host.Fd()) }

// families returns the families that the kernel has.
func families() []rules.Family {
	if link.HasIPv6() {
		return []rules.Family{rules.IPv4, rules.IPv6}
	}
	return []rules.Family{rules.IPv4}
}

// tables are the rules of a router, all of them in nftables.
type tables struct {
	*nft.Tx
	log *slog.Logger
}

// Apply loads the plan, or, if the kernel refuses it, the plan without the parts that need
// modules of their own.
func (t tables) Apply(ctx context.Context, want rules.Plan) (undo func() error, err error) {
	undo, err = t.Tx.Apply(ctx, want)
	if parts := want.Parts(); is[*nft.LoadError](err) && undo == nil && len(parts) > 0 && ctx.Err() == nil {
		if again, second := t.Tx.Apply(ctx, want.WithoutParts(parts)); second == nil {
			t.log.Warn("MSS clamp not loaded", "error", err)
			return again, nil
		}
	}
	return undo, err
}

// newRouter returns the router for what a namespace shall be. Its methods run in the pod's
// namespace.
func newRouter(want plan.Want, log *slog.Logger) *router.Router {
	return &router.Router{
		Want: want, Mode: "cni", Names: names{}, Log: log,
		LeavesParent: true, // the pod has the routes that the original documents, and no others
		Network:      func() (router.Network, error) { return link.Open() },
		Rules: func(ctx context.Context, _ rules.Plan) (router.Rules, error) {
			tx, err := nft.BeginAll(ctx, families()...)
			return tables{tx, log}, err
		},
		Next: func(context.Context, router.Rules, error) (router.Rules, error) { return nil, nil },
		Strays: func(_ context.Context, inUse router.Rules) ([]router.Stray, error) {
			if inUse != nil {
				return nil, nil
			}
			stray, err := nft.FindAll(families())
			if stray == nil || err != nil {
				return nil, err
			}
			return []router.Stray{stray}, nil
		},
	}
}

// want returns what the pod's namespace shall be, with m as the egress interface to create.
func (c *call) want(r spec.Router, m *spec.Macvlan, cluster string) plan.Want {
	r.Egress, r.Cluster, r.Macvlan = c.ifname, cluster, m
	r.HealthPort = rules.Port(c.conf.MonitorPort)
	r.ReplyMark, r.ReplyTable = spec.DefaultReplyMark, spec.DefaultReplyTable
	r.Conflict = cmp.Or(spec.Conflict(c.conf.Conflict), spec.ConflictWarn)
	want := plan.WantOf(r)
	if !link.HasIPv6() {
		want.Rules = want.Rules.Without(rules.IPv6)
	}
	return want
}

// complete sets what the description leaves to the node: the NIC and the gateways.
func (c *call) complete(d *object.Description) error {
	kernel, err := link.Open()
	if err != nil {
		return err
	}
	defer kernel.Close()
	if d.Master == "" && (!c.adjusts || slices.ContainsFunc(d.Sources, func(s spec.Source) bool { return !s.Gateway.IsValid() })) {
		if d.Master, err = kernel.FindNIC(d.Sources[0].Prefix.Addr()); err != nil {
			return err
		}
	}
	for i, s := range d.Sources {
		if s.Gateway.IsValid() {
			continue
		}
		gateway, err := kernel.DefaultGateway(d.Master, s.Prefix.Addr().Is6())
		if is[*link.MissingError](err) {
			return newError(CodeNIC, wording.Textf("set %s to a NIC of the node", wording.MacvlanParent).In(names{}), "%v", err)
		}
		if err != nil {
			return err
		}
		if !s.Prefix.Contains(gateway) && !gateway.IsLinkLocalUnicast() {
			found := "the node's " + d.Master + " has no default gateway"
			if gateway.IsValid() {
				found = fmt.Sprintf("the default gateway of the node's %s, %s, is not in it", d.Master, gateway)
			}
			return newError(types.ErrInvalidNetworkConfig, "add the gateway of the physical network", "ip.gateway is missing for %s: %s", s.Prefix, found)
		}
		d.Sources[i].Gateway = gateway
	}
	return nil
}

// alias is the text by which a router is found on a node: the network and the container of an
// attachment. The interface of another plugin has another beginning.
func (c *call) alias(own bool) string {
	return strings.Join([]string{aliases[own], short(c.conf.Name), short(c.container)}, " ")
}

// short returns a name, or a shorter one that stands for it: an alias has at most 255 bytes
// (linux/if.h, IFALIASZ), and names in Kubernetes have up to 253.
func short(name string) string {
	const most = 110
	if len(name) <= most {
		return name
	}
	hash := fnv.New64a()
	_, _ = hash.Write([]byte(name)) // never fails
	end := fmt.Sprintf("~%016x", hash.Sum64())
	return name[:most-len(end)] + end
}

// aliases are the beginnings of the alias of an interface, by whether the plugin has made it.
var aliases = map[bool]string{true: "egress-router", false: "egress-router-chained"}

// An attachment is a router that an alias describes.
type attachment struct {
	network, container, ifname string
	made                       bool // the plugin has made the interface
}

// attached returns the routers of the calling thread's namespace.
func attached() ([]attachment, error) {
	kernel, err := link.Open()
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	interfaces, err := kernel.Interfaces()
	if err != nil {
		return nil, err
	}
	var all []attachment
	for _, i := range interfaces {
		words := strings.Fields(i.Alias)
		if len(words) == 3 && (words[0] == aliases[true] || words[0] == aliases[false]) {
			all = append(all, attachment{words[1], words[2], i.Name, words[0] == aliases[true]})
		}
	}
	return all, nil
}

// eachNamespace calls do with the file of each named namespace of the node, and its routers.
func (p Process) eachNamespace(do func(file string, routers []attachment) error) error {
	directory := p.Namespaces
	if directory == "" {
		directory = "/run/netns"
	}
	files, err := os.ReadDir(directory)
	if err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("list network namespaces: %w", err)
	}
	var failed []error
	for _, f := range files {
		file := directory + "/" + f.Name()
		ns, err := netns.Open(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, netns.ErrNoNamespace) {
			continue // deleted in the meantime, or not mounted yet
		}
		var routers []attachment
		if err == nil {
			err = ns.Do(func() (err error) {
				routers, err = attached()
				return err
			})
			_ = ns.Close() // nothing was written
		}
		if err == nil {
			err = do(file, routers)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", file, err))
		}
	}
	return errors.Join(failed...)
}
