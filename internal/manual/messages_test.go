package manual_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Log messages, and errors in tables, stand in the code as the READMEs quote them.
func TestMessages(t *testing.T) {
	code, found := source(t), 0
	for _, p := range pages(t) {
		for _, m := range regexp.MustCompile(`msg=(?:"([^"]+)"|([a-z]+))`).FindAllStringSubmatch(p.Text, -1) {
			found++
			if message := `"` + m[1] + m[2] + `"`; !strings.Contains(code, message) {
				t.Errorf("%s: no log message %s in the code", p.Path, message)
			}
		}
		for _, row := range regexp.MustCompile("(?m)^\\| (`.*`) \\| .* \\|$").FindAllStringSubmatch(table(p.Text), -1) {
			for _, quoted := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
				for _, fragment := range fragments(quoted[1]) {
					found++
					// The front end inserts the name of the list.
					if !strings.Contains(code, fragment) && !strings.Contains(code, strings.Replace(fragment, "EGRESS_DESTINATION", "%s", 1)) {
						t.Errorf("%s: %q of %q is not in the code", p.Path, fragment, quoted[1])
					}
				}
			}
		}
	}
	if found < 40 {
		t.Errorf("%d messages found, want at least 40", found)
	}
}

// source returns the text of the program without its tests.
func source(t *testing.T) string {
	t.Helper()
	var code strings.Builder
	for _, dir := range []string{"cmd/egress-router", "internal/*", "rules"} {
		files, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			code.Write(text)
		}
	}
	return code.String()
}

// table returns the rows of the tables of errors.
func table(text string) string {
	var rows strings.Builder
	for _, m := range regexp.MustCompile(`(?m)^\| (?:last line|log message|the eight commonest faults) \|.*\n\|.*\n((?:\|.*\n)*)`).FindAllStringSubmatch(text, -1) {
		rows.WriteString(m[1])
	}
	return rows.String()
}

// fragments returns the fixed parts of a quoted error: the variable parts are
// in quotes, an ellipsis, an address or the name of a sysctl.
func fragments(quoted string) []string {
	var found []string
	for _, f := range regexp.MustCompile(`…|"[^"]*"|'[^']*'|net\.[a-z0-9._]+`).Split(quoted, -1) {
		f = strings.Trim(f, " :;,=01")
		// The kernel's own text.
		if strings.Contains(f, "device or resource busy") || strings.Contains(f, "invalid argument") || strings.Contains(f, "operation not permitted") {
			continue
		}
		if len(f) > 3 {
			found = append(found, f)
		}
	}
	return found
}
