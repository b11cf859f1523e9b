// Package e2e runs the router's image with real container engines, podman and docker,
// and shows what clients and servers see. It holds tests only:
//
//	go test -count=1 ./...     in this directory; or make e2e
//
// They need root. What else they need they install (see programs). They build the
// images with .ci/image and then run in new network, mount, PID and IPC
// namespaces, with the storage, state and configuration of the engines on file systems
// of their own in memory. So they do not see the machine's containers, links or
// firewall, a macvlan cannot be cut from one of its NICs, and whichever way the
// tests end, the kernel removes all that is left.
//
// It is a module of its own because the Kubernetes API types, with which the
// manifests are checked, must not become dependencies of the router.
package e2e
