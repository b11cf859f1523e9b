package controller

import (
	"regexp"
	"strings"
)

// The message of an event FailedCreatePodSandBox begins with the names of the layers that
// passed an error on: kubelet, container runtime, Multus. These end before the plugin's
// sentence. Multus quotes the network, and with several plugins the runtime the plugin.
var layers = regexp.MustCompile(`^.*(?:error adding container to network "[^"]*":|failed \(add\):|rpc error: code = \w+ desc =|Failed to create pod sandbox:)\s*(?:\[[^\]]*\]:\s*)?`)

// unstable are the parts of a message that change with each attempt: the identifiers of
// sandboxes and paths of network namespaces.
var unstable = regexp.MustCompile(`\b[0-9a-f]{64}\b|(?:/var)?/run/netns/[^\s:"]+`)

// sentence returns the sentence of the CNI plugin from the message of an event. It is the
// same for each attempt.
func sentence(message string) string {
	message = strings.Join(strings.Fields(message), " ")
	message, _, _ = strings.Cut(message, " ': StdinData:") // Multus as a daemon appends the configuration
	message = layers.ReplaceAllString(message, "")
	return unstable.ReplaceAllString(message, "…")
}
