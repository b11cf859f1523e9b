package nft

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// A helper is a named object of a table, which rules attach to connections
// (nft(8), ct helper).
type helper struct {
	name, kernel string // name of the object, and of the helper in the kernel
	protocol     rules.Protocol
}

// objectName returns the name of the object for a helper of the kernel.
func objectName(kernel string, p rules.Protocol) string {
	return strings.ToLower(kernel) + "-" + p.String()
}

// newHelpers returns the objects for helpers, sorted by name.
func newHelpers(planned []rules.Helper) []helper {
	var objects []helper
	for _, h := range planned {
		objects = append(objects, helper{objectName(h.Name, h.Protocol), h.Name, h.Protocol})
	}
	sortHelpers(objects)
	return objects
}

func sortHelpers(objects []helper) {
	slices.SortFunc(objects, func(a, b helper) int { return strings.Compare(a.name, b.name) })
}

// addHelper adds the object of a helper.
func (b *batch) addHelper(t *nftables.Table, h helper) {
	b.add(unix.NFT_MSG_NEWOBJ, netlink.Create, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_OBJ_TABLE, t.Name)
		e.String(unix.NFTA_OBJ_NAME, h.name)
		e.Uint32(unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_CT_HELPER)
		data, err := expr.MarshalExprData(byte(t.Family), &expr.CtHelper{Name: h.kernel, L4Proto: uint8(h.protocol)})
		if err != nil && b.err == nil {
			b.err = err
		}
		e.Bytes(unix.NFTA_OBJ_DATA|unix.NLA_F_NESTED, data)
	})
}

// readHelpers returns the objects of helpers in a table, sorted by name, and the names
// of its other objects.
func readHelpers(t *nftables.Table) (found []helper, others []string, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer conn.Close()
	var b batch
	b.add(unix.NFT_MSG_GETOBJ, netlink.Dump, t.Family, func(e *netlink.AttributeEncoder) { e.String(unix.NFTA_OBJ_TABLE, t.Name) })
	if b.err != nil {
		return nil, nil, b.err
	}
	if _, err := conn.Send(b.messages[0]); err != nil {
		return nil, nil, reason(err)
	}
	text := func(b []byte) string { return strings.TrimRight(string(b), "\x00") }
	err = receive(conn, func(m syscall.NetlinkMessage) error {
		var h helper
		kind := -1
		err := attributes(m.Data[len(header(0, 0)):], func(attribute uint16, data []byte) error {
			switch attribute {
			case unix.NFTA_OBJ_NAME:
				h.name = text(data)
			case unix.NFTA_OBJ_TYPE:
				kind = int(data[len(data)-1])
			case unix.NFTA_OBJ_DATA:
				return attributes(data, func(attribute uint16, data []byte) error {
					switch {
					case attribute == unix.NFTA_CT_HELPER_NAME:
						h.kernel = text(data)
					case attribute == unix.NFTA_CT_HELPER_L4PROTO && len(data) == 1:
						h.protocol = rules.Protocol(data[0])
					}
					return nil
				})
			}
			return nil
		})
		if kind == unix.NFT_OBJECT_CT_HELPER {
			found = append(found, h)
		} else {
			others = append(others, "object "+h.name)
		}
		return err
	})
	sortHelpers(found)
	return found, others, err
}

// probeName is the name of a table that exists within a transaction only.
const probeName = tableName + "-probe"

// missingHelper returns the error of a load with helpers: a *rules.HelperError if the
// kernel lacks one of them.
func missingHelper(target state, err error) error {
	if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	for key, t := range target {
		for _, h := range t.helpers {
			probe := &nftables.Table{Name: probeName, Family: formats[key.family].number}
			var b batch
			b.addTable(probe)
			b.addHelper(probe, h)
			b.deleteTable(probe)
			if b.run() != nil {
				return &rules.HelperError{Helper: rules.Helper{Name: h.kernel, Protocol: h.protocol}, Err: err}
			}
		}
	}
	return err
}
