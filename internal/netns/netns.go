// Package netns runs functions in other network namespaces.
//
// A network namespace is a property of a thread, not of a process (setns(2)),
// and the Go scheduler moves goroutines between threads as it likes. Code that
// changes namespaces must therefore hold its thread (runtime.LockOSThread), and
// must not give back a thread that is still in the wrong place: the scheduler
// would run unrelated goroutines there. This package is the one place that
// knows both rules.
//
// A socket belongs to the namespace it was made in for its whole life, so a
// function given to [Namespace.Do] need only make it; using it needs no care.
// The same holds for a process started inside.
//
// Files below /proc/sys/net are those of the thread that opens them, but
// /proc/net is a link to /proc/self/net, which is the namespace of the
// process's first thread: inside Do read /proc/thread-self/net instead.
package netns

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace, held by a file descriptor. The kernel frees
// a namespace when its last thread, socket and descriptor are gone, so one made
// by [New] ends with Close or with the process, even when that is killed.
//
// Its methods may be called from any goroutine, but Close only once no other
// call is under way: the kernel reuses descriptor numbers.
type Namespace struct {
	handle netns.NsHandle
}

// ErrNoNamespace says that a file stands for no network namespace.
var ErrNoNamespace = errors.New("it is not a network namespace")

// New makes an empty namespace: one loopback link, down. The namespace of the
// caller stays as it is, although unshare(2) moves the thread that calls it.
func New() (*Namespace, error) {
	var n *Namespace
	err := apart(func() (err error) {
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

// Open opens the namespace that a file stands for, such as /proc/1/ns/net or the
// path that a container runtime hands to a plugin.
func Open(path string) (*Namespace, error) {
	handle, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("opening network namespace %q: %w", path, err)
	}
	// Any file can be opened; one that is no namespace would fail at Do, with
	// no more than "invalid argument" (ioctl_ns(2)).
	if kind, err := unix.IoctlRetInt(int(handle), unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		_ = handle.Close() // there is a better error to report
		return nil, fmt.Errorf("opening network namespace %q: %w", path, ErrNoNamespace)
	}
	return &Namespace{handle: handle}, nil
}

// Current opens the namespace of the calling thread. Inside [Namespace.Do] that
// is the namespace entered, elsewhere the one the process was started in.
func Current() (*Namespace, error) {
	handle, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("opening current network namespace: %w", err)
	}
	return &Namespace{handle: handle}, nil
}

// Do runs fn in the namespace and returns its error once fn has ended.
//
// fn runs on a goroutine of its own, on a thread that nothing else uses in the
// meantime. Goroutines that fn starts are not in the namespace. If the thread
// cannot be brought back, that is an error too, and the thread is destroyed
// instead of going back to the scheduler.
//
// A panic in fn goes on in the caller, with fn's stack in its text, and so does
// runtime.Goexit: fn may call t.Fatal.
func (n *Namespace) Do(fn func() error) error {
	return apart(func() error {
		if err := netns.Set(n.handle); err != nil {
			return fmt.Errorf("entering network namespace %q: %w", n, err)
		}
		return fn()
	})
}

// Fd is the descriptor that holds the namespace, for calls that want one, such
// as netlink's IFLA_NET_NS_FD. It stays the property of the Namespace.
func (n *Namespace) Fd() int { return int(n.handle) }

// Equal says whether both are the same namespace. Descriptors cannot tell: every
// one opened is another number.
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

// apart runs fn on a locked thread and brings that thread back to the namespace
// it came from, however fn ends. Only then is it unlocked: a goroutine that ends
// locked takes its thread along (runtime.LockOSThread). New uses this too rather
// than let its thread die, because the first thread of a process cannot die and
// stands for the process in /proc/self/ns/net.
func apart(fn func() error) error {
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
