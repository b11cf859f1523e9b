// Package e2e runs the router's image with real container engines, podman and docker,
// from the side of clients and servers. It contains tests only:
//
//	go test -count=1 ./...     in this directory; or make e2e
//
// They need root and install missing programs (see programs). They build the images
// with .ci/image and run in new network, mount, PID and IPC namespaces, with the
// storage, state and configuration of the engines on file systems in memory. The
// machine's containers, links, NICs and firewall are out of reach, and the kernel
// removes everything, however the tests end.
//
// It is a module of its own because the Kubernetes API types, with which the
// manifests are checked, must not become dependencies of the router.
package e2e
