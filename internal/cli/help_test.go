package cli

import (
	"bytes"
	"strings"
	"testing"
)

// Each command has a help, without an environment, and every way to ask for it prints
// the same.
func TestHelp(t *testing.T) {
	for name := range commands {
		var texts []string
		for _, args := range [][]string{{"help", name}, {name, "-h"}, {name, "--help"}} {
			var out, errs bytes.Buffer
			if code := Run(t.Context(), Process{Args: args, Stdout: &out, Stderr: &errs}); code != exitOK || errs.Len() > 0 {
				t.Errorf("%q: exit code %d, stderr %s", args, code, &errs)
			}
			texts = append(texts, out.String())
		}
		if texts[0] == "" || texts[1] != texts[0] || texts[2] != texts[0] {
			t.Errorf("help of %s:\n%s", name, strings.Join(texts, "---\n"))
		}
		if _, own := commandHelp[name]; !own && !strings.Contains(texts[0], usage) || own && !strings.HasPrefix(texts[0], "usage: egress-router "+name) {
			t.Errorf("help of %s:\n%s", name, texts[0])
		}
		if !strings.HasPrefix(name, "-") && !strings.Contains(usage, "  egress-router "+name+" ") {
			t.Errorf("the usage lacks %s", name)
		}
	}
}
