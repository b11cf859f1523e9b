package follow

import (
	"io/fs"
	"os"
	"time"
)

// clockStep is more than the kernel's clock for files moves at a time: it ticks
// with CONFIG_HZ, so at most 10 ms. What is written twice within one tick looks
// the same, if it is as long.
const clockStep = 50 * time.Millisecond

// A Look is what can be told of a file without reading it. The zero Look is none,
// which is like no other.
type Look struct {
	certain bool        // another content would look different
	info    fs.FileInfo // of what the links lead to; nil: there is no file
}

// At looks at the named file. Whoever looks before reading can have changes told
// since then.
func At(name string) Look {
	info, err := os.Stat(name)
	if err != nil {
		return Look{certain: true}
	}
	return Look{time.Since(info.ModTime()).Abs() > clockStep, info}
}

// same reports whether the content is certainly still the one of before.
func (l Look) same(before Look) bool { return before.certain && l.like(before) }

// like reports whether nothing looks different.
func (l Look) like(before Look) bool {
	if l.info == nil || before.info == nil {
		return l.info == nil && before.info == nil
	}
	// The mode, since a file that could not be read may be one that can be.
	return os.SameFile(l.info, before.info) && l.info.Size() == before.info.Size() &&
		l.info.ModTime().Equal(before.info.ModTime()) && l.info.Mode() == before.info.Mode()
}
