// Package nft puts a rule plan into the kernel with nftables, by netlink alone:
// it needs no program and of privileges NET_ADMIN only.
//
// The plan becomes a table of our own for each family. Redirects are a map from
// protocol and port to the server, so that finding the one for a connection takes
// as long among thousands as among two. All changes go in as one transaction,
// which the kernel takes as a whole or not at all (nft(8), -f).
package nft

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// The names of our tables, one for each family. The source guard has a table of
// its own, so that it survives a flush of the other table.
const (
	tableName = "egress-router"
	guardName = "egress-router-guard"
)

// formerGuardName is the name that earlier versions gave the source guard's
// table. A router that takes over their namespace, as after an image update,
// deletes that table in the transaction that adds its own.
const formerGuardName = "egress-router-last"

// A Tx changes the tables of one network namespace. It knows what the kernel
// held when it began and after each change of its own.
type Tx struct {
	name       string   // of the tables that plans are rendered to
	former     []string // names of tables of earlier versions, to delete
	families   []rules.Family
	now        state
	generation uint32 // of the kernel's rules when now was read, or written
}

// A KernelError says that the kernel does not do nftables.
type KernelError struct{ Err error }

func (e *KernelError) Error() string {
	return fmt.Sprintf("probe nf_tables: %v", e.Err)
}

// Unwrap returns what the kernel said.
func (e *KernelError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *KernelError) Hint() string {
	return "the kernel lacks nf_tables, or the module is not loaded: modprobe nf_tables nft_nat nft_ct nft_reject_ipv4 on the node, or EGRESS_ROUTER_BACKEND=iptables"
}

// Begin reads what the kernel holds, in the calling thread's network namespace,
// and returns a Tx that changes it. Families are those whose rules it is for.
func Begin(_ context.Context, families ...rules.Family) (*Tx, error) {
	return begin(&Tx{name: tableName, families: families})
}

// BeginGuard does the same for the tables of the source guard, which every
// backend has ([rules.SourceGuard]).
func BeginGuard(_ context.Context, families ...rules.Family) (*Tx, error) {
	return begin(&Tx{name: guardName, former: []string{formerGuardName}, families: families})
}

func begin(tx *Tx) (*Tx, error) {
	if err := tx.read(); err != nil {
		return nil, err
	}
	return tx, nil
}

// keys returns the tables that the Tx reads and changes.
func (tx *Tx) keys() []tableKey {
	var keys []tableKey
	for _, name := range append([]string{tx.name}, tx.former...) {
		for _, f := range tx.families {
			keys = append(keys, tableKey{name, f})
		}
	}
	return keys
}

// String names the backend.
func (tx *Tx) String() string { return "nftables" }

// Holds reports whether tables of ours are there.
func (tx *Tx) Holds() bool { return len(tx.now) > 0 }

// Watched says that the kernel tells of changes to nftables.
func (tx *Tx) Watched() bool { return true }

// Notes returns nothing: whatever else is in the namespace is told by who it
// belongs to.
func (tx *Tx) Notes() []string { return nil }

// Redirects reports whether the kernel holds redirects of ours.
func (tx *Tx) Redirects() bool {
	for _, t := range tx.now {
		if t.redirects() {
			return true
		}
	}
	return false
}

// Differs says, one line each, where the kernel is not as plan wants it.
func (tx *Tx) Differs(plan rules.Plan) []string { return tx.differences(render(plan, tx.name)) }

// Apply makes the kernel hold plan, and does nothing where it does already. It
// returns the way back to what was there before this call; with an error, where
// not all is as it was.
func (tx *Tx) Apply(ctx context.Context, plan rules.Plan) (undo func() error, err error) {
	before := tx.now
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	undo = func() error { return tx.become(before) }
	if err := tx.become(render(plan, tx.name)); err != nil {
		if len(tx.differences(before)) > 0 {
			return undo, err
		}
		return nil, err
	}
	return undo, nil
}

// missingErrors are what kernels say that lack nf_tables or a family of it
// (nfnetlink_rcv_msg in net/netfilter/nfnetlink.c, nf_tables_api.c).
var missingErrors = []error{unix.EPROTONOSUPPORT, unix.EOPNOTSUPP, unix.EAFNOSUPPORT, unix.EINVAL}

// missing reports whether an error says that the kernel lacks nf_tables, or a
// family of it.
func missing(err error) bool {
	return slices.ContainsFunc(missingErrors, func(e error) bool { return errors.Is(err, e) })
}
