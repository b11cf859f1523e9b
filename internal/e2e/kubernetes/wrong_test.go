package kubernetes

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// A manifest that is wrong says what is wrong and what to do, where people look:
// in the state of the pod, in its log, and in what kubectl describe says.
func TestWrongManifests(t *testing.T) {
	const (
		// A pod begins with the node's setting, which is on.
		router = "  initContainers:\n"
		off    = router + "  - name: no-forwarding\n    image: " + peerImage + "\n    args: [set, net/ipv4/ip_forward, \"0\"]\n" + privileged
	)
	for _, test := range []struct {
		name, file string
		changes    []string
		last, hint string
	}{
		{"no macvlan0", "redirect-pod.yaml", []string{networks, "unused: \"true\""},
			`interface "macvlan0" not found; `, "k8s.v1.cni.cncf.io/networks"},
		{"a bad destination", "redirect-pod.yaml", []string{"8080 tcp 203.0.113.26 80", "8080 TCP 203.0.113.26 80"},
			`EGRESS_DESTINATION value '8080 TCP 203.0.113.26 80' is invalid`, "lower case"},
		{"no privilege", "redirect-pod.yaml", []string{privileged, ""},
			`operation not permitted`, "securityContext.privileged: true"},
		{"a read-only /proc/sys, and no forwarding", "redirect-pod.yaml", []string{privileged, netAdmin, router, off},
			`set sysctl net.ipv4.ip_forward = 1: `, "sysctl"},
		{"no processes of the node", "macvlan-parent-pod.yaml", []string{"  hostPID: true ", "  hostPID: false "},
			`is the pod's own`, "hostPID: true"},
		{"a bad rule of the proxy", "http-proxy-restricted.yaml", []string{"192.168.2.1\n", "192.168.2.300\n"},
			`Bad destination '192.168.2.300'`, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := manifest(t, test.file, test.changes...)
			name := "egress-1"
			if test.file == "redirect-pod.yaml" {
				name = "egress-multi"
			}
			apply(t, text)

			container := "egress-router"
			states := []string{"Init:Error", "Init:CrashLoopBackOff"}
			if test.file == "http-proxy-restricted.yaml" {
				container, states = "egress-router-pod", []string{"Error", "CrashLoopBackOff"}
			}
			await(t, "a pod that failed", time.Minute, func() error {
				state := strings.Fields(kubectl(t, "get", "pod", name, "--no-headers"))[2]
				if !slices.Contains(states, state) {
					return fmt.Errorf("it is in state %s", state)
				}
				return nil
			})
			// A container that is just starting again has no log for a moment.
			await(t, "its log", 30*time.Second, func() error {
				log, err := run("kubectl", "-n", namespace, "logs", name, "-c", container)
				if err != nil {
					return err
				}
				lines := strings.Split(strings.TrimSpace(log), "\n")
				if !strings.Contains(lines[len(lines)-1], test.last) || !strings.Contains(log, test.hint) {
					return fmt.Errorf("want %q at the end, and a hint at %q:\n%s", test.last, test.hint, log)
				}
				return nil
			})
			// The part of the one container, without the pod's events.
			await(t, "its message", 30*time.Second, func() error {
				description := kubectl(t, "describe", "pod", name)
				_, part, _ := strings.Cut(description, "\n  "+container+":\n")
				part, _, _ = strings.Cut(part, "\n    Mounts:")
				_, message, _ := strings.Cut(part, "Message:")
				if !strings.Contains(message, test.last) || !strings.Contains(message, test.hint) {
					return fmt.Errorf("kubectl describe does not say %q and %q:\n%s", test.last, test.hint, description)
				}
				return nil
			})
		})
	}
}
