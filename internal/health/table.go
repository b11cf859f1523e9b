package health

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/egress-router/egress-router/internal/wording"
)

// WriteTable writes reports as a table for people. Ages are relative to now.
func WriteTable(w io.Writer, reports []Report, now time.Time) error {
	var b strings.Builder
	for _, r := range reports {
		b.WriteString(wording.OneLine(r.Program))
		if r.Version != "" {
			b.WriteString(" " + wording.OneLine(r.Version))
		}
		if r.Mode != "" {
			fmt.Fprintf(&b, " (%s)", wording.OneLine(r.Mode))
		}
		if r.Ready {
			b.WriteString(": ready")
		} else {
			b.WriteString(": not ready")
		}
		fmt.Fprintf(&b, ", started %s ago\n", Age(r.Started, now))
		for _, reason := range r.Reasons {
			fmt.Fprintf(&b, "  not ready: %s\n", wording.OneLine(reason))
		}
		var checks strings.Builder
		table := tabwriter.NewWriter(&checks, 0, 0, 2, ' ', 0)
		for _, c := range r.Checks {
			fmt.Fprintf(table, "  %s\t%s\t%s\t%s\n", wording.OneLine(c.Name), c.State, Age(c.Since, now), wording.OneLine(c.Detail))
		}
		table.Flush()
		i := 0
		for line := range strings.Lines(checks.String()) {
			b.WriteString(strings.TrimRight(line, " \n") + "\n") // trailing blanks of rows without a detail
			if fault := r.Checks[i].Fault; fault != "" {
				b.WriteString("    fault: " + wording.OneLine(fault) + "\n")
			}
			i++
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// WriteJSON writes reports as a JSON list, also if there is only one or none.
func WriteJSON(w io.Writer, reports []Report) error {
	if reports == nil {
		reports = []Report{}
	}
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(reports)
}

// Age returns the time since a moment in its two largest units; - for the zero Time.
func Age(since, now time.Time) string {
	if since.IsZero() {
		return "-"
	}
	d := max(now.Sub(since), 0).Truncate(time.Second)
	days, hours := int(d/(24*time.Hour)), int(d/time.Hour%24)
	minutes, seconds := int(d/time.Minute%60), int(d/time.Second%60)
	switch {
	case days > 0:
		return fmt.Sprintf("%dd%dh", days, hours)
	case hours > 0:
		return fmt.Sprintf("%dh%dm", hours, minutes)
	case minutes > 0:
		return fmt.Sprintf("%dm%ds", minutes, seconds)
	}
	return fmt.Sprintf("%ds", seconds)
}
