package router_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/spec"
)

// macvlanOf returns a macvlan of the lab's node.
func macvlanOf(l *lab.Lab) *plan.Macvlan {
	return &plan.Macvlan{Interface: "macvlan0", Macvlan: spec.Macvlan{Mode: spec.Private, HostNetns: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), l.Node.Fd())}}
}

// links describes the links of a namespace; their indexes distinguish a link from
// one deleted and created again.
func links(t *testing.T, l *lab.Lab, ns *netns.Namespace) string {
	t.Helper()
	h, err := l.Netlink(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	list, err := h.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, l := range list {
		a := l.Attrs()
		fmt.Fprintf(&b, "%d %s %s %s promisc %d\n", a.Index, a.Name, l.Type(), a.Flags, a.Promisc)
	}
	return b.String()
}

// Each change after the creation of the interface fails once. An interface that the
// run created is then deleted, and the host is as before; an existing one is
// unchanged.
func TestApplyDeletesItsMacvlan(t *testing.T) {
	for _, there := range []bool{false, true} {
		t.Run(fmt.Sprintf("there before: %v", there), func(t *testing.T) {
			l, err := lab.New(lab.Options{NoMacvlan: !there})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(l.Close)
			pod, host := links(t, l, l.Router), links(t, l, l.Node)
			failures := 0
			for n := 1; ; n++ {
				left, steps := n, []string(nil)
				r := newRouter(t, "80 tcp 203.0.113.25", &left, &steps)
				r.Want.Macvlan = macvlanOf(l)
				err := inRouter(t, l, func() error { return r.Apply(t.Context()) })
				if err == nil {
					break
				}
				failures++
				if !errors.Is(err, errInjected) {
					t.Errorf("change %d: %v", n, err)
				}
				if got := links(t, l, l.Router); got != pod {
					t.Fatalf("change %d: the pod has\n%swant\n%s", n, got, pod)
				}
				if got := links(t, l, l.Node); got != host {
					t.Fatalf("change %d: the host has\n%swant\n%s", n, got, host)
				}
			}
			if failures < 5 {
				t.Errorf("only %d changes could fail", failures)
			}
			after := links(t, l, l.Router)
			left, steps := 0, []string(nil)
			r := newRouter(t, "80 tcp 203.0.113.25", &left, &steps)
			r.Want.Macvlan = macvlanOf(l)
			if err := inRouter(t, l, func() error { return r.Apply(t.Context()) }); err != nil || len(steps) > 0 {
				t.Errorf("again: error %v, changes %v; want none", err, steps)
			}
			if got := links(t, l, l.Router); got != after {
				t.Errorf("again: the pod has\n%swant\n%s", got, after)
			}
		})
	}
}

// An interrupted run leaves no interface that it created: before the creation, and
// in the middle of later changes.
func TestApplyInterruptedWithMacvlan(t *testing.T) {
	l, err := lab.New(lab.Options{NoMacvlan: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	pod, host := links(t, l, l.Router), links(t, l, l.Node)
	for _, before := range []bool{true, false} {
		left, steps := 0, []string(nil)
		r := newRouter(t, "80 tcp 203.0.113.25", &left, &steps)
		r.Want.Macvlan = macvlanOf(l)
		ctx, cancel := context.WithCancel(t.Context())
		if before {
			cancel()
		} else {
			open := r.Network
			r.Network = func() (router.Network, error) {
				n, err := open()
				return cancelAfter{n, cancel}, err
			}
		}
		err = inRouter(t, l, func() error { return r.Apply(ctx) })
		cancel()
		if !errors.Is(err, context.Canceled) {
			t.Errorf("before %v: error %v, want %v", before, err, context.Canceled)
		}
		if before && len(steps) > 0 {
			t.Errorf("stopped before it began, it did %v", steps)
		}
		if got := links(t, l, l.Router); got != pod {
			t.Errorf("before %v: the pod has\n%swant\n%s", before, got, pod)
		}
		if got := links(t, l, l.Node); got != host {
			t.Errorf("before %v: the host has\n%swant\n%s", before, got, host)
		}
	}
}

// The interface never appears in the host's namespace: its kernel notifies of no
// new and no deleted link.
func TestMacvlanIsNeverOnHost(t *testing.T) {
	l, err := lab.New(lab.Options{NoMacvlan: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	updates, done := make(chan netlink.LinkUpdate, 100), make(chan struct{})
	defer close(done)
	if err := l.Node.Do(func() error { return netlink.LinkSubscribe(updates, done) }); err != nil {
		t.Fatal(err)
	}
	left, steps := 0, []string(nil)
	r := newRouter(t, "203.0.113.27", &left, &steps)
	r.Want.Macvlan = macvlanOf(l)
	if err := inRouter(t, l, func() error { return r.Apply(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	// The host's next event comes after the router's.
	h, err := l.Netlink(l.Node)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	a := netlink.NewLinkAttrs()
	a.Name = "last"
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: a}); err != nil {
		t.Fatal(err)
	}
	for u := range updates {
		if name := u.Attrs().Name; name == "last" {
			break
		} else if name == "macvlan0" {
			t.Errorf("the host has seen it: %v", u.Header.Type)
		}
	}
}
