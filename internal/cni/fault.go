package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/nft"
	"github.com/egress-router/egress-router/internal/object"
	"github.com/egress-router/egress-router/internal/plan"
	"github.com/egress-router/egress-router/internal/router"
	"github.com/egress-router/egress-router/internal/wording"
)

// The plugin's own error codes: the specification leaves those from 100 to plugins.
const (
	CodeRouter    uint = 100 + iota // another failure of a change, which was rolled back
	CodeInterface                   // an interface of that name exists already, or is missing
	CodeNIC                         // the NIC of the node is missing or unsuitable
	CodeCluster                     // the interface of the cluster side is missing
	CodeConflict                    // another host has the reserved address
	CodeRules                       // the kernel lacks nftables, or refused the rules
	CodeOther                       // the namespace has another router
	CodeDrift                       // CHECK has found differences
)

// newError returns an error of a call: what was found and expected, and what to do.
func newError(code uint, hint, format string, args ...any) *types.Error {
	return types.NewError(code, fmt.Sprintf(format, args...), hint)
}

// names are the keys of the fields, and the fields of the resource that an attachment may be
// made of: its user does not know the attachment.
type names struct{}

var keys = map[wording.Field]string{
	wording.Source:           "ip.addresses (EgressRouter: spec.addresses[].ip)",
	wording.Gateway:          "ip.gateway (EgressRouter: spec.addresses[].gateway)",
	wording.Destinations:     "ip.destinations",
	wording.Interface:        "CNI_IFNAME",
	wording.ClusterInterface: "the pod's first interface",
	wording.MacvlanParent:    "interfaceArgs.master (EgressRouter: spec.networkInterface.macvlan.master)",
	wording.Conflict:         "conflict",
}

// Name returns the key of a field.
func (names) Name(f wording.Field) string {
	if key, known := keys[f]; known {
		return key
	}
	return string(f)
}

// Set returns a key with a value.
func (n names) Set(f wording.Field, value string) string {
	return fmt.Sprintf("%q: %q", n.Name(f), value)
}

// failure returns an error as the specification has it.
func failure(err error) *types.Error {
	if e, is := errors.AsType[*types.Error](err); is {
		return e
	}
	if faults, is := errors.AsType[object.Faults](err); is {
		return types.NewError(types.ErrInvalidNetworkConfig, faults[0].Error(), more(faults[1:]))
	}
	return types.NewError(codeOf(err), err.Error(), hintOf(err))
}

// more returns the faults after the first one.
func more(faults object.Faults) string {
	if len(faults) == 0 {
		return ""
	}
	return "also: " + faults.Error()
}

// codeOf returns the code of an error of a router.
func codeOf(err error) uint {
	switch {
	case errors.Is(err, router.ErrBusy), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return types.ErrTryAgainLater
	case is[*router.ConflictError](err):
		return CodeConflict
	case is[*plan.RefusedError](err): // an address or gateway that is the pod's own
		return types.ErrInvalidNetworkConfig
	case is[*nft.KernelError](err), is[*nft.LoadError](err):
		return CodeRules
	case is[*link.MacvlanError](err):
		return CodeNIC
	case is[*router.InterfaceError](err), is[*link.MissingError](err):
		return CodeInterface
	}
	return CodeRouter
}

// is reports whether an error is of a type.
func is[E error](err error) bool {
	_, is := errors.AsType[E](err)
	return is
}

// hintOf returns what to do about an error of a router.
func hintOf(err error) string {
	if errors.Is(err, os.ErrPermission) {
		return "the runtime has to run the plugin as root, with all capabilities"
	}
	switch {
	case codeOf(err) == CodeRules: // there is no other backend
		return "load the kernel's modules on the node: modprobe nf_tables nft_nat nft_ct nft_reject_ipv4 nft_reject_ipv6"
	case errors.Is(err, unix.EROFS):
		return "the runtime has to run the plugin with a writable /proc/sys, or to set the sysctl in the pod (securityContext.sysctls)"
	case is[*router.UndoError](err):
		return "the pod is partly configured: the runtime has to call DEL, or delete the pod"
	case is[*router.HostError](err): // its hints are for a container
		return ""
	}
	return hints.Replace(router.Hint(err, names{}))
}

// hints changes hints for one line, and for the keys.
var hints = strings.NewReplacer("\n", "; ", ", or to true for the NIC of the host's IPv4 default route", ", or remove it for the NIC in the subnet of the address")
