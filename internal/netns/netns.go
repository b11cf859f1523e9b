// Package netns runs functions in other network namespaces.
//
// A network namespace is a property of a thread, not of a process (setns(2)), and the
// Go scheduler moves goroutines between threads. Code that changes namespaces must
// therefore lock its thread (runtime.LockOSThread), and must not unlock a thread that
// is still in another namespace: the scheduler would run unrelated goroutines there.
// Only this package implements both rules.
//
// A socket belongs to the namespace in which it was created for its whole life, so only
// its creation has to be in [Namespace.Do]. The same is true for a process.
//
// Files below /proc/sys/net belong to the namespace of the thread that opens them, but
// /proc/net is a link to /proc/self/net, in the namespace of the process's first thread:
// functions in Do read /proc/thread-self/net instead.
package netns

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace, held by a file descriptor. The kernel frees a
// namespace when its last thread, socket and descriptor are gone: a namespace created by
// [New] ends with Close or with the process, even if the process is killed.
//
// Several goroutines may call its methods, but Close only after all other calls have
// returned: the kernel reuses descriptor numbers.
type Namespace struct {
	handle netns.NsHandle
}

// ErrNoNamespace is returned by [Open] for a file that is not a network namespace.
var ErrNoNamespace = errors.New("not a network namespace")

// New creates a namespace with one link, the loopback link, down. The caller's namespace
// does not change, although unshare(2) moves the calling thread.
func New() (*Namespace, error) {
	var n *Namespace
	err := onOwnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		n, err = Current()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("creating network namespace: %w", err)
	}
	return n, nil
}

// Open opens a namespace by its file, such as /proc/1/ns/net or the path that a container
// runtime passes to a plugin. The error of another file is an ErrNoNamespace.
func Open(path string) (*Namespace, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0) // a pipe would wait
	if err != nil {
		return nil, fmt.Errorf("opening network namespace %q: %w", path, err)
	}
	handle := netns.NsHandle(fd)
	// Any file can be opened: without this check, Do would fail with "invalid argument"
	// (ioctl_ns(2)).
	if kind, err := unix.IoctlRetInt(int(handle), unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		_ = handle.Close() // the other error is reported
		return nil, fmt.Errorf("opening network namespace %q: %w", path, ErrNoNamespace)
	}
	return &Namespace{handle: handle}, nil
}

// Current opens the namespace of the calling thread: in [Namespace.Do] the namespace of
// Do, elsewhere the namespace in which the process was started.
func Current() (*Namespace, error) {
	handle, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("opening current network namespace: %w", err)
	}
	return &Namespace{handle: handle}, nil
}

// Do runs fn in the namespace and returns fn's error.
//
// fn runs on a goroutine and a thread of its own. Goroutines that fn starts are not in
// the namespace. If the thread cannot return to its namespace, Do returns an error, and
// the thread is destroyed instead of being reused by the scheduler.
//
// A panic in fn continues in the caller, with fn's stack in its text, and so does
// runtime.Goexit: fn may call t.Fatal.
func (n *Namespace) Do(fn func() error) error {
	return onOwnThread(func() error {
		if err := netns.Set(n.handle); err != nil {
			return fmt.Errorf("entering network namespace %q: %w", n, err)
		}
		return fn()
	})
}

// Fd returns the descriptor of the namespace, for calls that take one, such as netlink's
// IFLA_NET_NS_FD. The caller must not close it.
func (n *Namespace) Fd() int { return int(n.handle) }

// Equal reports whether both are the same namespace. Descriptors of the same namespace
// have different numbers.
func (n *Namespace) Equal(other *Namespace) bool { return n.handle.Equal(other.handle) }

// String is the kernel's name of the namespace, "net:[4026531840]", as the links
// /proc/PID/ns/net have it, or "net:[closed]".
func (n *Namespace) String() string {
	var s unix.Stat_t
	if err := unix.Fstat(int(n.handle), &s); err != nil {
		return "net:[closed]"
	}
	return fmt.Sprintf("net:[%d]", s.Ino)
}

// Close lets go of the namespace. Closing twice is harmless, so that a deferred
// Close can stand beside an early one.
func (n *Namespace) Close() error {
	if !n.handle.IsOpen() {
		return nil
	}
	if err := n.handle.Close(); err != nil {
		return fmt.Errorf("closing network namespace: %w", err)
	}
	return nil
}

// onOwnThread runs fn on a locked thread and returns that thread to its former
// namespace, however fn ends. Only then it unlocks the thread: the runtime destroys the
// thread of a goroutine that ends locked (runtime.LockOSThread). New uses this too and
// does not let its thread die, because the first thread of a process cannot die, and
// /proc/self/ns/net is the namespace of that thread.
func onOwnThread(fn func() error) error {
	var (
		err      error
		returned bool // neither panic nor Goexit
		panicked any
		stack    []byte
		done     = make(chan struct{})
	)
	go func() {
		defer close(done)
		runtime.LockOSThread()
		home, homeErr := netns.Get()
		if homeErr != nil {
			runtime.UnlockOSThread() // it has not been anywhere
			err, returned = fmt.Errorf("opening current network namespace: %w", homeErr), true
			return
		}
		defer home.Close()
		defer func() {
			if !returned {
				if panicked = recover(); panicked != nil {
					stack = debug.Stack()
				}
			}
			if backErr := netns.Set(home); backErr != nil {
				backErr = fmt.Errorf("returning to network namespace: %w", backErr)
				if err != nil {
					backErr = fmt.Errorf("%w; %w", err, backErr)
				}
				err = backErr
				return
			}
			runtime.UnlockOSThread()
		}()
		err = fn()
		returned = true
	}()
	<-done
	switch {
	case panicked != nil:
		//nolint:forbidigo // this is fn's panic, carried over to the goroutine that called
		panic(fmt.Sprintf("%v\n\nin another network namespace:\n%s", panicked, stack))
	case !returned:
		runtime.Goexit()
	}
	return err
}
