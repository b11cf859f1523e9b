// Egress-router-cni is the CNI plugin egress-router: it gives a pod a reserved source address
// on the physical network, and redirects the connections that reach the pod to external
// servers. The pod needs no privilege and runs nothing for it.
//
// Its configuration is the JSON of a network attachment. Without CNI_COMMAND it has commands
// for an administrator: install, uninstall and version.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/egress-router/egress-router/internal/cni"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := cni.Run(ctx, cni.Process{Args: os.Args[1:], Getenv: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
	stop()
	os.Exit(code)
}
