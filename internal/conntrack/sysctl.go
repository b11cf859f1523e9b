package conntrack

import (
	"fmt"
	"log/slog"
	"os"
	"strings"
)

// The sysctls of the network namespace that decide what is to be seen
// (nf_conntrack-sysctl.rst).
const (
	// accountingSysctl makes the kernel count the packets and bytes of
	// connections that begin from then on.
	accountingSysctl = "net.netfilter.nf_conntrack_acct"
	// eventsSysctl is 0 where there are no events, 1 where every connection has
	// them, and 2, since Linux 5.19 what it is by itself, where those have them
	// that began while somebody listened.
	eventsSysctl = "net.netfilter.nf_conntrack_events"
)

// sysctlPath returns the file of a sysctl, as the calling thread's network
// namespace has it.
func sysctlPath(name string) string { return "/proc/sys/" + strings.ReplaceAll(name, ".", "/") }

func readSysctl(name string) (string, error) {
	data, err := os.ReadFile(sysctlPath(name))
	if err != nil {
		return "", fmt.Errorf("read sysctl %s: %w", name, err)
	}
	return strings.TrimSpace(string(data)), nil
}

func writeSysctl(name, value string) error {
	// Without O_CREATE and O_TRUNC: the file is there or the kernel lacks it.
	f, err := os.OpenFile(sysctlPath(name), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("open sysctl %s: %w", name, err)
	}
	if _, err := f.WriteString(value); err != nil {
		_ = f.Close() // the first error is the telling one
		return fmt.Errorf("set sysctl %s = %s: %w", name, value, err)
	}
	return f.Close()
}

// startAccounting turns on the counting of packets and bytes where it is off,
// and reports whether it is on now.
func startAccounting(log *slog.Logger) bool {
	value, err := readSysctl(accountingSysctl)
	if err == nil && value == "0" {
		err = writeSysctl(accountingSysctl, "1")
	}
	if err != nil {
		log.Warn("packet and byte counters unavailable", "error", err, "hint",
			"run the container privileged, or set the sysctl: "+accountingSysctl+"=1 in the pod's securityContext.sysctls (the kubelet has to allow it), or --sysctl "+accountingSysctl+"=1 with docker and podman")
	}
	return err == nil
}

// checkEvents says so where the kernel tells nothing about connections.
func checkEvents(log *slog.Logger) {
	if value, err := readSysctl(eventsSysctl); err == nil && value == "0" {
		log.Warn("conntrack events disabled", "sysctl", eventsSysctl, "value", value,
			"effect", "only connections that are open when the counters are read are counted", "hint",
			"set the sysctl: "+eventsSysctl+"=1 in the pod's securityContext.sysctls (the kubelet has to allow it), or --sysctl "+eventsSysctl+"=1 with docker and podman")
	}
}
