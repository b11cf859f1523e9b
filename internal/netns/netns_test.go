package netns_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

func newNamespace(t *testing.T) *netns.Namespace {
	t.Helper()
	n, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func current(t *testing.T) *netns.Namespace {
	t.Helper()
	n, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

// everyThread fails the test if a thread of this process is in a namespace other than
// home: the scheduler would run an unrelated goroutine on it.
func everyThread(t *testing.T, home *netns.Namespace) {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		got, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net")
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it ended in the meantime
		}
		if err != nil {
			t.Fatal(err)
		}
		if got != home.String() {
			t.Errorf("thread %s is in %s, want %s", task.Name(), got, home)
		}
	}
}

func TestNewKeepsNamespaceOfCaller(t *testing.T) {
	home := current(t)
	made := newNamespace(t)
	if made.Equal(home) {
		t.Fatalf("New returned the caller's namespace %s", home)
	}
	if now := current(t); !now.Equal(home) {
		t.Errorf("caller is in %s, want %s", now, home)
	}
	everyThread(t, home)
}

func TestNewIsEmpty(t *testing.T) {
	err := newNamespace(t).Do(func() error {
		links, err := net.Interfaces()
		if err != nil {
			return err
		}
		if len(links) != 1 || links[0].Name != "lo" || links[0].Flags&net.FlagUp != 0 {
			t.Errorf("links of a new namespace: %v, want only lo, down", links)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Two hundred goroutines use four namespaces at once and yield to the scheduler in Do: a
// goroutine without a locked thread would continue in another namespace.
func TestDoConcurrent(t *testing.T) {
	home := current(t)
	var namespaces [4]*netns.Namespace
	for i := range namespaces {
		namespaces[i] = newNamespace(t)
		name := fmt.Sprintf("only-%d", i)
		err := namespaces[i].Do(func() error {
			return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}})
		})
		if err != nil {
			t.Fatal(err)
		}
	}

	var all sync.WaitGroup
	start := make(chan struct{})
	for i := range 200 {
		want := namespaces[i%len(namespaces)]
		name := fmt.Sprintf("only-%d", i%len(namespaces))
		all.Go(func() {
			<-start
			err := want.Do(func() error {
				for range 20 {
					got, err := netns.Current()
					if err != nil {
						return err
					}
					if !got.Equal(want) {
						t.Errorf("goroutine %d is in %s, want %s", i, got, want)
					}
					got.Close()
					if _, err := net.InterfaceByName(name); err != nil {
						t.Errorf("goroutine %d: finding link %q: %v", i, name, err)
					}
					runtime.Gosched()
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			if got, err := netns.Current(); err != nil || !got.Equal(home) {
				t.Errorf("goroutine %d is in %v after Do (%v), want %s", i, got, err, home)
			} else {
				got.Close()
			}
		})
	}
	close(start)
	all.Wait()
	everyThread(t, home)
}

func TestDoReturnsError(t *testing.T) {
	want := errors.New("of the function")
	if got := newNamespace(t).Do(func() error { return want }); !errors.Is(got, want) || got.Error() != want.Error() {
		t.Errorf("Do = %v, want fn's error as it is", got)
	}
}

func TestDoNested(t *testing.T) {
	home, outer, inner := current(t), newNamespace(t), newNamespace(t)
	err := outer.Do(func() error {
		err := inner.Do(func() error {
			if now := current(t); !now.Equal(inner) {
				t.Errorf("inside both: in %s, want %s", now, inner)
			}
			return nil
		})
		if now := current(t); !now.Equal(outer) {
			t.Errorf("after the inner Do: in %s, want %s", now, outer)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	everyThread(t, home)
}

func TestDoPanic(t *testing.T) {
	home, n := current(t), newNamespace(t)
	func() {
		defer func() {
			text, _ := recover().(string)
			if !strings.HasPrefix(text, "out of cheese") || !strings.Contains(text, "TestDoPanic") {
				t.Errorf("panic in the caller = %q, want the value and stack of fn's", text)
			}
		}()
		err := n.Do(func() error { panic("out of cheese") })
		t.Errorf("Do returned %v after a panic", err)
	}()
	everyThread(t, home)
}

func TestDoGoexit(t *testing.T) {
	home, n := current(t), newNamespace(t)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		err := n.Do(func() error { runtime.Goexit(); return nil })
		t.Errorf("Do returned %v after runtime.Goexit in fn", err)
	}()
	<-ended
	everyThread(t, home)
}

// A thread that has lost CAP_SYS_ADMIN cannot return. It must not be used again.
func TestDoDestroysThreadThatCannotReturn(t *testing.T) {
	home, n := current(t), newNamespace(t)
	var tid int
	var lose func() error
	lose = func() error {
		// The first thread of a process does not end before the process. While it is
		// locked here, another Do gets another thread.
		if tid = unix.Gettid(); tid == os.Getpid() {
			return n.Do(lose)
		}
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		return unix.Capset(&header, &none[0]) // affects this thread only (capset(2))
	}
	if err := n.Do(lose); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "returning") {
		t.Fatalf("Do = %v, want EPERM from returning", err)
	}
	gone := func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", tid))
		return errors.Is(err, os.ErrNotExist)
	}
	for end := time.Now().Add(10 * time.Minute); !gone(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("thread %d exists ten minutes after Do, want it destroyed", tid)
		}
	}
	everyThread(t, home)
}

func TestOpen(t *testing.T) {
	home := current(t)
	n, err := netns.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if !n.Equal(home) || n.String() != home.String() {
		t.Errorf("Open = %s, want %s", n, home)
	}
	_, err = netns.Open("/nowhere")
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), `"/nowhere"`) {
		t.Errorf("Open of a missing file = %v, want ErrNotExist and its name", err)
	}
	for _, name := range []string{"/dev/null", "/proc", "/proc/self/ns/mnt"} {
		if _, err := netns.Open(name); !errors.Is(err, netns.ErrNoNamespace) || !strings.Contains(err.Error(), name) {
			t.Errorf("Open of %s = %v, want ErrNoNamespace and its name", name, err)
		}
	}
}

func TestDoAfterClose(t *testing.T) {
	n, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Do(func() error { t.Error("fn ran in a closed namespace"); return nil }); !errors.Is(err, unix.EBADF) {
		t.Errorf("Do = %v, want EBADF", err)
	}
	if got := n.String(); got != "net:[closed]" {
		t.Errorf("String = %q", got)
	}
}

func BenchmarkDo(b *testing.B) {
	n, err := netns.New()
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	for b.Loop() {
		if err := n.Do(func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
