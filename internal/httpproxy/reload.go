package httpproxy

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"github.com/egress-router/egress-router/rules"
)

// reloadInterval is how often the rules' file is looked at. A change is read when
// it has been the same twice, so that one who writes the file where it is, not as
// kubelet does by changing a symbolic link, is not read in the middle. inotify(7)
// would need every directory on the way, since the links are swapped.
const reloadInterval = 250 * time.Millisecond

// watchRules reads the rules again when their file changes. Requests and tunnels
// that are under way stay; the next request is asked by the new rules. What is
// not right is told once, and the old rules stay.
func (p *Proxy) watchRules(ctx context.Context) {
	ticker := time.NewTicker(reloadInterval)
	defer ticker.Stop()
	var read, seen fs.FileInfo // what was read last, and seen last
	var missing bool
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		info, err := os.Stat(p.config.RulesFile) // of what the links lead to
		if err != nil {
			if !missing {
				p.log.Error("reading the rules again: the old ones stay", "file", p.config.RulesFile, "error", err)
			}
			missing, seen = true, nil
			continue
		}
		missing = false
		settled := same(info, seen)
		seen = info
		if !settled || same(info, read) {
			continue
		}
		read = info
		p.reload()
	}
}

// same reports whether two looks at a file saw the same content.
func same(a, b fs.FileInfo) bool {
	return a != nil && b != nil && os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

func (p *Proxy) reload() {
	content, err := p.config.ReadFile(p.config.RulesFile)
	var list Rules
	if err == nil {
		list, err = Parse(string(content))
	}
	if err != nil {
		attrs := []any{"file", p.config.RulesFile, "error", err}
		if parse, ok := errors.AsType[*rules.ParseError](err); ok && parse.Line.Number > 0 {
			attrs = append(attrs, "line", parse.Line.Number, "hint", parse.Hint)
		}
		p.log.Error("reading the rules again: the old ones stay", attrs...)
		return
	}
	if list.Equal(*p.rules.Load()) {
		return
	}
	p.rules.Store(&list)
	p.log.Info("rules changed", "file", p.config.RulesFile, "rules", len(list))
}
