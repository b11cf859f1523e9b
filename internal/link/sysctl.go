package link

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"

	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/sysctl"
	"github.com/egress-router/egress-router/internal/wording"
)

// conntrackCount is the number of connections that the kernel tracks in the
// network namespace (nf_conntrack-sysctl.rst).
const conntrackCount = "net.netfilter.nf_conntrack_count"

// addressesIPv6 lists the IPv6 addresses of the network namespace of the thread
// that opens it (proc_pid_net(5)). It does not exist without IPv6 in the kernel,
// or with ipv6.disable=1.
const addressesIPv6 = "/proc/thread-self/net/if_inet6"

// HasIPv6 reports whether the kernel has IPv6.
func HasIPv6() bool {
	_, err := os.Stat(addressesIPv6)
	return !errors.Is(err, os.ErrNotExist)
}

// isOn reports whether a sysctl is not 0.
func isOn(name string) (bool, error) {
	value, err := sysctl.ReadInt(name)
	return value != 0, err
}

// readSysctls reads sysctls, each at a place of its own. One that the kernel lacks is left
// out.
func readSysctls(names []string, place func(string) string) (plan.Sysctls, error) {
	found := make(plan.Sysctls)
	for _, name := range names {
		value, err := sysctl.ReadInt(place(name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		found[name] = value
	}
	return found, nil
}

// Initial returns the values that the sysctls of the two interfaces begin with in this
// namespace (ip-sysctl.rst, conf/default), and the kernel's own values of the others.
func (k *Kernel) Initial(want plan.Network) (plan.Sysctls, error) {
	names := []string{plan.PromoteSecondaries(want.Interface)}
	for _, name := range want.Sysctls() {
		if strings.Contains(name, "/conf/") && !strings.Contains(name, "/conf/all/") {
			names = append(names, name)
		}
	}
	initial, err := readSysctls(names, func(name string) string {
		for _, i := range []string{want.Interface, want.Cluster.Interface} {
			name = strings.Replace(name, "/conf/"+i+"/", "/conf/default/", 1)
		}
		return name
	})
	if err != nil {
		return nil, err
	}
	values := want.Defaults()
	maps.Copy(values, initial)
	return values, nil
}

// writeForward writes net.ipv4.ip_forward. The kernel then also sets
// conf.all.accept_redirects to the opposite (net/ipv4/devinet.c,
// inet_forward_change), which is restored: it has a change of its own.
func writeForward(value string) error {
	const redirects = "net.ipv4.conf.all.accept_redirects"
	before, err := sysctl.ReadInt(redirects)
	if err != nil {
		return err
	}
	if err := sysctl.Write(plan.IPForward, value); err != nil {
		return err
	}
	return sysctl.Write(redirects, strconv.Itoa(before))
}

// A ForwardingError reports that forwarding is off and cannot be enabled.
type ForwardingError struct {
	Sysctl string
	Err    error
}

func (e *ForwardingError) Error() string {
	return fmt.Sprintf("set sysctl %s = 1: found 0, %v", e.Sysctl, e.Err)
}

// Unwrap returns the kernel's error.
func (e *ForwardingError) Unwrap() error { return e.Err }

// Hint returns advice for the user.
func (e *ForwardingError) Hint(wording.Names) string {
	name := plan.IPForward
	if e.Sysctl == plan.IPv6Forward {
		name = e.Sysctl
	}
	return "run the container privileged, or set the sysctl: " + name + "=1 in the pod's securityContext.sysctls, or --sysctl " + name + "=1 with docker and podman"
}

// CanForward returns nil if forwarding is enabled or can be enabled, otherwise a
// *ForwardingError. It changes nothing.
func CanForward(want plan.Network, have plan.State) error {
	for _, s := range plan.Forwarding(want, have) {
		f, err := os.OpenFile(sysctl.Path(s.Sysctl), os.O_WRONLY, 0)
		if err != nil {
			return &ForwardingError{s.Sysctl, err}
		}
		_ = f.Close() // nothing was written
	}
	return nil
}
