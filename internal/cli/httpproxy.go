package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/follow"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/httpproxy"
	"github.com/egress-router/egress-router/internal/metrics"
	"github.com/egress-router/egress-router/internal/page"
	"github.com/egress-router/egress-router/internal/resolver"
)

// runHTTPProxy serves clients until ctx ends.
func runHTTPProxy(ctx context.Context, p Process) error {
	hangup, stopHangups := hangups()
	defer stopHangups()
	env, err := config.ReadHTTPProxy()
	if err != nil {
		return fmt.Errorf("reading the environment: %w", err)
	}
	since := follow.At(env.DestinationFile)
	var list httpproxy.Rules
	parse := func(text string) (err error) {
		list, err = httpproxy.Parse(text)
		return err
	}
	c, err := config.ParseHTTPProxy(env, readFile, parse)
	if err != nil {
		return err
	}
	if !c.UnitTest {
		p.queueLog(c.Log)
		p.keepEvents(c.Health)
	}
	log := p.events.Logger(logger(p.Stderr, c.Log))
	for _, w := range c.Warnings {
		log.Warn("configuration warning", "warning", w)
	}
	if c.UnitTest {
		_, err := io.WriteString(p.Stdout, list.Squid())
		return err
	}
	defer runtime.KeepAlive(garbageFloor()) // allocated here
	defer halveProcessors()()
	proxy := httpproxy.New(httpproxy.Config{
		Listen:           c.Listen,
		Rules:            list,
		ConnectTimeout:   c.ConnectTimeout,
		HeaderTimeout:    c.HeaderTimeout,
		KeepAliveTimeout: c.KeepAliveTimeout,
		IdleTimeout:      c.IdleTimeout,
		ShutdownGrace:    c.Grace,
		MaxHeaderBytes:   c.MaxHeader,
		MaxConnections:   c.MaxConnections,
		AccessLog:        c.AccessLog,
	}, log, resolver.New(resolver.Options{Log: logger(p.Stderr, c.Log)})) // its lines name what clients ask for: no events
	stop, err := reporter{
		program: health.HTTPProxy, listen: c.Health, logs: p.logs,
		report:  func(r *health.Report) { reportHTTPProxy(r, proxy.Status(), env.DestinationFile) },
		table:   metrics.HTTPProxy,
		collect: func(emit metrics.Emit, r health.Report) { collectHTTPProxy(emit, r, proxy.Status()) },
		events:  p.events,
		show:    func(page *page.Page, q page.Query) { showHTTPProxy(page, q, proxy) },
	}.start(ctx, log)
	if err != nil {
		return err
	}
	defer stop()

	file := reloader{file: env.DestinationFile, since: since, every: lookEvery, hangup: hangup, log: log, reload: func() error {
		if fault := config.HTTPProxyRules(env, readFile, parse); fault != nil {
			return fault
		}
		proxy.SetRules(list)
		return nil
	}, result: func(trouble string) {
		if trouble != "" {
			proxy.Rejected(errors.New(trouble))
		}
	}}
	reloading, end := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer end()
	background.Go(func() { file.run(reloading) })
	return proxy.Run(ctx)
}
