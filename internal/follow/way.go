package follow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLinks is how many symbolic links the kernel follows (path_resolution(7)).
const maxLinks = 40

// errNotDirectory is the error of a path that leads through a file.
var errNotDirectory error = unix.ENOTDIR

// A way is the resolution of a path to a file (path_resolution(7)). Every change of
// the file that the path resolves to is a change at one of its places: the kubelet
// mounts a ConfigMap as key -> ..data/key, ..data -> ..2026_01_02, and swaps the
// second link (AtomicWriter, pkg/volume/util/atomic_writer.go of Kubernetes).
type way struct {
	places  map[string]bool // each name that is looked up, with its directory
	watched map[string]bool // these directories, and the file
	end     string          // the file's path without links; empty: there is no file
}

// walk resolves the path to a file as far as it exists, and watches each directory
// before it looks up a name in it, so that no change in between is missed. It
// watches the file too, since the directory of a file that is a mount point has no
// events of it. The error is that of the first watch that failed.
func walk(name string, watch func(path string) error) (way, error) {
	w := way{places: map[string]bool{}, watched: map[string]bool{}}
	if !filepath.IsAbs(name) {
		dir, err := os.Getwd()
		if err != nil {
			return w, fmt.Errorf("resolving %q: %w", name, err)
		}
		name = dir + "/" + name // not Join, which removes a link followed by ..
	}
	var failed error
	add := func(path string) {
		if w.watched[path] {
			return
		}
		w.watched[path] = true
		if err := watch(path); err != nil && !missing(err) && failed == nil {
			failed = fmt.Errorf("watching %q: %w", path, err)
		}
	}
	dir, steps, links := "/", split(name), 0
	for len(steps) > 0 {
		step := steps[0]
		steps = steps[1:]
		if step == ".." {
			dir = filepath.Dir(dir)
			continue
		}
		add(dir)
		path := filepath.Join(dir, step)
		w.places[path] = true
		info, err := os.Lstat(path)
		if err != nil {
			return w, failed
		}
		switch {
		case info.Mode()&os.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if links++; err != nil || links > maxLinks {
				return w, failed
			}
			if filepath.IsAbs(to) {
				dir = "/"
			}
			steps = append(split(to), steps...)
		case len(steps) > 0:
			dir = path
		default:
			w.end = path
			add(path)
		}
	}
	return w, failed
}

// split returns the names in a path.
func split(path string) []string {
	var names []string
	for name := range strings.SplitSeq(path, "/") {
		if name != "" && name != "." {
			names = append(names, name)
		}
	}
	return names
}

// remote are the file systems to which other machines write, by their magic numbers
// (statfs(2)). inotify(7) has no events for these writes.
var remote = map[uint32]string{
	unix.AFS_SUPER_MAGIC:  "AFS",
	unix.CEPH_SUPER_MAGIC: "Ceph",
	unix.CIFS_SUPER_MAGIC: "CIFS",
	unix.FUSE_SUPER_MAGIC: "FUSE",
	unix.NFS_SUPER_MAGIC:  "NFS",
	unix.SMB_SUPER_MAGIC:  "SMB",
	unix.SMB2_SUPER_MAGIC: "SMB",
	unix.V9FS_MAGIC:       "9P",
}

var errRemote = errors.New("remote file system without events")

// unreported returns why the kernel may not report changes of a file, or nil.
func unreported(name string) error {
	var s unix.Statfs_t
	if err := unix.Statfs(name, &s); err != nil {
		return nil // it does not exist; its creation has an event
	}
	if kind := remote[uint32(s.Type)]; kind != "" {
		return fmt.Errorf("%w: %s", errRemote, kind)
	}
	return nil
}
