// Package nft loads a rule plan into the kernel with nftables, by netlink alone: it
// needs no program, and no privilege besides NET_ADMIN.
//
// The plan becomes one table for each family. Redirects are a map from protocol and
// port to the server, so a look-up takes as long with thousands of redirects as
// with two. All changes are one transaction, which the kernel accepts or refuses
// as a whole (nft(8), -f).
package nft

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/wording"
	"github.com/egress-router/egress-router/rules"
)

// The names of our tables, one for each family. The source guard has a table of
// its own, so that it survives a flush of the other table. So have limits, whose counts
// are lost with their table.
const (
	tableName  = "egress-router"
	guardName  = "egress-router-guard"
	limitsName = "egress-router-limits"
)

// formerGuardName is the name that earlier versions gave the source guard's
// table. A router that takes over their namespace, as after an image update,
// deletes that table in the transaction that adds its own.
const formerGuardName = "egress-router-last"

// A Tx changes the tables of one network namespace. It keeps their content, as read
// at its begin and after each of its changes.
type Tx struct {
	names      []string // names of the tables that plans are rendered to
	former     []string // names of tables of earlier versions, to delete
	families   []rules.Family
	now        state
	generation uint32 // generation ID of now
}

// A KernelError reports that the kernel lacks nftables.
type KernelError struct{ Err error }

func (e *KernelError) Error() string {
	return fmt.Sprintf("probe nf_tables: %v", e.Err)
}

// Unwrap returns the kernel's error.
func (e *KernelError) Unwrap() error { return e.Err }

// Hint returns advice for the user.
func (e *KernelError) Hint(names wording.Names) string {
	return wording.Textf("the kernel lacks nf_tables, or the module is not loaded: modprobe nf_tables nft_nat nft_ct nft_reject_ipv4 nft_reject_ipv6 on the node, or %s", wording.Set(wording.Backend, "iptables")).In(names)
}

// Begin reads our tables in the calling thread's network namespace, and returns a
// Tx for the given families.
func Begin(_ context.Context, families ...rules.Family) (*Tx, error) {
	return begin(&Tx{names: []string{tableName}, families: families})
}

// BeginGuard does the same for the tables of the source guard and of limits, which every
// backend has ([rules.SourceGuard], [rules.Limits]).
func BeginGuard(_ context.Context, families ...rules.Family) (*Tx, error) {
	return begin(&Tx{names: []string{guardName, limitsName}, former: []string{formerGuardName}, families: families})
}

// BeginAll does the same for all tables, which change in one transaction. It is for a caller
// without another backend.
func BeginAll(_ context.Context, families ...rules.Family) (*Tx, error) {
	return begin(&Tx{names: []string{tableName, guardName, limitsName}, former: []string{formerGuardName}, families: families})
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
	for _, name := range slices.Concat(tx.names, tx.former) {
		for _, f := range tx.families {
			keys = append(keys, tableKey{name, f})
		}
	}
	return keys
}

// String names the backend.
func (tx *Tx) String() string { return "nftables" }

// Holds reports whether one of our tables exists.
func (tx *Tx) Holds() bool { return len(tx.now) > 0 }

// Watched returns true: the kernel notifies of changes of nftables.
func (tx *Tx) Watched() bool { return true }

// Notes returns nothing: the other backend reports rules of other programs.
func (tx *Tx) Notes() []string { return nil }

// Redirects reports whether our tables contain redirects.
func (tx *Tx) Redirects() bool {
	for _, t := range tx.now {
		if t.redirects() {
			return true
		}
	}
	return false
}

// Named returns the addresses of the redirects to names, by name. An address may be there
// several times.
func (tx *Tx) Named() map[string][]netip.Addr {
	named := make(map[string][]netip.Addr)
	for key, t := range tx.now {
		length := 4
		if key.family == rules.IPv6 {
			length = 16
		}
		for _, d := range t.to {
			for _, e := range d {
				if e.name != "" {
					a, _ := netip.AddrFromSlice(e.value[:length])
					named[e.name] = append(named[e.name], a)
				}
			}
		}
	}
	return named
}

// Sources returns the reserved addresses of the rules: those for which the pod answers
// echo requests, in any mode.
func (tx *Tx) Sources() []netip.Addr {
	var found []netip.Addr
	for key, t := range tx.now {
		c := t.chains[chainName(rules.Chain{Table: rules.Filter, Hook: rules.Input})]
		if c == nil {
			continue
		}
		for _, rule := range c.rules {
			if a, ok := formats[key.family].toward(rule); ok && !slices.Contains(found, a) {
				found = append(found, a)
			}
		}
	}
	return found
}

// Differs returns the differences of the kernel from the plan, one line each; for an
// invalid plan its error.
func (tx *Tx) Differs(plan rules.Plan) []string {
	if err := plan.Validate(); err != nil {
		return []string{err.Error()}
	}
	return tx.differences(render(plan, tx.names...))
}

// Apply loads the plan, and does nothing if there is no drift. It returns the
// rollback to the state before; with an error only if that state has changed. An invalid
// plan is an error ([rules.Plan.Validate]).
func (tx *Tx) Apply(ctx context.Context, plan rules.Plan) (undo func() error, err error) {
	before := tx.now
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := plan.Validate(); err != nil {
		return nil, err
	}
	undo = func() error { return tx.become(before) }
	if err := tx.become(render(plan, tx.names...)); err != nil {
		if len(tx.differences(before)) > 0 {
			return undo, err
		}
		return nil, err
	}
	return undo, nil
}

// missingErrors are the errors of kernels without nf_tables or one of its families
// (nfnetlink_rcv_msg in net/netfilter/nfnetlink.c, nf_tables_api.c).
var missingErrors = []error{unix.EPROTONOSUPPORT, unix.EOPNOTSUPP, unix.EAFNOSUPPORT, unix.EINVAL}

// missing reports whether an error is one of a kernel without nf_tables or one of
// its families.
func missing(err error) bool {
	return slices.ContainsFunc(missingErrors, func(e error) bool { return errors.Is(err, e) })
}
