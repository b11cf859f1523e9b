package follow

import (
	"io/fs"
	"os"
	"time"
)

// clockStep is longer than one step of the kernel's clock for file times, which
// ticks with CONFIG_HZ, at most every 10 ms. Two contents of the same length that
// are written within one tick look the same.
const clockStep = 50 * time.Millisecond

// A Look is the state of a file without its content: its inode, size, times and mode.
// The zero Look differs from any other.
type Look struct {
	certain bool        // any other content would look different
	info    fs.FileInfo // attributes of the target of the links; nil: no file
}

// At looks at the named file. A look taken before the file is read makes Changes send
// the changes since then.
func At(name string) Look {
	info, err := os.Stat(name)
	if err != nil {
		return Look{certain: true}
	}
	return Look{time.Since(info.ModTime()).Abs() > clockStep, info}
}

// same reports whether the content is certainly the same as at the look before.
func (l Look) same(before Look) bool { return before.certain && l.like(before) }

// like reports whether both looks are equal.
func (l Look) like(before Look) bool {
	if l.info == nil || before.info == nil {
		return l.info == nil && before.info == nil
	}
	// The mode counts, since a file may have become readable.
	return os.SameFile(l.info, before.info) && l.info.Size() == before.info.Size() &&
		l.info.ModTime().Equal(before.info.ModTime()) && l.info.Mode() == before.info.Mode()
}
