package nft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A batch is a transaction, which the kernel accepts or refuses as a whole
// (linux/netfilter/nfnetlink.h, NFNL_MSG_BATCH_BEGIN).
//
// The library's own batches take about as long as the kernel for thousands of
// elements, and a tenth of a megabyte for every hundred; only the library's
// expressions are used here.
type batch struct {
	messages []netlink.Message
	// The generation ID for which the changes were computed; zero: any. The
	// kernel refuses a batch for another generation with ERESTART.
	generation uint32
	err        error // first encoding error
}

// writeBuffer is the size of a batch's buffer in bytes. The largest batch of one family
// and protocol, with a redirect for every port, has 2.3 MiB, in IPv6 3.1; the kernel
// reserves half of the size for its accounting (socket(7), SO_SNDBUF).
const writeBuffer = 8 << 20

// header returns the part of a message before its attributes
// (linux/netfilter/nfnetlink.h, struct nfgenmsg).
func header(family byte, resource uint16) []byte {
	return append([]byte{family, unix.NFNETLINK_V0}, byte(resource>>8), byte(resource))
}

// add appends a message of nf_tables to the batch.
func (b *batch) add(kind int, flags netlink.HeaderFlags, family nftables.TableFamily, encode func(*netlink.AttributeEncoder)) {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	encode(e)
	attributes, err := e.Encode()
	if err != nil && b.err == nil {
		b.err = err
	}
	b.append(kind, flags, family, attributes)
}

func (b *batch) append(kind int, flags netlink.HeaderFlags, family nftables.TableFamily, attributes []byte) {
	b.messages = append(b.messages, netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind),
			Flags: netlink.Request | flags,
		},
		Data: append(header(byte(family), 0), attributes...),
	})
}

// addTable adds a table.
func (b *batch) addTable(t *nftables.Table) {
	b.add(unix.NFT_MSG_NEWTABLE, netlink.Create, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_TABLE_NAME, t.Name)
		e.Uint32(unix.NFTA_TABLE_FLAGS, uint32(t.Flags))
	})
}

// deleteTable deletes a table with its content.
func (b *batch) deleteTable(t *nftables.Table) {
	b.add(unix.NFT_MSG_DELTABLE, 0, t.Family, func(e *netlink.AttributeEncoder) { e.String(unix.NFTA_TABLE_NAME, t.Name) })
}

// addChain adds a chain without rules.
func (b *batch) addChain(t *nftables.Table, name string, c *chain) {
	b.addChainOf(t, c.kind, gateChain{name: name, based: c.based, hook: uint32(c.hook), at: int32(c.priority), drops: c.drops})
}

// addChainOf adds a chain of a kind, without rules.
func (b *batch) addChainOf(t *nftables.Table, kind nftables.ChainType, c gateChain) {
	b.add(unix.NFT_MSG_NEWCHAIN, netlink.Create, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_CHAIN_TABLE, t.Name)
		e.String(unix.NFTA_CHAIN_NAME, c.name)
		if !c.based {
			return
		}
		e.Nested(unix.NFTA_CHAIN_HOOK, func(e *netlink.AttributeEncoder) error {
			e.Uint32(unix.NFTA_HOOK_HOOKNUM, c.hook)
			e.Uint32(unix.NFTA_HOOK_PRIORITY, uint32(c.at)) //nolint:gosec // the kernel reads two's complement
			if c.device != "" {
				e.String(unix.NFTA_HOOK_DEV, c.device)
			}
			return nil
		})
		policy := uint32(nftables.ChainPolicyAccept)
		if c.drops {
			policy = uint32(nftables.ChainPolicyDrop)
		}
		e.Uint32(unix.NFTA_CHAIN_POLICY, policy)
		e.String(unix.NFTA_CHAIN_TYPE, string(kind))
	})
}

// deleteChain deletes a chain that has neither rules nor references.
func (b *batch) deleteChain(t *nftables.Table, name string) {
	b.add(unix.NFT_MSG_DELCHAIN, 0, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_CHAIN_TABLE, t.Name)
		e.String(unix.NFTA_CHAIN_NAME, name)
	})
}

// addRule appends a rule to a chain.
func (b *batch) addRule(t *nftables.Table, chain string, rule []expr.Any) {
	b.add(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_RULE_TABLE, t.Name)
		e.String(unix.NFTA_RULE_CHAIN, chain)
		e.Nested(unix.NFTA_RULE_EXPRESSIONS, func(e *netlink.AttributeEncoder) error {
			for _, x := range rule {
				data, err := expr.Marshal(byte(t.Family), x)
				if err != nil {
					return fmt.Errorf("encode expression %T: %w", x, err)
				}
				if _, moves := x.(*movingNAT); moves { // the flags are last
					data[len(data)-1] |= rangeOffset
				}
				e.Bytes(unix.NFTA_LIST_ELEM|netlink.Nested, data)
			}
			return nil
		})
	})
}

// deleteRules deletes the rule with the given handle, or, if it is zero, all rules
// of the chain.
func (b *batch) deleteRules(t *nftables.Table, chain string, handle uint64) {
	b.add(unix.NFT_MSG_DELRULE, 0, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_RULE_TABLE, t.Name)
		e.String(unix.NFTA_RULE_CHAIN, chain)
		if handle != 0 {
			e.Uint64(unix.NFTA_RULE_HANDLE, handle)
		}
	})
}

