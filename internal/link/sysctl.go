package link

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// ipForward is the sysctl that lets the kernel forward IPv4 packets between
// interfaces (ip-sysctl.rst). It belongs to the network namespace.
const ipForward = "net.ipv4.ip_forward"

// forwarding is the same for what one interface receives.
func forwarding(name string) string { return "net/ipv4/conf/" + name + "/forwarding" }

// conntrackCount is the number of connections that the kernel tracks in the
// network namespace (nf_conntrack-sysctl.rst).
const conntrackCount = "net.netfilter.nf_conntrack_count"

// promoteSecondaries is the sysctl that keeps an interface's secondary
// addresses when their primary one is deleted (ip-sysctl.rst).
func promoteSecondaries(name string) string {
	return "net/ipv4/conf/" + name + "/promote_secondaries"
}

// reversePathFilter is the sysctl by which the kernel drops packets that come in
// by another interface than their source is reached by. The value for all
// interfaces or that for the one, whichever is higher, holds (ip-sysctl.rst,
// rp_filter: 0 off, 1 strict, 2 loose).
func reversePathFilter(name string) string { return "net/ipv4/conf/" + name + "/rp_filter" }

// addressesIPv6 lists the IPv6 addresses of the network namespace of the thread
// that opens it (proc_pid_net(5)). A kernel without IPv6, or with it switched off
// by ipv6.disable=1, does not have it.
const addressesIPv6 = "/proc/thread-self/net/if_inet6"

// HasIPv6 reports whether the kernel does IPv6.
func HasIPv6() bool {
	_, err := os.Stat(addressesIPv6)
	return !errors.Is(err, os.ErrNotExist)
}

// sysctlPath returns the file of a sysctl. As with sysctl(8), a name that is
// written with slashes may have dots in its parts (interface names have).
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
	// Without O_CREATE and O_TRUNC: the file is there or the kernel lacks it.
	f, err := os.OpenFile(sysctlPath(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(value); err != nil {
		_ = f.Close() // the first error is the telling one
		return err
	}
	return f.Close()
}

// A ForwardingError says that packets are not forwarded and that this cannot be
// changed from here.
type ForwardingError struct {
	Sysctl string
	Err    error
}

func (e *ForwardingError) Error() string {
	return fmt.Sprintf("set sysctl %s = 1: found 0, %v", e.Sysctl, e.Err)
}

// Unwrap returns what the kernel said.
func (e *ForwardingError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *ForwardingError) Hint() string {
	return "run the container privileged, or set the sysctl: " + ipForward + "=1 in the pod's securityContext.sysctls, or --sysctl " + ipForward + "=1 with docker and podman"
}

// CanForward returns nil where packets are forwarded already or forwarding can
// be turned on, else a *ForwardingError. It changes nothing.
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
