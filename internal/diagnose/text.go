package diagnose

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/egress-router/egress-router/internal/wording"
)

// WriteText writes a diagnosis for people: one line for each finding, with the remedy below
// it, then the sentence and the command.
func (d Diagnosis) WriteText(w io.Writer) error {
	var table strings.Builder
	t := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for _, f := range d.Findings {
		found := f.Found
		if f.Subject != "" {
			found = f.Subject + ": " + found
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", f.Check, f.Verdict, wording.OneLine(found))
	}
	t.Flush()
	var b strings.Builder
	lines := strings.SplitAfter(table.String(), "\n")
	for i, f := range d.Findings {
		b.WriteString(lines[i])
		// Many destinations may have one fault.
		if again := i > 0 && d.Findings[i-1].Remedy == f.Remedy; f.Remedy != "" && f.Verdict != OK && !again {
			fmt.Fprintf(&b, "  remedy: %s\n", wording.OneLine(f.Remedy))
		}
	}
	result, unknown := "all well", 0
	for _, f := range d.Findings {
		if f.Verdict == Unknown {
			unknown++
		}
	}
	switch {
	case !d.OK:
		result = "fault: " + string(d.Fault)
	case unknown > 0:
		result = fmt.Sprintf("no fault found, %d checks without a result", unknown)
	}
	fmt.Fprintf(&b, "\n%s\n", result)
	if d.Sentence != "" { // nothing was tried otherwise
		fmt.Fprintf(&b, "%s\n%s\n", wording.OneLine(d.Sentence), d.Capture)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// WriteJSON writes a diagnosis as JSON.
func (d Diagnosis) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(d)
}
