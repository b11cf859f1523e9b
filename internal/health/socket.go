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

// A place is the location of the programs' sockets.
//
// The name of a socket contains the ID of the network namespace, so that routers in
// several namespaces of one machine, which share its /run, do not collide. If the
// socket cannot be created (a read-only root file system, no permission), an abstract
// one (unix(7)) is used, which belongs to the network namespace.
type place struct {
	dir      string
	netns    string        // file of the program's network namespace, whose inode number is the ID
	abstract string        // prefix of abstract names
	write    time.Duration // limit for a client to read the report
	ask      time.Duration // limit for a program to answer
}

// here is the place of this process. /proc/self is its first thread, which never
// stays in another namespace.
//
// An exec probe has a timeout of a second by default (timeoutSeconds of a Kubernetes
// Probe), which includes the start of the program that asks.
var here = place{"/run/egress-router", "/proc/self/ns/net", "@egress-router-health/", time.Second, 900 * time.Millisecond}

// number returns the ID of the network namespace.
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
	// maxAnswers limits the goroutines for clients that read slowly.
	maxAnswers = 16
	// acceptPause is the pause after a failed accept: descriptors are exhausted, and
	// connections that end release some.
	acceptPause = 100 * time.Millisecond
)

// socketRetry is the interval of attempts to create the socket while another process of
// the same program has it, such as one that ends.
const socketRetry = time.Second

// errInUse reports that another process of the same program answers on the socket.
var errInUse = errors.New("another process of this program answers on it")

// Serve sends a report as JSON to each client of the program's health socket, until
// ctx ends. The socket exists when Serve returns. wait waits until all clients are
// served and the socket is removed. If no socket can be created, Serve logs a warning
// and the program continues without one. If another process of the same program has it,
// Serve logs a warning and creates the socket after the end of that process.
func Serve(ctx context.Context, program string, report func() Report, log *slog.Logger) (wait func()) {
	return here.serve(ctx, program, report, log)
}

func (p place) serve(ctx context.Context, program string, report func() Report, log *slog.Logger) (wait func()) {
	l, remove, err := p.listen(program, log)
	switch {
	case errors.Is(err, errInUse):
		log.Warn("health socket in use", "program", program, "error", err,
			"hint", "a second "+program+" of this network namespace: health reports the first one until it ends")
	case err != nil:
		log.Warn("health socket unavailable", "error", err)
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for errors.Is(err, errInUse) {
			pause(ctx, socketRetry)
			if ctx.Err() != nil {
				return
			}
			l, remove, err = p.listen(program, log)
		}
		if err != nil {
			log.Warn("health socket unavailable", "error", err)
			return
		}
		p.answer(ctx, l, report)
		remove()
	}()
	return func() { <-done }
}

// listen creates the socket of a program. remove removes it.
func (p place) listen(program string, log *slog.Logger) (l *net.UnixListener, remove func(), err error) {
	l, remove, err = p.listenFile(program)
	if err == nil || errors.Is(err, errInUse) {
		return l, remove, err
	}
	log.Debug("using abstract health socket", "directory", p.dir, "error", err)
	l, err = listenUnix(p.abstract + program)
	if errors.Is(err, syscall.EADDRINUSE) {
		err = errInUse
	}
	return l, func() {}, err
}

// listenFile creates the socket of a program in the directory and replaces that of a
// dead process: it is created with another name and then linked or renamed, so that
// there is one at any time. remove removes it.
func (p place) listenFile(program string) (l *net.UnixListener, remove func(), err error) {
	number, err := p.number()
	if err != nil {
		return nil, nil, err
	}
	name := filepath.Join(p.dir, fmt.Sprintf("%s-%d.sock", program, number))
	if answers(name) {
		return nil, nil, errInUse
	}
	if err := makeDirectory(p.dir); err != nil {
		return nil, nil, err
	}
	made := fmt.Sprintf("%s.%d", name, os.Getpid())
	_ = os.Remove(made) // left by an earlier process with the same number
	if l, err = listenUnix(made); err != nil {
		return nil, nil, err
	}
	defer func() { _ = os.Remove(made) }() // its name is the other one by then
	// Every user of the container may connect, which requires write permission.
	err = os.Chmod(made, 0o666) //nolint:gosec // as intended
	var ours fs.FileInfo
	if err == nil {
		ours, err = os.Lstat(made)
	}
	if err == nil {
		err = give(made, name)
	}
	if err != nil {
		_ = l.Close()
		return nil, nil, err
	}
	return l, func() {
		if now, err := os.Lstat(name); err == nil && os.SameFile(now, ours) {
			_ = os.Remove(name)
		}
	}, nil
}

// give gives a socket its name, unless a process that answers has it: two that start
// together do not replace each other's.
func give(made, name string) error {
	err := os.Link(made, name)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	if answers(name) {
		return errInUse
	}
	return os.Rename(made, name)
}

// answers reports whether a process listens on a socket. A process that was killed
// leaves its socket behind.
func answers(socket string) bool {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err == nil {
		_ = conn.Close()
	}
	return err == nil || !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ENOTDIR)
}

// makeDirectory creates a directory that is readable for all users, regardless of the
// umask, if it does not exist.
func makeDirectory(name string) error {
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	const mode = 0o755
	if err := os.MkdirAll(name, mode); err != nil { //nolint:gosec // for other users
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

// answer serves the clients of a listener until ctx ends.
func (p place) answer(ctx context.Context, l *net.UnixListener, report func() Report) {
	var answering sync.WaitGroup
	defer answering.Wait()
	defer closeAfter(ctx, l.Close)()
	slots := make(chan struct{}, maxAnswers)
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
		slots <- struct{}{} // free when the oldest client has read, or its time is over
		answering.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			_ = conn.SetWriteDeadline(time.Now().Add(p.write))
			_ = json.NewEncoder(conn).Encode(report()) // the client may be gone
		})
	}
}

// closeAfter closes something when ctx ends. The function that it returns waits for the
// end of the close, since Accept returns before the socket is closed.
func closeAfter(ctx context.Context, closeIt func() error) (wait func()) {
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = closeIt()
		close(closed)
	})
	return func() {
		if !stop() {
			<-closed
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
