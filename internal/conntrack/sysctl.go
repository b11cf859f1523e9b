package conntrack

import (
	"fmt"
	"log/slog"

	"github.com/egress-router/egress-router/internal/sysctl"
)

// The sysctls of the network namespace for counters and events
// (nf_conntrack-sysctl.rst).
const (
	// accountingSysctl enables the kernel's packet and byte counters of connections
	// that begin later.
	accountingSysctl = "net.netfilter.nf_conntrack_acct"
	// timestampSysctl enables the kernel's times of connections that begin later.
	timestampSysctl = "net.netfilter.nf_conntrack_timestamp"
	// eventsSysctl is 0 for no events, 1 for events of all connections, and 2, the
	// default since Linux 5.19, for events of connections that began while a
	// program was subscribed.
	eventsSysctl = "net.netfilter.nf_conntrack_events"
)

// startAccounting enables packet and byte counters if they are off, and reports
// whether they are on.
func startAccounting(log *slog.Logger) bool {
	err := enable(accountingSysctl)
	if err != nil {
		log.Warn("packet and byte counters unavailable", "error", err, "hint", "run the container privileged, or "+advice(accountingSysctl))
	}
	return err == nil
}

// startTimestamps enables the times of connections if they are off.
func startTimestamps(log *slog.Logger) {
	if err := enable(timestampSysctl); err != nil {
		log.Warn("connection times inexact", "error", err,
			"effect", "seconds of connections with the outcome expired or unanswered are up to a minute too long",
			"hint", "run the container privileged, or "+advice(timestampSysctl))
	}
}

// enable sets a sysctl to 1 if it is 0.
func enable(name string) error {
	value, err := sysctl.Read(name)
	if err != nil || value != "0" {
		return err
	}
	if err := sysctl.Write(name, "1"); err != nil {
		return fmt.Errorf("set sysctl %s = 1: %w", name, err)
	}
	return nil
}

// advice returns how to set a sysctl to 1 from outside.
func advice(name string) string {
	return "set the sysctl: " + name + "=1 in the pod's securityContext.sysctls (the kubelet has to allow it), or --sysctl " + name + "=1 with docker and podman"
}

// checkEvents logs a warning if the kernel sends no events.
func checkEvents(log *slog.Logger) {
	if value, err := sysctl.Read(eventsSysctl); err == nil && value == "0" {
		log.Warn("conntrack events disabled", "sysctl", eventsSysctl, "value", value,
			"effect", "only connections that are open when the counters are read are counted", "hint", advice(eventsSysctl))
	}
}
