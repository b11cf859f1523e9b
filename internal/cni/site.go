package cni

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

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

// enter opens the namespaces of a call, and waits until no other call works in that of the
// pod.
func (c *call) enter(ctx context.Context) (s site, err error) {
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
	if err := s.reserve(ctx); err != nil {
		s.close()
		return site{}, err
	}
	return s, nil
}

// reserve locks the namespace of the pod, until it is closed: what a call finds there, and
// what it makes of it, is no other call's matter. The kernel unlocks it with the process.
func (s site) reserve(ctx context.Context) error {
	for {
		err := unix.Flock(s.pod.Fd(), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock network namespace: %w", err)
		}
		select {
		case <-ctx.Done():
			return newError(types.ErrTryAgainLater, "", "another call for this pod has not ended: %v", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
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
	log     *slog.Logger
	canLoad func(rules.Plan) bool // the kernel takes them
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

// Differs compares the rules with the plan, of which they may lack the parts that Apply has
// left out: what the kernel refuses here, it refuses in a new namespace too.
func (t tables) Differs(want rules.Plan) []string {
	differs, parts := t.Tx.Differs(want), want.Parts()
	if len(differs) == 0 || len(parts) == 0 || len(t.Tx.Differs(want.WithoutParts(parts))) > 0 || t.canLoad(want) {
		return differs
	}
	return nil
}

// canLoad reports whether the kernel takes rules.
func canLoad(want rules.Plan) bool {
	ns, err := netns.New()
	if err != nil {
		return true
	}
	defer ns.Close()
	return ns.Do(func() error {
		ctx := context.Background()
		tx, err := nft.BeginAll(ctx, families()...)
		if err == nil {
			_, err = tx.Apply(ctx, want)
		}
		return err
	}) == nil
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
			return tables{tx, log, canLoad}, err
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
// attachment, and the families that the namespace forwarded before.
func (c *call) alias(beginning string, before plan.State) string {
	alias := strings.Join([]string{beginning, short(c.conf.Name), short(c.container)}, " ") + " "
	if before.Forwards {
		alias += "4"
	}
	if before.IPv6 != nil && before.IPv6.Forwards {
		alias += "6"
	}
	return alias
}

// adjustedAlias is the alias of the interface of another plugin, with signs of the addresses
// that it gets, and the alias that it had.
func (c *call) adjustedAlias(sources spec.Sources, had plan.State, before string) string {
	alias := []string{c.alias(adjustedBeginning, had), "-"}
	for _, s := range sources {
		if !slices.Contains(had.Addresses, s.Prefix) {
			alias = append(alias, sign(s.Prefix))
		}
	}
	if before != "" {
		alias = append(alias, " ", before)
	}
	return strings.Join(alias, "")
}

// sign returns signLength characters that stand for an address.
func sign(p netip.Prefix) string {
	hash := fnv.New32a()
	_, _ = hash.Write([]byte(p.String())) // never fails
	return base64.RawURLEncoding.EncodeToString(hash.Sum(nil)[:3])
}

const signLength = 4

// short returns a name, or a shorter one that stands for it: an alias has at most 255 bytes
// (linux/if.h, IFALIASZ), and names in Kubernetes have up to 253. Two of them leave room for
// the signs of 27 addresses.
func short(name string) string {
	const most = 60
	if len(name) <= most {
		return name
	}
	hash := fnv.New64a()
	_, _ = hash.Write([]byte(name)) // never fails
	end := fmt.Sprintf("~%016x", hash.Sum64())
	return name[:most-len(end)] + end
}

// The beginnings of the alias of an interface: one that the plugin has made, and one of
// another plugin.
const (
	madeBeginning     = "egress-router"
	adjustedBeginning = "egress-router-chained"
)

// An attachment is a router that an alias describes.
type attachment struct {
	network, container, ifname string
	made                       bool     // the plugin has made the interface
	forwarded                  []string // sysctls of forwarding that were on before
	addresses                  []netip.Prefix
	parent                     int // index of the node's NIC below; 0: unknown

	// Of an interface of another plugin.
	added  []string // the signs of the addresses that it got
	before string   // the alias that it had
}

// attachmentOf returns the router that an interface has.
func attachmentOf(i link.Interface) (a attachment, found bool) {
	words := append(strings.SplitN(i.Alias, " ", 5), "", "", "", "")
	forwarded, signs, _ := strings.Cut(words[3], "-")
	a = attachment{network: words[1], container: words[2], ifname: i.Name}
	switch words[0] {
	case madeBeginning:
		a.made = true
	case adjustedBeginning:
		for sign := range slices.Chunk([]byte(signs), signLength) {
			a.added = append(a.added, string(sign))
		}
		a.before = words[4]
	default: // of a killed call, which had no time for the alias and what follows, or of nobody
		a = attachment{ifname: i.Name, made: i.Macvlan && i.Marked}
		forwarded = "46"
	}
	if strings.Contains(forwarded, "4") {
		a.forwarded = append(a.forwarded, plan.IPForward)
	}
	if strings.Contains(forwarded, "6") {
		a.forwarded = append(a.forwarded, plan.IPv6Forward)
	}
	return a, a.made || words[0] == adjustedBeginning
}

// attached returns the routers of a namespace.
func attached(kernel *link.Kernel) ([]attachment, error) {
	interfaces, err := kernel.Interfaces()
	if err != nil {
		return nil, err
	}
	var all []attachment
	for _, i := range interfaces {
		a, found := attachmentOf(i)
		if !found {
			continue
		}
		if a.addresses, err = kernel.Addresses(a.ifname); err != nil && !is[*link.MissingError](err) {
			return nil, err
		}
		a.parent = i.Parent
		all = append(all, a)
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
			err = ns.Do(func() error {
				kernel, err := link.Open()
				if err != nil {
					return err
				}
				defer kernel.Close()
				routers, err = attached(kernel)
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
