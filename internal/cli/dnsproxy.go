package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/follow"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/resolver"
	"github.com/egress-router/egress-router/internal/tcpproxy"
	"github.com/egress-router/egress-router/rules"
)

// A dnsProxy is one run of the DNS proxy.
type dnsProxy struct {
	env   config.DNSProxyEnvironment
	conf  config.DNSProxyConfig
	log   *slog.Logger
	proxy *tcpproxy.Proxy
	list  []tcpproxy.Destination // in effect

	listening        atomic.Bool // on the ports of the first list
	board            health.Board
	reloads, refused atomic.Int64 // destination files that changed the list, and invalid ones
}

// runDNSProxy relays connections until ctx ends.
func runDNSProxy(ctx context.Context, p Process) error {
	hangup, stopHangups := hangups()
	defer stopHangups()
	d := &dnsProxy{}
	var err error
	if d.env, err = config.ReadDNSProxy(); err != nil {
		return fmt.Errorf("reading the environment: %w", err)
	}
	since := follow.At(d.env.DestinationFile)
	c, err := config.ParseDNSProxy(d.env, readFile, d.parse)
	if err != nil {
		return err
	}
	if !c.UnitTest { // it ends at once
		p.queueLog(c.Log)
		p.keepEvents(c.Health)
	}
	d.log = p.events.Logger(logger(p.Stderr, c.Log))
	for _, w := range c.Warnings {
		d.log.Warn("configuration warning", "warning", w)
	}
	d.conf = c
	if fault := c.CheckPorts(d.ports()); fault != nil {
		return config.Errors{fault}
	}
	if c.UnitTest {
		_, err := p.Stdout.Write(tcpproxy.UnitTest(d.list))
		return err
	}
	d.proxy = tcpproxy.New(tcpproxy.Options{
		Resolver: names{resolver.New(resolver.Options{Log: d.log})}, Idle: c.Idle,
		SendProxy: c.SendProxy, AccessLog: c.AccessLog || c.Debug, Log: d.log,
	})
	stop, err := d.reporter(p, c).start(ctx, d.log)
	if err != nil {
		return err
	}
	defer stop()
	if err := d.proxy.Apply(d.list); err != nil {
		d.proxy.Shutdown(0)
		return err
	}
	d.listening.Store(true)
	d.setListOK()
	d.log.Info("ready", "destinations", len(d.list), "idle", c.Idle)
	file := reloader{file: d.env.DestinationFile, since: since, every: lookEvery, hangup: hangup, log: d.log, reload: d.reload, result: d.result}
	file.run(ctx)
	d.log.Info("stopping, draining connections", "grace", c.Grace)
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

// ports returns the ports of the list.
func (d *dnsProxy) ports() []rules.Port {
	var ports []rules.Port
	for _, destination := range d.list {
		ports = append(ports, destination.Port)
	}
	return ports
}

// reload reads the destination file and applies it. Open connections continue.
func (d *dnsProxy) reload() error {
	before := d.list
	if fault := config.DNSProxyDestinations(d.env, readFile, d.parse); fault != nil {
		return fault
	}
	if fault := d.conf.CheckPorts(d.ports()); fault != nil {
		d.list = before
		return fault
	}
	if !slices.Equal(before, d.list) {
		d.reloads.Add(1)
		d.log.Info("destinations changed", "destinations", len(d.list))
	}
	return d.proxy.Apply(d.list)
}

// result records the outcome of a reload. trouble is empty after a success.
func (d *dnsProxy) result(trouble string) {
	if trouble == "" {
		d.setListOK()
		return
	}
	d.refused.Add(1)
	d.board.Set(listCheck, health.Warning, trouble)
}

// names adapts the resolver to the interface of the DNS proxy.
type names struct{ *resolver.Resolver }

// Lookup returns the addresses of a host and when they expire. After an error the
// proxy keeps the previous addresses itself.
func (n names) Lookup(ctx context.Context, host string) ([]netip.Addr, time.Time, error) {
	answer, err := n.Resolver.Lookup(ctx, netip.Addr{}, host)
	return answer.Addrs, answer.Expires, err
}
