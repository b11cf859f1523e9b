package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/httpproxy"
	"github.com/egress-router/egress-router/internal/resolver"
)

// runHTTPProxy serves clients until the program is told to stop.
func runHTTPProxy(ctx context.Context, p Process) error {
	env, err := config.ReadHTTPProxy()
	if err != nil {
		return fmt.Errorf("reading the environment: %w", err)
	}
	var rules httpproxy.Rules
	c, err := config.ParseHTTPProxy(env, readFile, func(list string) (err error) {
		rules, err = httpproxy.Parse(list)
		return err
	})
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
	return httpproxy.New(httpproxy.Config{
		Listen:           c.Listen,
		Rules:            rules,
		RulesFile:        c.DestinationFile,
		ReadFile:         readFile,
		ConnectTimeout:   c.ConnectTimeout,
		HeaderTimeout:    c.HeaderTimeout,
		KeepAliveTimeout: c.KeepAliveTimeout,
		IdleTimeout:      c.IdleTimeout,
		ShutdownGrace:    c.Grace,
		MaxHeaderBytes:   c.MaxHeader,
		MaxConnections:   c.MaxConnections,
		AccessLog:        c.AccessLog,
	}, log, resolver.New(resolver.Options{})).Run(ctx)
}
