package manual_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/manual"
)

const root = "../.."

func pages(t *testing.T) []manual.Page {
	t.Helper()
	all, err := manual.Pages(root)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 8 {
		t.Fatalf("%d READMEs found, want at least 8", len(all))
	}
	return all
}

// The first page takes ten minutes to read.
func TestSize(t *testing.T) {
	for _, p := range pages(t) {
		t.Logf("%6d bytes %s", len(p.Text), p.Path)
		if p.Path == "README.md" && len(p.Text) > 12<<10 {
			t.Errorf("%s has %d bytes, want at most %d", p.Path, len(p.Text), 12<<10)
		}
	}
}

// Every code block states its language, without which the other tests skip it.
func TestLanguages(t *testing.T) {
	for _, p := range pages(t) {
		for _, b := range p.Blocks() {
			switch b.Language {
			case "sh", "yaml", "text", "mermaid":
			default:
				t.Errorf("%s: language %q of a block:\n%s", p.Path, b.Language, b.Text)
			}
		}
		if found := regexp.MustCompile("\n\n(    |\t).*").FindString(p.Prose()); found != "" || strings.Contains(p.Prose(), "```") {
			t.Errorf("%s: a block without fences %s", p.Path, found)
		}
	}
}

// A command is run by a test, or there is a reason why not.
func TestCommands(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range pages(t) {
		for _, c := range p.Commands() {
			seen[c] = true
			if commands[c] == (command{}) {
				t.Errorf("%s: command without a test in commands_test.go:\n%s", p.Path, c)
			}
		}
	}
	tests := testNames(t)
	for c, by := range commands {
		if !seen[c] {
			t.Errorf("no README contains the command\n%s", c)
		}
		if (by.test == "") == (by.notRun == "") {
			t.Errorf("%s: want either a test or a reason", c)
		}
		if by.notRun != "" {
			t.Logf("not run: %s: %s", c, by.notRun)
			continue
		}
		if !tests[by.test] && !scriptHas(by.test) {
			t.Errorf("%s: no test %s", c, by.test)
		}
	}
}

// testNames returns the name of every test in any package.
func testNames(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == ".git" {
			return fs.SkipDir
		}
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		content, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`).FindAllStringSubmatch(string(content), -1) {
			names[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// scriptHas looks for a line of a script, written as FILE: TEXT.
func scriptHas(line string) bool {
	file, text, ok := strings.Cut(line, ": ")
	content, err := os.ReadFile(filepath.Join(root, file))
	return ok && err == nil && strings.Contains(string(content), text)
}

// Links lead to files and headings that exist.
func TestLinks(t *testing.T) {
	headings := map[string]string{}
	for _, p := range pages(t) {
		for _, h := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(p.Prose(), -1) {
			anchor := regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(h[1]), "")
			headings[p.Path] += "#" + strings.ReplaceAll(anchor, " ", "-") + "\n"
		}
	}
	for _, p := range pages(t) {
		for _, link := range regexp.MustCompile(`\]\(([^)]*)\)`).FindAllStringSubmatch(p.Prose(), -1) {
			file, anchor, _ := strings.Cut(link[1], "#")
			target := filepath.Join(filepath.Dir(p.Path), file)
			if file == "" {
				target = p.Path
			}
			if _, err := os.Stat(filepath.Join(root, target)); err != nil || strings.Contains(link[1], "://") {
				t.Errorf("%s: link to %s: %v", p.Path, link[1], err)
			}
			if anchor != "" && !strings.Contains(headings[target], "#"+anchor+"\n") {
				t.Errorf("%s: no heading for the link %s; headings:\n%s", p.Path, link[1], headings[target])
			}
		}
	}
}

// Variables of the READMEs are variables of the program.
func TestVariables(t *testing.T) {
	known := map[string]bool{}
	for _, list := range [][]config.Variable{config.Variables(), config.HTTPProxyVariables(), config.DNSProxyVariables()} {
		for _, v := range list {
			known[v.Name] = true
		}
	}
	for _, p := range pages(t) {
		for _, name := range regexp.MustCompile(`EGRESS_[A-Z_]+`).FindAllString(p.Text, -1) {
			if !known[name] {
				t.Errorf("%s: unknown variable %s", p.Path, name)
			}
		}
	}
}
