package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

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
	c, err := config.ParseHTTPProxy(env, readFile, func(value string) (fault *config.RulesFault) {
		rules, fault = parseHTTPRules(value)
		return fault
	})
	if err != nil {
		return err
	}
	log := logger(p.Stderr, false)
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
		ShutdownGrace:    c.ShutdownGrace,
		MaxHeaderBytes:   c.MaxHeader,
		MaxConnections:   c.MaxConnections,
		AccessLog:        c.AccessLog,
	}, log, resolver.New(resolver.Options{})).Run(ctx)
}

func parseHTTPRules(value string) (httpproxy.Rules, *config.RulesFault) {
	rules, err := httpproxy.Parse(value)
	if parse, ok := errors.AsType[*httpproxy.ParseError](err); ok {
		return nil, &config.RulesFault{Sentence: parse.Sentence, Hint: parse.Hint, Line: parse.Line.Number, Text: parse.Line.Text}
	} else if err != nil {
		return nil, &config.RulesFault{Sentence: err.Error()}
	}
	return rules, nil
}

// writeHTTPProxyVariables writes the part of the help text about this proxy.
func writeHTTPProxyVariables(w io.Writer) {
	fmt.Fprint(w, "\nvariables of http-proxy:\n")
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, v := range config.HTTPProxyVariables() {
		fmt.Fprintf(table, "  %s\t(%s)\t%s\n", v.Name, v.Unset, v.Doc)
	}
	table.Flush()
}
