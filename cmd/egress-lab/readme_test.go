package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The README has a section for the tables of every part, which a run replaces alone.
func TestReadme(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "README.md")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	for command, parts := range map[string][]string{"bench": parts, "bench-proxies": proxyParts} {
		r, err := openReadme(file, command, parts)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range parts {
			if _, err := r.tee(p, new(strings.Builder)).Write([]byte("\ntable of " + p + "\n\n")); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 { // the second time in place of the first one's tables
			if err := r.write(); err != nil {
				t.Fatal(err)
			}
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	section := func(command, part string) string {
		return "<!-- make " + command + " PART=" + part + " README=1 -->\n"
	}
	before, after := string(text), string(got)
	for command, parts := range map[string][]string{"bench": parts, "bench-proxies": proxyParts} {
		for _, p := range parts {
			_, tables, _ := strings.Cut(after, section(command, p))
			tables, _, _ = strings.Cut(tables, "<!-- end -->\n")
			from, table, fenced := strings.Cut(tables, ":\n\n```\n")
			if !fenced || table != "table of "+p+"\n```\n\n" || !strings.Contains(from, " processors") || !strings.Contains(from, ", Linux ") || !strings.Contains(from, ", load average ") {
				t.Errorf("section of %s:\n%s", p, tables)
			}
		}
	}
	if without(before) != without(after) {
		t.Error("another part of the README has changed")
	}
}

// without returns a README without its tables.
func without(text string) string {
	var kept strings.Builder
	inside := false
	for line := range strings.Lines(text) {
		inside = inside && line != "<!-- end -->\n"
		if !inside {
			kept.WriteString(line)
		}
		inside = inside || strings.HasPrefix(line, "<!-- make ")
	}
	return kept.String()
}

// A README without a section for a part is found before anything is measured.
func TestReadmeWithoutSection(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "README.md")
	const text = "<!-- make bench PART=load README=1 -->\n<!-- end -->\n<!-- make bench-proxies PART=http README=1 -->\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openReadme(file, "bench", []string{partLoad}); err != nil {
		t.Error(err)
	}
	for part, command := range map[string]string{partStandby: "bench", partHTTP: "bench-proxies"} {
		_, err := openReadme(file, command, []string{part})
		if want := `expected the lines "<!-- make ` + command + ` PART=` + part + ` README=1 -->" and, behind it, "<!-- end -->"`; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %s", part, err, want)
		}
	}
	if _, err := openReadme(file+".txt", "bench", []string{partLoad}); err == nil {
		t.Error("a file that is not there is no error")
	}
}