// addMap adds a map of redirects, without elements.
func (b *batch) addMap(t *nftables.Table, k mapKind) {
	flags := uint32(unix.NFT_SET_MAP | nftables.NFT_SET_CONCAT)
	if k.ranges {
		flags |= unix.NFT_SET_INTERVAL
	}
	b.addSet(t, k.name, k.id, flags, k.keyType(), k.valueType(t.Family))
}

// addSet adds a map, without elements.
func (b *batch) addSet(t *nftables.Table, name string, id, flags uint32, keyType, value nftables.SetDatatype) {
	b.add(unix.NFT_MSG_NEWSET, netlink.Create, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_SET_TABLE, t.Name)
		e.String(unix.NFTA_SET_NAME, name)
		e.Uint32(unix.NFTA_SET_ID, id)
		e.Uint32(unix.NFTA_SET_FLAGS, flags)
		e.Uint32(unix.NFTA_SET_KEY_TYPE, keyType.GetNFTMagic())
		e.Uint32(unix.NFTA_SET_KEY_LEN, keyType.Bytes)
		if value == nftables.TypeVerdict {
			e.Uint32(unix.NFTA_SET_DATA_TYPE, unix.NFT_DATA_VERDICT)
		} else {
			e.Uint32(unix.NFTA_SET_DATA_TYPE, value.GetNFTMagic())
			e.Uint32(unix.NFTA_SET_DATA_LEN, value.Bytes)
		}
		e.Nested(unix.NFTA_SET_DESC, func(e *netlink.AttributeEncoder) error {
			e.Nested(nftables.NFTA_SET_DESC_CONCAT, func(e *netlink.AttributeEncoder) error {
				for _, part := range nftables.ConcatSetTypeElements(keyType) {
					e.Nested(unix.NFTA_LIST_ELEM, func(e *netlink.AttributeEncoder) error {
						e.Uint32(unix.NFTA_SET_DESC_SIZE, part.Bytes)
						return nil
					})
				}
				return nil
			})
			return nil
		})
	})
}

// deleteMap deletes a map that no rule looks up.
func (b *batch) deleteMap(t *nftables.Table, k mapKind) {
	b.add(unix.NFT_MSG_DELSET, 0, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_SET_TABLE, t.Name)
		e.String(unix.NFTA_SET_NAME, k.name)
	})
}

// run sends the batch to the kernel, in the calling thread's network namespace.
func (b *batch) run() error {
	if b.err != nil || len(b.messages) == 0 {
		return b.err
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer conn.Close()
	// Without privilege over the machine, net.core.wmem_max is the limit. Its
	// default is enough to load some 11,000 redirects, or to replace half as
	// many; beyond that sending fails with EMSGSIZE.
	if err := conn.SetWriteBuffer(writeBuffer); err != nil {
		return fmt.Errorf("set nfnetlink send buffer: %w", err)
	}
	return b.runOn(conn)
}

// runOn sends the batch, which is not empty, by a socket.
func (b *batch) runOn(conn *netlink.Conn) error {
	if b.err != nil {
		return b.err
	}
	edge := func(kind int) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request},
			Data:   header(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES),
		}
	}
	begin := edge(unix.NFNL_MSG_BATCH_BEGIN)
	if b.generation != 0 {
		begin.Data = binary.NativeEndian.AppendUint16(begin.Data, headerLen+4)
		begin.Data = binary.NativeEndian.AppendUint16(begin.Data, unix.NFNL_BATCH_GENID)
		begin.Data = binary.BigEndian.AppendUint32(begin.Data, b.generation)
	}
	messages := append([]netlink.Message{begin}, b.messages...)
	// The kernel reports errors in the order of the messages: if the first
	// report is the success of the last message, all have succeeded.
	messages[len(messages)-1].Header.Flags |= netlink.Acknowledge
	if _, err := conn.SendMessages(append(messages, edge(unix.NFNL_MSG_BATCH_END))); err != nil {
		return reason(err)
	}
	_, err := conn.Receive()
	return reason(err)
}

// ask sends a request and returns a number from its answer, by the type of its
// attribute, and whether the answer has it.
func ask(what int, family nftables.TableFamily, kind uint16, encode func(*netlink.AttributeEncoder)) (n uint32, there bool, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, false, fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer conn.Close()
	var b batch
	b.add(what, 0, family, encode)
	if b.err != nil {
		return 0, false, b.err
	}
	messages, err := conn.Execute(b.messages[0])
	if err != nil {
		return 0, false, reason(err)
	}
	for _, m := range messages {
		err := attributes(m.Data[len(header(0, 0)):], func(k uint16, data []byte) error {
			if k == kind && len(data) == 4 {
				n, there = binary.BigEndian.Uint32(data), true
			}
			return nil
		})
		if err != nil {
			return 0, false, err
		}
	}
	return n, there, nil
}

// generation returns the kernel's generation ID, which changes with each change of
// the rules by any program (linux/netfilter/nf_tables.h, NFTA_GEN_ID).
func generation() (uint32, error) {
	n, _, err := ask(unix.NFT_MSG_GETGEN, unix.AF_UNSPEC, unix.NFTA_GEN_ID, func(*netlink.AttributeEncoder) {})
	return n, err
}

// reason returns the kernel's error, without the library's text.
func reason(err error) error {
	if op, ok := errors.AsType[*netlink.OpError](err); ok {
		return op.Err
	}
	return err
}
