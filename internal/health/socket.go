package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// A place is where programs put their sockets.
//
// The name of a socket holds the number of the network namespace, so that
// routers in several namespaces of one machine, which share its /run, do not
// collide. Where no socket can be put there (a read-only root file system, a
// user that may not), it is an abstract one (unix(7)), which belongs to the
// network namespace.
type place struct {
	dir      string
	netns    string        // file of the program's network namespace
	abstract string        // what abstract names begin with
	write    time.Duration // how long one who asks may take to read the answer
	ask      time.Duration // how long a program may take to answer
}

// here is the place of this process. /proc/self is its first thread, which never
// stays in another namespace.
//
// An exec probe has a second by default (timeoutSeconds of a Kubernetes Probe),
// which includes the start of the one who asks.
var here = place{"/run/egress-router", "/proc/self/ns/net", "@egress-router-health/", time.Second, 900 * time.Millisecond}

// number returns the number of the network namespace.
func (p place) number() (uint64, error) {
	info, err := os.Stat(p.netns)
	if err != nil {
		return 0, fmt.Errorf("reading the network namespace ID: %w", err)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, fmt.Errorf("reading the network namespace ID: %q has no inode number", p.netns)
	}
	return stat.Ino, nil
}

const (
	// answersAtOnce bounds the goroutines of those who take their time to read.
	answersAtOnce = 16
	// acceptPause is how long accepting waits after an error: descriptors are
	// short, and connections that end give some back.
	acceptPause = 100 * time.Millisecond
)

// Serve answers whoever asks a program how it is: with one report as JSON, and
// the end of the stream. It can be asked when Serve returns, and until ctx ends;
// the function that is returned waits until all of that is over and the socket
// is gone. Where there is no way to be asked, the log says so, and the program
// goes on without.
func Serve(ctx context.Context, program string, report func() Report, log *slog.Logger) (wait func()) {
	return here.serve(ctx, program, report, log)
}

func (p place) serve(ctx context.Context, program string, report func() Report, log *slog.Logger) (wait func()) {
	l, remove, err := p.listenFile(program)
	if err != nil {
		log.Debug("using abstract health socket", "directory", p.dir, "error", err)
		remove = func() {}
		if l, err = listenUnix(p.abstract + program); err != nil {
			log.Warn("health socket unavailable", "error", err)
			return func() {}
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.answer(ctx, l, report)
		remove()
	}()
	return func() { <-done }
}

// listenFile makes the socket of a program in the directory, in place of the one
// of another process, dead or alive: it is made under another name and then
// renamed, so that at no time there is none. remove takes it away again, unless
// another process has replaced it.
func (p place) listenFile(program string) (l *net.UnixListener, remove func(), err error) {
	number, err := p.number()
	if err != nil {
		return nil, nil, err
	}
	if err := makeDirectory(p.dir); err != nil {
		return nil, nil, err
	}
	name := filepath.Join(p.dir, fmt.Sprintf("%s-%d.sock", program, number))
	made := fmt.Sprintf("%s.%d", name, os.Getpid())
	_ = os.Remove(made) // of an earlier process with the same number
	if l, err = listenUnix(made); err != nil {
		return nil, nil, err
	}
	// Whoever is in the container may ask, which takes the right to write.
	err = os.Chmod(made, 0o666) //nolint:gosec // that is meant
	var ours fs.FileInfo
	if err == nil {
		ours, err = os.Lstat(made)
	}
	if err == nil {
		err = os.Rename(made, name)
	}
	if err != nil {
		_ = l.Close()
		_ = os.Remove(made)
		return nil, nil, err
	}
	return l, func() {
		if now, err := os.Lstat(name); err == nil && os.SameFile(now, ours) {
			_ = os.Remove(name)
		}
	}, nil
}

// makeDirectory makes a directory that others may look into, whatever the umask,
// if it is not there.
func makeDirectory(name string) error {
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	const mode = 0o755
	if err := os.MkdirAll(name, mode); err != nil { //nolint:gosec // others may ask too
		return err
	}
	return os.Chmod(name, mode) //nolint:gosec // as above
}

func listenUnix(name string) (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // it is renamed
	return l, nil
}

// answer answers until ctx ends.
func (p place) answer(ctx context.Context, l *net.UnixListener, report func() Report) {
	var answering sync.WaitGroup
	defer answering.Wait()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	slots := make(chan struct{}, answersAtOnce)
	for {
		conn, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return
		}
		if err != nil {
			pause(ctx, acceptPause)
			continue
		}
		slots <- struct{}{} // free again when the oldest has read, or its time is over
		answering.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			_ = conn.SetWriteDeadline(time.Now().Add(p.write))
			_ = json.NewEncoder(conn).Encode(report()) // whoever went away needs none
		})
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
