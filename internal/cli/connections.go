package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/conntrack"
	"github.com/egress-router/egress-router/internal/health"
	"github.com/egress-router/egress-router/internal/link"
)

// A flow is a connection with a reserved address, for people and scripts.
type flow struct {
	Event     string         `json:"event,omitempty"` // of --follow: open, began or ended
	At        time.Time      `json:"at,omitzero"`     // of the event
	Protocol  string         `json:"protocol"`
	State     string         `json:"state,omitempty"` // of TCP, as conntrack(8) has it
	Replied   bool           `json:"replied"`
	Offloaded bool           `json:"offloaded,omitempty"` // in the kernel's flowtable, which keeps no state of TCP
	Own       bool           `json:"own,omitempty"`       // of the pod itself, such as a probe
	Client    netip.AddrPort `json:"client"`
	Port      uint16         `json:"port"` // of the pod
	Server    netip.AddrPort `json:"server"`
	Source    netip.AddrPort `json:"source"`                  // that the server sees
	Sent      *uint64        `json:"sentBytes,omitempty"`     // nil: the kernel does not count
	Received  *uint64        `json:"receivedBytes,omitempty"` // likewise
	Began     time.Time      `json:"began,omitzero"`
	Outcome   string         `json:"outcome,omitempty"`
	Seconds   *float64       `json:"seconds,omitempty"` // from the begin to the end
}

func flowOf(c conntrack.Connection) flow {
	f := flow{
		Protocol: c.Protocol.String(), State: c.State, Replied: c.Replied, Offloaded: c.Offloaded, Own: !c.Redirected,
		Client: c.Client, Port: c.Local.Port(), Server: c.Server, Source: c.Reserved, Began: c.Began.UTC(),
	}
	f.count(c.Accounted, c.Traffic)
	return f
}

func (f *flow) count(accounted bool, t conntrack.Traffic) {
	if accounted {
		f.Sent, f.Received = &t.BytesOut, &t.BytesIn
	}
}

func flowOfEvent(e conntrack.Event, now time.Time) flow {
	f := flow{
		Event: "began", At: now.UTC(), Protocol: e.Protocol.String(), Client: e.Client, Port: e.Local.Port(),
		Server: e.Server, Source: e.Reserved,
	}
	if e.Began {
		return f
	}
	f.Event, f.Outcome = "ended", string(e.Outcome)
	f.Replied = e.Outcome != conntrack.Unanswered
	if f.count(e.Accounted, e.Traffic); e.Timed {
		seconds := e.Duration.Seconds()
		f.Seconds = &seconds
	}
	return f
}

// status returns the state for people.
func (f flow) status() string {
	switch {
	case f.Offloaded:
		return "offloaded"
	case !f.Replied:
		return strings.TrimSpace(f.State + " unreplied")
	case f.State != "":
		return f.State
	}
	return "replied"
}

// bytesText returns a number of bytes, or - if it is not known.
func bytesText(n *uint64) string {
	if n == nil {
		return "-"
	}
	return fmt.Sprint(*n)
}

// runConnections prints the connections with a reserved address.
func runConnections(ctx context.Context, p Process) error {
	at, _ := parsePlace(p.Args)
	if err := at.enter(p); err != nil {
		return err
	}
	c, _, err := at.configuration(p)
	if err != nil {
		return err
	}
	if at.follow {
		return advised(c, followConnections(ctx, p, at, c))
	}
	flows, err := flows(c)
	switch {
	case err != nil:
		return advised(c, err)
	case at.json:
		e := json.NewEncoder(p.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(flows)
	}
	if err := writeFlows(p.Stdout, flows, time.Now()); err != nil {
		return err
	}
	return writeTroubles(p.Stdout, c)
}

// writeTroubles writes the counters of frames that the egress interface and the NIC below have
// dropped, if there are any: their packets are in no connection.
func writeTroubles(w io.Writer, c config.Config) error {
	kernel, err := link.Open()
	if err != nil {
		return err
	}
	defer kernel.Close()
	look, err := kernel.Look(c.Egress)
	if err != nil {
		return nil // connections may outlive it
	}
	texts := nicsOf(kernel, c, look, slog.New(slog.DiscardHandler)).troubles()
	if len(texts) > 0 {
		_, err = io.WriteString(w, "\ndrops and errors of the interfaces:\n  "+strings.Join(texts, "\n  ")+"\n")
	}
	return err
}

// flows returns the connections, those without an answer first.
func flows(c config.Config) ([]flow, error) {
	list, err := conntrack.List(c.Sources.Addresses())
	if err != nil {
		return nil, err
	}
	all := make([]flow, 0, len(list))
	for _, one := range list {
		all = append(all, flowOf(one))
	}
	first := func(f flow) int { return int(oneIf(f.Replied)) }
	slices.SortFunc(all, func(a, b flow) int {
		return cmp.Or(cmp.Compare(first(a), first(b)), a.Server.Compare(b.Server), a.Client.Compare(b.Client), cmp.Compare(a.Protocol, b.Protocol))
	})
	return all, nil
}

// writeFlows writes a table.
func writeFlows(w io.Writer, flows []flow, now time.Time) error {
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "PROTOCOL\tSTATE\tCLIENT\tPORT\tSERVER\tSOURCE\tSENT\tRECEIVED\tAGE")
	for _, f := range flows {
		client := f.Client.String()
		if f.Own {
			client = "the pod"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", f.Protocol, f.status(), client, f.Port, f.Server, f.Source, bytesText(f.Sent), bytesText(f.Received), health.Age(f.Began, now))
	}
	table.Flush()
	_, err := io.WriteString(w, b.String())
	return err
}

// line returns an event for people.
func (f flow) line() string {
	text := fmt.Sprintf("%s %s %s %s to port %d, server %s, source %s", f.At.Format("15:04:05.000"), f.Event, f.Protocol, f.Client, f.Port, f.Server, f.Source)
	if f.Outcome != "" {
		text += ", " + f.Outcome
	}
	if f.Seconds != nil {
		text += fmt.Sprintf(" after %.3f s", *f.Seconds)
	}
	if f.Sent != nil {
		text += fmt.Sprintf(", %d bytes sent, %d received", *f.Sent, *f.Received)
	}
	return text + "\n"
}

// followConnections prints the connections, and then the begin and the end of each redirected one,
// until ctx ends or stdout has no reader.
func followConnections(ctx context.Context, p Process, at place, c config.Config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var failed error
	write := func(f flow) {
		if at.json {
			failed = json.NewEncoder(p.Stdout).Encode(f)
		} else {
			_, failed = io.WriteString(p.Stdout, f.line())
		}
		if failed != nil {
			cancel()
		}
	}
	t, err := conntrack.Open(conntrack.Options{
		Sources: c.Sources.Addresses(), Mark: c.ReplyMark, Passive: true, Log: logger(p.Stderr, config.Log{Level: slog.LevelWarn}),
		Audit: func(e conntrack.Event) { write(flowOfEvent(e, time.Now())) },
	})
	if err != nil {
		return err
	}
	defer t.Close()
	open, err := flows(c)
	switch {
	case err != nil:
		return err
	case at.json:
		for _, f := range open {
			f.Event, f.At = "open", time.Now().UTC()
			write(f)
		}
	default:
		failed = writeFlows(p.Stdout, open, time.Now())
	}
	if failed != nil {
		return failed
	}
	return cmp.Or(t.Run(ctx), failed)
}
