package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/resolver"
	"github.com/egress-router/egress-router/internal/tcpproxy"
)

// followEvery is how often the destination file is looked at: a change is picked
// up within a second.
const followEvery = 500 * time.Millisecond

// A dnsProxy is one run of the DNS proxy.
type dnsProxy struct {
	env   config.DNSProxyEnvironment
	log   *slog.Logger
	proxy *tcpproxy.Proxy
	list  []tcpproxy.Destination // in force

	info    os.FileInfo // of the file when it was last read; nil: none
	trouble string      // what is wrong with the file or its ports, said once
}

// runDNSProxy relays connections until the program is told to stop.
func runDNSProxy(ctx context.Context, p Process) error {
	d := &dnsProxy{}
	var err error
	if d.env, err = config.ReadDNSProxy(); err != nil {
		return fmt.Errorf("reading the environment: %w", err)
	}
	d.info = stat(d.env.DestinationFile) // before the file is read: a later change is seen
	c, err := config.ParseDNSProxy(d.env, readFile, d.parse)
	if err != nil {
		return err
	}
	if c.UnitTest {
		_, err := p.Stdout.Write(tcpproxy.UnitTest(d.list))
		return err
	}
	d.log = logger(p.Stderr, c.Log)
	for _, w := range c.Warnings {
		d.log.Warn(w)
	}
	if len(d.list) == 0 {
		d.log.Warn("there is no destination: nothing is listened on")
	}
	d.proxy = tcpproxy.New(tcpproxy.Options{
		Resolver: names{resolver.New(resolver.Options{})}, Idle: c.Idle,
		SendProxy: c.SendProxy, AccessLog: c.AccessLog || c.Debug, Log: d.log,
	})
	if err := d.proxy.Apply(d.list); err != nil {
		d.proxy.Shutdown(0)
		return err
	}
	d.log.Info("ready", "destinations", len(d.list), "idle", c.Idle)
	d.follow(ctx)
	d.log.Info("told to stop: connections may go on for a while", "grace", c.Grace)
	d.proxy.Shutdown(c.Grace)
	return nil
}

// parse reads a destination list and keeps it.
func (d *dnsProxy) parse(text string) error {
	list, err := tcpproxy.Parse(text)
	if err == nil {
		d.list = list
	}
	return err
}

// follow reads the destination file again when it has changed, until the program
// is told to stop.
func (d *dnsProxy) follow(ctx context.Context) {
	if d.env.DestinationFile == "" {
		<-ctx.Done()
		return
	}
	ticker := time.NewTicker(followEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		// Not the kubelet, which swaps a link (AtomicWriter), but others may
		// write a file again within one tick of its time, or piece by piece.
		info := stat(d.env.DestinationFile)
		settled := info != nil && time.Since(info.ModTime()) > 2*followEvery
		if settled && d.trouble == "" && same(info, d.info) {
			continue
		}
		d.info = info
		d.reload()
	}
}

// reload reads the file and has the proxy do what it says. Where it is not
// right, the destinations of before stay.
func (d *dnsProxy) reload() {
	before := d.list
	if fault := config.DNSProxyDestinations(d.env, readFile, d.parse); fault != nil {
		d.complain("the destination file is not right: the destinations of before stay", "error", fault.Sentence, "hint", fault.Hint)
		return
	}
	if !slices.Equal(before, d.list) {
		d.log.Info("destinations changed", "destinations", len(d.list))
	}
	if err := d.proxy.Apply(d.list); err != nil {
		d.complain("listening failed: the other destinations work", "error", err)
		return
	}
	d.trouble = ""
}

// complain logs an error, once as long as it is the same.
func (d *dnsProxy) complain(message string, attributes ...any) {
	if trouble := fmt.Sprint(message, attributes); trouble != d.trouble {
		d.trouble = trouble
		d.log.Error(message, attributes...)
	}
}

// stat returns what there is to know of a file without reading it, nil if it is
// not there.
func stat(name string) os.FileInfo {
	info, err := os.Stat(name)
	if err != nil {
		return nil
	}
	return info
}

func same(a, b os.FileInfo) bool {
	return a != nil && b != nil && os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

// names is the resolver as the DNS proxy wants it.
type names struct{ *resolver.Resolver }

// Lookup returns addresses that are known to be good; the proxy keeps old ones
// itself.
func (n names) Lookup(ctx context.Context, host string) ([]netip.Addr, time.Time, error) {
	answer, err := n.Resolver.Lookup(ctx, host)
	return answer.Addrs, answer.Expires, err
}
