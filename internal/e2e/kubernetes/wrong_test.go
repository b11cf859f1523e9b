package kubernetes

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// A pod with an error in its manifest fails. Its log and kubectl describe contain the
// error and a hint.
func TestWrongManifests(t *testing.T) {
	const (
		// A new pod inherits the node's setting, which is on.
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
		{"invalid destination", "redirect-pod.yaml", []string{"8080 tcp 203.0.113.26 80", "8080 TCP 203.0.113.26 80"},
			`EGRESS_DESTINATION value '8080 TCP 203.0.113.26 80' is invalid`, "lower case"},
		{"no privilege", "redirect-pod.yaml", []string{privileged, ""},
			`operation not permitted`, "securityContext.privileged: true"},
		{"read-only /proc/sys without forwarding", "redirect-pod.yaml", []string{privileged, netAdmin, router, off},
			`set sysctl net.ipv4.ip_forward = 1: `, "sysctl"},
		{"no hostPID", "macvlan-parent-pod.yaml", []string{"  hostPID: true ", "  hostPID: false "},
			`is the pod's own`, "hostPID: true"},
		{"invalid proxy rule", "http-proxy-restricted.yaml", []string{"192.168.2.1\n", "192.168.2.300\n"},
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
			await(t, "the failure of the pod", func() error {
				state := strings.Fields(kubectl(t, "get", "pod", name, "--no-headers"))[2]
				if !slices.Contains(states, state) {
					return fmt.Errorf("pod in state %s", state)
				}
				return nil
			})
			// A container that is restarting has no log for a moment.
			await(t, "the error in the log", func() error {
				log, err := run("kubectl", "-n", namespace, "logs", name, "-c", container)
				if err != nil {
					return err
				}
				lines := strings.Split(strings.TrimSpace(log), "\n")
				if !strings.Contains(lines[len(lines)-1], test.last) || !strings.Contains(log, test.hint) {
					return fmt.Errorf("log without %q in its last line, or without the hint %q:\n%s", test.last, test.hint, log)
				}
				return nil
			})
			// The section of the container, without the events of the pod.
			await(t, "the error in kubectl describe", func() error {
				description := kubectl(t, "describe", "pod", name)
				_, part, _ := strings.Cut(description, "\n  "+container+":\n")
				part, _, _ = strings.Cut(part, "\n    Mounts:")
				_, message, _ := strings.Cut(part, "Message:")
				if !strings.Contains(message, test.last) || !strings.Contains(message, test.hint) {
					return fmt.Errorf("kubectl describe without %q or without the hint %q:\n%s", test.last, test.hint, description)
				}
				return nil
			})
		})
	}
}
