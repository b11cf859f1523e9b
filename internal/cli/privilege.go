package cli

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/wording"
)

// A capability is a privilege of a process (capabilities(7)).
type capability struct {
	name   string
	number uint
}

// The capabilities of a router: for addresses, routes and rules, and for packet
// sockets and iptables (legacy).
var capabilities = []capability{{"NET_ADMIN", unix.CAP_NET_ADMIN}, {"NET_RAW", unix.CAP_NET_RAW}}

// hostCapabilities are those to create a macvlan of a NIC of the host, too: for
// setns(2), and for a namespace in /proc of a process of the host.
var hostCapabilities = []capability{{"SYS_ADMIN", unix.CAP_SYS_ADMIN}, {"SYS_PTRACE", unix.CAP_SYS_PTRACE}}

// missing returns the names of the capabilities that this process lacks.
func missing(all ...capability) (names []string) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return nil // unknown
	}
	for _, c := range all {
		if have[c.number/32].Effective&(1<<(c.number%32)) == 0 {
			names = append(names, c.name)
		}
	}
	return names
}

// A privilegeError means that the process lacks capabilities.
type privilegeError struct{ missing []string }

func (e *privilegeError) Error() string {
	return fmt.Sprintf("check capabilities: %s missing, %v", strings.Join(e.missing, ", "), unix.EPERM)
}

// Unwrap returns the kernel's error for a call without them.
func (e *privilegeError) Unwrap() error { return unix.EPERM }

// checkPrivilege returns an error if the process lacks NET_ADMIN, without which
// nothing can be read or changed. The first call that fails would name another
// cause: without a writable /proc/sys, which goes with privilege, a sysctl. Lack of
// the others is an error of the call that needs them: some runs need none.
func checkPrivilege(c config.Config) error {
	need := capabilities
	if c.Macvlan != nil {
		need = slices.Concat(need, hostCapabilities)
	}
	if lacks := missing(need...); len(lacks) > 0 && lacks[0] == capabilities[0].name {
		return &privilegeError{lacks}
	}
	return nil
}

// Hint returns the remedy.
func (e *privilegeError) Hint(wording.Names) string {
	if slices.Contains(e.missing, hostCapabilities[0].name) {
		return "EGRESS_MACVLAN_PARENT requires securityContext.privileged: true in the container's spec, and hostPID: true in the pod's (docker and podman: --privileged --pid=host)"
	}
	return privilegeHint()
}

// privilegeHint returns the remedy for a call that the kernel refused.
func privilegeHint() string {
	const privileged = "securityContext.privileged: true in the container's spec"
	lacks := missing(capabilities...)
	if len(lacks) == 0 {
		return "the container has NET_ADMIN and NET_RAW, but its network namespace belongs to another user namespace, or a security module refuses the call: set " + privileged
	}
	return fmt.Sprintf("the container lacks %s: set %s; or securityContext.runAsUser: 0 and capabilities.add: [NET_ADMIN, NET_RAW] there, with net.ipv4.ip_forward=1 in the pod's securityContext.sysctls (docker and podman: --cap-add NET_ADMIN --cap-add NET_RAW --sysctl net.ipv4.ip_forward=1)",
		strings.Join(lacks, " and "), privileged)
}
