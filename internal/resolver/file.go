package resolver

import (
	"io"
	"os"
	"sync"
	"time"
)

// checkEvery is the shortest interval between two checks of a file.
const checkEvery = time.Second

// maxFile is the size limit of a file, in bytes; the rest is ignored.
const maxFile = 4 << 20

// A file is a parsed file that is read again when it has changed. A container engine
// or the kubelet may write it at any time.
type file[T any] struct {
	name  string
	parse func([]byte) T

	mu      sync.Mutex
	checked time.Time
	info    os.FileInfo // at the last read; nil: there was no file
	settled bool        // any later change changes info
	read    bool
	value   T
}

// get returns the parsed content. A file that does not exist counts as empty.
func (f *file[T]) get() T {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if f.read && now.Sub(f.checked) < checkEvery {
		return f.value
	}
	f.checked = now
	info, err := os.Stat(f.name)
	if err != nil {
		info = nil
	}
	if f.read && f.settled && same(f.info, info) {
		return f.value
	}
	// A file that cannot be read, perhaps because it is being replaced, is checked
	// again the next time.
	text, err := read(f.name)
	if err != nil && f.read && info != nil {
		return f.value
	}
	changed := !f.read || !f.settled || !same(f.info, info)
	f.info, f.read = info, true
	// The kernel's clock for file times ticks in steps of up to 10 ms: a second
	// write within one step does not change the time.
	f.settled = info == nil || now.Sub(info.ModTime()) > 100*time.Millisecond
	if changed {
		f.value = f.parse(text)
	}
	return f.value
}

func read(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFile))
}

// same reports whether both describe the same unchanged file.
func same(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}
