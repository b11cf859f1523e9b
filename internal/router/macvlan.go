package router

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/wording"
)

// A HostError reports that the host's network namespace is not accessible.
type HostError struct {
	Err  error
	hint wording.Text
}

func (e *HostError) Error() string { return e.Err.Error() }

// Unwrap returns the underlying error.
func (e *HostError) Unwrap() error { return e.Err }

// Hint returns ways to access it.
func (e *HostError) Hint(names wording.Names) string { return e.hint.In(names) }

var (
	hostHint = wording.Textf(`%s is a NIC of the host; the container needs access to the host's network namespace, by one of:
  hostPID: true in the pod's spec (docker and podman: --pid=host), and %s not set
  the host's /proc as a hostPath volume at /host/proc, and %s
hostNetwork: true does not help: the router needs a network namespace of its own.`,
		wording.MacvlanParent, wording.HostNetns, wording.Set(wording.HostNetns, "/host/proc/1/ns/net"))
	hostPrivilegeHint = wording.Textf("entering the host's network namespace requires privilege: securityContext.privileged: true (the capabilities SYS_ADMIN, and SYS_PTRACE for a file in /proc)")
)

// hostError adds a hint to an error of opening or entering the namespace of a file.
func hostError(file string, err error) error {
	switch {
	case errors.Is(err, os.ErrPermission):
		return &HostError{err, hostPrivilegeHint}
	case errors.Is(err, os.ErrNotExist): // never the default file, which is in /proc
		return &HostError{err, wording.Textf("the container has no file %q: check %s, and mount the volume that contains the file, such as the host's /proc at /host/proc", file, wording.HostNetns)}
	}
	return &HostError{err, hostHint}
}

// ensureMacvlan creates the egress interface, if the router has to and it does not
// exist, and adds its rollback to c; if c only looks, it records that it is missing. It
// returns the addresses of the host that the interface cannot reach; none if r.Want.Macvlan
// is nil.
//
// It checks all preconditions before the change, and never changes the host's
// namespace.
func (r *Router) ensureMacvlan(ctx context.Context, c *change) ([]netip.Prefix, error) {
	if r.Want.Macvlan == nil {
		return nil, nil
	}
	m := *r.Want.Macvlan
	pod, err := netns.Current()
	if err != nil {
		return nil, err
	}
	defer pod.Close()
	host, err := netns.Open(m.HostNetns)
	if err != nil {
		return nil, hostError(m.HostNetns, err)
	}
	defer host.Close()
	if host.Equal(pod) {
		return nil, hostError(m.HostNetns, fmt.Errorf("open host network namespace: %q is the pod's own", m.HostNetns))
	}

	inPod, err := link.Open()
	if err != nil {
		return nil, err
	}
	defer inPod.Close()
	var inHost *link.Kernel
	if err := host.Do(func() (err error) {
		inHost, err = link.Open()
		return err
	}); err != nil {
		return nil, hostError(m.HostNetns, err)
	}
	defer inHost.Close()

	parent, err := inHost.FindParent(m)
	if err != nil {
		return nil, err
	}
	if err := parent.Suits(r.Want.Network); err != nil {
		return nil, err
	}
	m.Parent = parent.Name
	there, err := inPod.HasMacvlan(m, parent, inHost, host.Fd())
	if err != nil {
		return nil, err
	}
	if there {
		return parent.Addresses, nil
	}
	if err := r.checkCluster(c.network); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if c.have.Missing = c.looks; c.looks {
		return parent.Addresses, nil
	}
	if err := inHost.CreateMacvlan(m, parent, pod.Fd()); err != nil {
		return nil, err
	}
	c.done.add(func() error {
		kernel, err := link.Open() // inPod is closed at rollback
		if err != nil {
			return err
		}
		defer kernel.Close()
		return kernel.DeleteMacvlan(m.Interface)
	})
	if m.Alias != "" {
		if err := inPod.SetAlias(m.Interface, m.Alias); err != nil {
			return nil, err
		}
	}
	c.note(RepairInterface, m.Interface+" is missing", m.String(), func() { r.Log.Info("network changed", "step", m.String()) })
	if m.Mode == "passthru" && len(parent.Addresses) > 0 {
		r.Log.Warn("passthru cuts off host addresses", "nic", parent.Name, "addresses", parent.Addresses)
	}
	return parent.Addresses, nil
}
