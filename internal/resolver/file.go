package resolver

import (
	"io"
	"os"
	"sync"
	"time"
)

// checkEvery is how often a file is looked at, at most.
const checkEvery = time.Second

// maxFile is how much of a file is read, in bytes.
const maxFile = 4 << 20

// A file is one that is read anew when it has changed. A container engine or the
// kubelet may write it at any time.
type file[T any] struct {
	name  string
	parse func([]byte) T

	mu      sync.Mutex
	checked time.Time
	info    os.FileInfo // of what was read; nil: there was no file
	settled bool        // info would show a change
	read    bool
	value   T
}

// get returns what the file says. One that is not there says what an empty one
// does.
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
	// One that cannot be read, perhaps because it is being replaced, is looked
	// at again the next time.
	text, err := read(f.name)
	if err != nil && f.read && info != nil {
		return f.value
	}
	changed := !f.read || !f.settled || !same(f.info, info)
	f.info, f.read = info, true
	// The kernel's clock for files ticks in steps of up to 10 ms: what was
	// written just now may be written to again without a sign of it.
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
