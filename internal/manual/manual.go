// Package manual reads the READMEs for the tests that compare them with the code:
// generated tables, the commands that a reader is asked to run, links and log
// messages. Only tests import it.
package manual

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// A Page is one README.md.
type Page struct {
	Path string // relative to the repository, with slashes
	Text string
}

// Pages returns every README.md of the repository at root, in lexical order.
func Pages(root string) ([]Page, error) {
	var pages []Page
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "bin"): // not of the repository
			return filepath.SkipDir
		case d.Name() != "README.md":
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(root, path)
		pages = append(pages, Page{filepath.ToSlash(relative), string(text)})
		return err
	})
	return pages, err
}

// A Block is a fenced code block.
type Block struct {
	Language string // the word after the fence; "sh" for commands
	Text     string // without the fences, indented as the opening fence is not
}

var fence = regexp.MustCompile("(?ms)^( *)```([a-z]*)\n(.*?)^ *```$")

// Blocks returns the code blocks of the page, in order.
func (p Page) Blocks() []Block {
	var blocks []Block
	for _, m := range fence.FindAllStringSubmatch(p.Text, -1) {
		blocks = append(blocks, Block{m[2], strings.ReplaceAll("\n"+m[3], "\n"+m[1], "\n")[1:]})
	}
	return blocks
}

// Prose returns the page without its code blocks.
func (p Page) Prose() string { return fence.ReplaceAllString(p.Text, "") }

var (
	comment   = regexp.MustCompile(`(^|\s+)#.*`)
	continued = regexp.MustCompile(`(?:(\|)| \\)\n *`) // by a pipe or a backslash
	// The programs that a command in running text begins with.
	inline = regexp.MustCompile("`((?:apt-get|crictl|curl|docker|egress-router|go|ip|kubectl|make|nft|nsenter|oc|openstack|podman|systemctl|/usr/bin/egress-router|\\.ci/[a-z-]+) [^`]+|\\.ci/[a-z]+)`")
)

// Commands returns the commands of a block: a continued line as one, without comments.
func (b Block) Commands() []string {
	var commands []string
	for line := range strings.Lines(continued.ReplaceAllString(b.Text, "$1 ")) {
		if line = strings.TrimSpace(comment.ReplaceAllString(line, "")); line != "" {
			commands = append(commands, line)
		}
	}
	return commands
}

// Commands returns every command that the page contains: those of its blocks in sh,
// and those in running text.
func (p Page) Commands() []string {
	var commands []string
	for _, b := range p.Blocks() {
		if b.Language == "sh" {
			commands = append(commands, b.Commands()...)
		}
	}
	for _, m := range inline.FindAllStringSubmatch(p.Prose(), -1) {
		commands = append(commands, strings.Join(strings.Fields(m[1]), " "))
	}
	return commands
}

// Find returns the one block in sh of a page that contains a text.
func Find(root, path, text string) (Block, error) {
	page, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		return Block{}, err
	}
	var found []Block
	for _, b := range (Page{path, string(page)}).Blocks() {
		if b.Language == "sh" && strings.Contains(b.Text, text) {
			found = append(found, b)
		}
	}
	if len(found) != 1 {
		return Block{}, fmt.Errorf("looking for %q in %s: expected one block, found %d", text, path, len(found))
	}
	return found[0], nil
}

// Generated compares the generated part of a page with the expected text, and rewrites
// it if update is set. The part stands between two comments that name it,
// <!-- NAME: ... --> and <!-- end of NAME -->.
func Generated(file, name, want string, update bool) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	part := regexp.MustCompile(`(?s)(<!-- ` + regexp.QuoteMeta(name) + `: [^\n]*-->\n)(.*?)(<!-- end of ` + regexp.QuoteMeta(name) + ` -->)`)
	at := part.FindSubmatchIndex(text)
	if at == nil {
		return fmt.Errorf("looking for the part %q in %s: not found", name, file)
	}
	want = "\n" + want + "\n"
	if string(text[at[4]:at[5]]) == want {
		return nil
	}
	if !update {
		return errors.New(file + ", part " + name + ": differs from the code; run make golden")
	}
	return os.WriteFile(file, []byte(string(text[:at[4]])+want+string(text[at[5]:])), 0o644)
}
