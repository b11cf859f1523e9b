package link

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// ipForward is the sysctl that enables forwarding of IPv4 packets between
// interfaces (ip-sysctl.rst). It belongs to the network namespace.
const ipForward = "net.ipv4.ip_forward"

// forwarding is the same for the input of one interface.
func forwarding(name string) string { return "net/ipv4/conf/" + name + "/forwarding" }

// conntrackCount is the number of connections that the kernel tracks in the
// network namespace (nf_conntrack-sysctl.rst).
const conntrackCount = "net.netfilter.nf_conntrack_count"

// promoteSecondaries is the sysctl that keeps an interface's secondary
// addresses when their primary one is deleted (ip-sysctl.rst).
func promoteSecondaries(name string) string {
	return "net/ipv4/conf/" + name + "/promote_secondaries"
}

// reversePathFilter is the sysctl by which the kernel drops packets that arrive by
// another interface than the route to their source. The higher one of the values
// for all interfaces and for this one counts (ip-sysctl.rst, rp_filter: 0 off,
// 1 strict, 2 loose).
func reversePathFilter(name string) string { return "net/ipv4/conf/" + name + "/rp_filter" }

// addressesIPv6 lists the IPv6 addresses of the network namespace of the thread
// that opens it (proc_pid_net(5)). It does not exist without IPv6 in the kernel,
// or with ipv6.disable=1.
const addressesIPv6 = "/proc/thread-self/net/if_inet6"

// HasIPv6 reports whether the kernel has IPv6.
func HasIPv6() bool {
	_, err := os.Stat(addressesIPv6)
	return !errors.Is(err, os.ErrNotExist)
}

// sysctlPath returns the file of a sysctl. As with sysctl(8), a name with slashes
// may have dots in its parts, as interface names have.
func sysctlPath(name string) string {
	if !strings.Contains(name, "/") {
		name = strings.ReplaceAll(name, ".", "/")
	}
	return "/proc/sys/" + name
}

func readSysctl(name string) (string, error) {
	data, err := os.ReadFile(sysctlPath(name))
	if err != nil {
		return "", fmt.Errorf("read sysctl %s: %w", name, err)
	}
	return strings.TrimSpace(string(data)), nil
}

// isOn reports whether a sysctl is not 0.
func isOn(name string) (bool, error) {
	value, err := readSysctl(name)
	return value != "0", err
}

func writeSysctl(name, value string) error {
	// Without O_CREATE and O_TRUNC, since a missing file is a missing sysctl.
	f, err := os.OpenFile(sysctlPath(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(value); err != nil {
		_ = f.Close() // the first error is the cause
		return err
	}
	return f.Close()
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
func (e *ForwardingError) Hint() string {
	return "run the container privileged, or set the sysctl: " + ipForward + "=1 in the pod's securityContext.sysctls, or --sysctl " + ipForward + "=1 with docker and podman"
}

// CanForward returns nil if forwarding is enabled or can be enabled, otherwise a
// *ForwardingError. It changes nothing.
func CanForward(have State) error {
	for _, s := range Forwarding(have) {
		f, err := os.OpenFile(sysctlPath(s.Sysctl), os.O_WRONLY, 0)
		if err != nil {
			return &ForwardingError{s.Sysctl, err}
		}
		_ = f.Close() // nothing was written
	}
	return nil
}
