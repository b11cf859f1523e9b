package cli

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/follow"
	"github.com/egress-router/egress-router/internal/httpproxy"
	"github.com/egress-router/egress-router/internal/resolver"
)

// runHTTPProxy serves clients until the program is told to stop.
func runHTTPProxy(ctx context.Context, p Process) error {
	hangup, stop := hangups()
	defer stop()
	env, err := config.ReadHTTPProxy()
	if err != nil {
		return fmt.Errorf("reading the environment: %w", err)
	}
	since := follow.At(env.DestinationFile)
	var rules httpproxy.Rules
	parse := func(list string) (err error) {
		rules, err = httpproxy.Parse(list)
		return err
	}
	c, err := config.ParseHTTPProxy(env, readFile, parse)
	if err != nil {
		return err
	}
	log := logger(p.Stderr, c.Log)
	for _, w := range c.Warnings {
		log.Warn(w)
	}
	if c.UnitTest {
		_, err := io.WriteString(p.Stdout, rules.Squid())
		return err
	}
	proxy := httpproxy.New(httpproxy.Config{
		Listen:           c.Listen,
		Rules:            rules,
		ConnectTimeout:   c.ConnectTimeout,
		HeaderTimeout:    c.HeaderTimeout,
		KeepAliveTimeout: c.KeepAliveTimeout,
		IdleTimeout:      c.IdleTimeout,
		ShutdownGrace:    c.Grace,
		MaxHeaderBytes:   c.MaxHeader,
		MaxConnections:   c.MaxConnections,
		AccessLog:        c.AccessLog,
	}, log, resolver.New(resolver.Options{}))

	file := reloader{file: env.DestinationFile, since: since, every: lookEvery, hangup: hangup, log: log, reload: func() error {
		if fault := config.HTTPProxyRules(env, readFile, parse); fault != nil {
			return fault
		}
		proxy.SetRules(rules)
		return nil
	}}
	reloading, end := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer end()
	background.Go(func() { file.run(reloading) })
	return proxy.Run(ctx)
}
