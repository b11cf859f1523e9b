// Egress-operator makes the pods of EgressRouter resources, group
// network.operator.openshift.io, on any Kubernetes: for each resource a
// NetworkAttachmentDefinition of the CNI plugin egress-router and a Deployment.
//
// The flags are listed by egress-operator -help.
package main

import (
	"context"
	"os"

	"github.com/egress-router/egress-router/cmd/egress-operator/internal/operator"
)

func main() {
	os.Exit(operator.Run(context.Background(), os.Args[1:], os.Stderr))
}
