package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/rules"
)

// destinations is the content of a map of redirects, sorted by key.
type destinations []destination

// A destination is an element of a map: the key is a protocol and a port, the value what
// the map's kind says, each part in registers of four bytes in network byte order. The
// value has the length that an IPv6 address and two ports need. In a map for several
// addresses the key has a third part, the number of the address from 0, which is kept in
// the last byte of the first one.
type destination struct {
	key, end [8]byte // end is the end of a range, in a map of ranges
	value    [maxValueLen]byte
	name     string // of the redirect's line, as a comment; empty: none
}

// A mapKind is one of the maps of redirects. The kernel looks a port up in a table of
// hashes, a range in a set of trees for each part of the key (net/netfilter/nft_set_pipapo.c).
type mapKind struct {
	name   string
	id     uint32 // within a batch
	ranges bool
	ports  int // number of ports behind the address of a value
	of     func(rules.Redirect) bool
	// A map for redirects to several addresses is for those with this number of them, and a
	// rule draws one of that many. So a port has one element for each address, each address
	// is as probable as the others, and one look-up is as fast as that of one address: with
	// intervals of a random number in the key, the kernel's trees would have ten entries for
	// an address in place of one, and its look-ups would become slower with their number.
	oneOf int // zero: redirects to one address
}

// mapKinds are the maps, in the order in which rules look them up: at first those of one
// address, which most redirects have. A table has those that have elements, and always the
// first.
var mapKinds = func() []mapKind {
	single := []mapKind{
		{"redirects", 1, false, 1, func(r rules.Redirect) bool { return r.Last == 0 }, 0},
		{"ranges", 2, true, 0, func(r rules.Redirect) bool { return r.Last != 0 && r.ToPort == 0 }, 0},
		// To one port, or to as many others.
		{"moved-ranges", 3, true, 2, func(r rules.Redirect) bool { return r.Last != 0 && r.ToPort != 0 }, 0},
	}
	kinds := slices.Clone(single)
	for n := 2; n <= rules.MaxAddresses; n++ {
		for _, k := range single {
			k.name, k.id, k.oneOf = fmt.Sprintf("%s-one-of-%d", k.name, n), uint32(len(kinds)+1), n //nolint:gosec // some hundreds
			kinds = append(kinds, k)
		}
	}
	return kinds
}()

// newMaps returns the maps of a table for redirects.
func newMaps(redirects []rules.Redirect) map[string]destinations {
	const forms = 3 // of redirects, each a kind for one address and for each number of them
	maps := make(map[string]destinations)
	for i, k := range mapKinds[:forms] {
		var d destinations
		if i == 0 {
			d = make(destinations, 0, len(redirects))
		}
		for _, r := range redirects {
			if !r.Several() && k.of(r) {
				d = k.add(d, r)
			}
		}
		if d != nil {
			maps[k.name] = d
		}
	}
	for _, r := range redirects {
		if !r.Several() {
			continue
		}
		for _, k := range mapKinds[forms*(r.Number()-1):][:forms] {
			if k.of(r) {
				maps[k.name] = k.add(maps[k.name], r)
			}
		}
	}
	for _, d := range maps {
		d.sort()
	}
	return maps
}

// add adds the elements for a redirect: for each address one, or a few for a range to other
// ports.
func (k mapKind) add(d destinations, r rules.Redirect) destinations {
	if k.oneOf == 0 {
		return k.addOne(d, r, r.To, 0)
	}
	number := byte(0)
	for to := range r.All() {
		d = k.addOne(d, r, to, number)
		number++
	}
	return d
}

// addOne adds the elements for one address, which has a number among those of its redirect.
func (k mapKind) addOne(d destinations, r rules.Redirect, to netip.Addr, number byte) destinations {
	e := destination{name: r.Comment()}
	addr, _ := to.AppendBinary(e.value[:0]) // no error is possible
	n := len(addr)
	switch k.ports {
	case 1:
		binary.BigEndian.PutUint16(e.value[n:], r.Server(r.Port).Port())
	case 2:
		first, last, ok := offsets(r)
		if !ok {
			low, high := r.Halves()
			return k.addOne(k.addOne(d, low, to, number), high, to, number)
		}
		binary.BigEndian.PutUint16(e.value[n:], first)
		binary.BigEndian.PutUint16(e.value[n+4:], last)
	}
	key := func(port rules.Port) [8]byte {
		key := portKey(r.Protocol, port)
		key[keyNumber] = number
		return key
	}
	if e.key = key(r.Port); k.ranges {
		e.end = key(max(r.Port, r.Last))
	}
	return append(d, e)
}

// portKey returns the key of a port.
func portKey(p rules.Protocol, port rules.Port) [8]byte {
	return [8]byte{0: byte(p), 4: byte(port >> 8), 5: byte(port)}
}

// offsets returns the range of ports from which the kernel takes the server's port for a
// range of local ports: its first port plus the remainder of the local port divided by its
// length (nf_nat_l4proto_unique_tuple in net/netfilter/nf_nat_core.c, with
// NF_NAT_RANGE_PROTO_OFFSET and the base 0, which is all that nf_tables sets). So it has to
// be a range whose length divides all local ports with the same quotient k. Sometimes
// there is none.
func offsets(r rules.Redirect) (first, last uint16, ok bool) {
	to := int(r.Server(r.Port).Port())
	if !r.Shifts {
		return uint16(to), uint16(to), true //nolint:gosec // a port
	}
	low, high := int(r.Port), int(r.Last)
	for k := 0; k <= low; k++ {
		length := high/(k+1) + 1 // the shortest one with that quotient of the last port
		if length <= high-low {
			break
		}
		begin := to - low + k*length
		if end := begin + length - 1; k*length <= low && begin >= 0 && end < 1<<16 {
			return uint16(begin), uint16(end), true //nolint:gosec // ports
		}
	}
	return 0, 0, false
}

func (d destinations) sort() {
	slices.SortFunc(d, compareDestinations)
}

func compareDestinations(a, b destination) int { return bytes.Compare(a.key[:], b.key[:]) }

// steps returns the elements to delete from d and those to add to it to reach want.
func (d destinations) steps(want destinations) (gone, more destinations) {
	return steps(d, want, compareDestinations)
}

// steps returns the elements to delete from one sorted list and those to add to it to reach
// another.
func steps[L ~[]E, E comparable](d, want L, compare func(a, b E) int) (gone, more L) {
	if len(d) == 0 {
		return nil, want
	}
	for len(d) > 0 || len(want) > 0 {
		order := -1 // order of the first keys
		switch {
		case len(d) == 0:
			order = 1
		case len(want) > 0:
			order = compare(d[0], want[0])
		}
		if order == 0 && d[0] == want[0] {
			d, want = d[1:], want[1:]
			continue
		}
		if order <= 0 {
			gone, d = append(gone, d[0]), d[1:]
		}
		if order >= 0 {
			more, want = append(more, want[0]), want[1:]
		}
	}
	return gone, more
}

// An element as netlink(7) attributes (linux/netfilter/nf_tables.h,
// nft_set_elem_attributes): key and value are each two levels of nested attributes
// with a header of four bytes, in one more attribute.
const (
	headerLen   = unix.NLA_HDRLEN
	keyNumber   = 3  // offset in a key of the number of an address
	maxKeyLen   = 12 // with that number as a part of its own
	maxValueLen = 24 // with an IPv6 address and two ports
	keyOffset   = 3 * headerLen
)

// keyLen returns the length of the map's keys in bytes.
func (k mapKind) keyLen() int { return int(k.keyType().Bytes) }

// swap exchanges the protocol and the port of a key in a map of ranges. The kernel visits
// every element of such a map that matches the first part of a key (pipapo_refill in
// net/netfilter/nft_set_pipapo.c): few have the port, thousands may have the protocol.
func (k mapKind) swap(key [8]byte) [8]byte {
	if !k.ranges {
		return key
	}
	return [8]byte(slices.Concat(key[4:], key[:4]))
}

// putKey writes the key of an element as the kernel has it: the random number is a word in
// the order of the machine.
func (k mapKind) putKey(b []byte, key [8]byte) {
	if k.oneOf != 0 {
		binary.NativeEndian.PutUint32(b[len(key):], uint32(key[keyNumber]))
		key[keyNumber] = 0
	}
	key = k.swap(key)
	copy(b, key[:])
}

// takeKey reads a key that putKey has written.
func (k mapKind) takeKey(b []byte) (key [8]byte) {
	copy(key[:], b)
	if key = k.swap(key); k.oneOf != 0 {
		key[keyNumber] = byte(min(binary.NativeEndian.Uint32(b[len(key):]), 255)) // ours are less than MaxAddresses
	}
	return key
}

// keyEnd is the attribute with the end of a range (linux/netfilter/nf_tables.h,
// NFTA_SET_ELEM_KEY_END).
const keyEnd = 10

// maxList is the largest length of the list of elements in a message: it is one attribute,
// whose length has 16 bits.
const maxList = 1<<16 - 1 - headerLen

// changeElements adds elements to a map or deletes them (NFT_MSG_DELSETELEM).
func (b *batch) changeElements(kind int, flags netlink.HeaderFlags, t *nftables.Table, m mapKind, d destinations) {
	keyLen, valueLen := m.keyLen(), m.valueLen(t.Family)
	valueOffset, endLen := keyOffset+keyLen+2*headerLen, 2*headerLen+keyLen
	element := make([]byte, valueOffset+valueLen, valueOffset+valueLen+endLen)
	// attribute writes the header of an attribute that ends at a value's end.
	attribute := func(at, end int, kind uint16) {
		binary.NativeEndian.PutUint16(element[at:], uint16(end-at)) //nolint:gosec // less than 100
		binary.NativeEndian.PutUint16(element[at+2:], kind)
	}
	attribute(0, len(element), unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED)
	attribute(headerLen, keyOffset+keyLen, unix.NFTA_SET_ELEM_KEY|unix.NLA_F_NESTED)
	attribute(keyOffset-headerLen, keyOffset+keyLen, unix.NFTA_DATA_VALUE)
	attribute(keyOffset+keyLen, len(element), unix.NFTA_SET_ELEM_DATA|unix.NLA_F_NESTED)
	attribute(valueOffset-headerLen, len(element), unix.NFTA_DATA_VALUE)
	endOffset := len(element) + 2*headerLen
	if m.ranges {
		element = element[:len(element)+endLen]
		attribute(0, len(element), unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED)
		attribute(endOffset-2*headerLen, len(element), keyEnd|unix.NLA_F_NESTED)
		attribute(endOffset-headerLen, len(element), unix.NFTA_DATA_VALUE)
	}
	for len(d) > 0 {
		n, size := 0, 0
		for n < len(d) && size+len(element)+commentLen(d[n].name) <= maxList {
			size += len(element) + commentLen(d[n].name)
			n++
		}
		b.add(kind, flags, t.Family, func(e *netlink.AttributeEncoder) {
			e.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
			e.String(unix.NFTA_SET_ELEM_LIST_SET, m.name)
		})
		message := &b.messages[len(b.messages)-1]
		length := headerLen + size
		list := make([]byte, 0, len(message.Data)+length)
		list = append(list, message.Data...)
		list = binary.NativeEndian.AppendUint16(list, uint16(length))
		list = binary.NativeEndian.AppendUint16(list, unix.NFTA_SET_ELEM_LIST_ELEMENTS|unix.NLA_F_NESTED)
		for _, e := range d[:n] {
			m.putKey(element[keyOffset:], e.key)
			copy(element[valueOffset:], e.value[:valueLen])
			if m.ranges {
				m.putKey(element[endOffset:], e.end)
			}
			attribute(0, len(element)+commentLen(e.name), unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED)
			list = appendComment(append(list, element...), e.name)
		}
		message.Data, d = list, d[n:]
	}
}

// commentType is the type of a comment in the user data of an element, of which each part
// has a type and a length (libnftnl/udata.h, NFTNL_UDATA_SET_ELEM_COMMENT).
const commentType = 0

// commentLen returns the length of the attribute with a comment; none: zero.
func commentLen(comment string) int {
	if comment == "" {
		return 0
	}
	return (headerLen + 2 + len(comment) + 1 + unix.NLA_ALIGNTO - 1) &^ (unix.NLA_ALIGNTO - 1)
}

// appendComment appends the attribute with a comment, which ends with a zero byte.
func appendComment(b []byte, comment string) []byte {
	if comment == "" {
		return b
	}
	end := len(b) + commentLen(comment)
	b = binary.NativeEndian.AppendUint16(b, uint16(headerLen+2+len(comment)+1)) //nolint:gosec // less than 300
	b = binary.NativeEndian.AppendUint16(b, unix.NFTA_SET_ELEM_USERDATA)
	b = append(append(b, commentType, byte(len(comment)+1)), comment...) //nolint:gosec // at most 254
	return append(b, make([]byte, end-len(b))...)
}

// parseComment returns the comment in the user data of an element, empty if there is none.
func parseComment(data []byte) string {
	for len(data) >= 2 && len(data) >= 2+int(data[1]) {
		kind, part := data[0], data[2:2+int(data[1])]
		if kind == commentType {
			return string(bytes.TrimSuffix(part, []byte{0}))
		}
		data = data[2+len(part):]
	}
	return ""
}

// countAttribute contains a set's number of elements, on kernels since 6.16
// (linux/netfilter/nf_tables.h, NFTA_SET_COUNT).
const countAttribute = 20

// countElements returns the number of elements of a map of a table.
func countElements(t *nftables.Table, m mapKind) (int, error) {
	n, there, err := ask(unix.NFT_MSG_GETSET, t.Family, countAttribute, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_SET_TABLE, t.Name)
		e.String(unix.NFTA_SET_NAME, m.name)
	})
	if err == nil && !there { // an older kernel: a dump takes as long as the load
		d, err := m.read(t)
		return len(d), err
	}
	return int(n), err
}

// readTries is the number of tries of a dump before its interruption is an error,
// readPause the pause between two: the kernel moves the largest map within some
// 10 ms.
const (
	readTries = 50
	readPause = 5 * time.Millisecond
)

// errInterrupted reports that the map changed during a dump, which may be
// incomplete (netlink(7), NLM_F_DUMP_INTR).
//
// The kernel does not set that flag when it moves elements to a larger table, in
// the background after a large load: a dump then has some elements twice and
// lacks as many others.
var errInterrupted = errors.New("map changed during every listing")

// read returns the elements of a map of a table.
func (k mapKind) read(t *nftables.Table) (destinations, error) {
	valueLen := k.valueLen(t.Family)
	return readElements(t, k.name, func(b []byte) (destination, error) { return k.parseElement(b, valueLen) }, compareDestinations)
}

// readElements returns the elements of a set or a map of a table, sorted by key.
func readElements[E any](t *nftables.Table, name string, parse func([]byte) (E, error), compare func(a, b E) int) ([]E, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open nfnetlink socket: %w", err)
	}
	defer conn.Close()
	for try := 1; ; try++ {
		d, err := listElements(conn, t, name, parse, compare)
		if !errors.Is(err, errInterrupted) || try == readTries {
			return d, err
		}
		time.Sleep(readPause)
	}
}

func listElements[E any](conn *netlink.Conn, t *nftables.Table, name string, parse func([]byte) (E, error), compare func(a, b E) int) ([]E, error) {
	var b batch
	b.add(unix.NFT_MSG_GETSETELEM, netlink.Dump, t.Family, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
		e.String(unix.NFTA_SET_ELEM_LIST_SET, name)
	})
	if b.err != nil {
		return nil, b.err
	}
	if _, err := conn.Send(b.messages[0]); err != nil {
		return nil, reason(err)
	}
	d, interrupted := []E{}, false
	err := receive(conn, func(part syscall.NetlinkMessage) error {
		interrupted = interrupted || part.Header.Flags&unix.NLM_F_DUMP_INTR != 0
		return attributes(part.Data[len(header(0, 0)):], func(kind uint16, list []byte) error {
			if kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				return nil
			}
			return attributes(list, func(_ uint16, element []byte) error {
				e, err := parse(element)
				d = append(d, e)
				return err
			})
		})
	})
	slices.SortFunc(d, compare)
	for i := range d[:max(0, len(d)-1)] {
		interrupted = interrupted || compare(d[i], d[i+1]) == 0
	}
	if err == nil && interrupted {
		err = errInterrupted
	}
	return d, err
}

// receive calls fn for each message of a dump.
//
// The library reads a page at a time, and the kernel answers in pieces of the size
// of the reads (netlink_dump in net/netlink/af_netlink.c). For each piece it
// searches its position from the map's beginning.
func receive(conn *netlink.Conn, fn func(syscall.NetlinkMessage) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	b := make([]byte, 64<<10) // twice the kernel's largest piece
	for done := false; !done; {
		n := 0
		if readErr := raw.Read(func(fd uintptr) bool {
			n, _, err = unix.Recvfrom(int(fd), b, 0)
			return !errors.Is(err, unix.EAGAIN)
		}); readErr != nil {
			return readErr
		}
		if err != nil {
			return os.NewSyscallError("recvfrom", err)
		}
		messages, err := syscall.ParseNetlinkMessage(b[:n])
		if err != nil {
			return err
		}
		for _, m := range messages {
			switch m.Header.Type {
			case unix.NLMSG_DONE:
				done = true
			case unix.NLMSG_ERROR:
				return unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data))) //nolint:gosec // an error number, negated
			default:
				if err := fn(m); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// parseElement reads the key and the value of an element. valueLen is the length of the
// value in bytes.
func (k mapKind) parseElement(b []byte, valueLen int) (destination, error) {
	var d destination
	var key, end [maxKeyLen]byte
	err := attributes(b, func(kind uint16, part []byte) error {
		var into []byte
		switch kind {
		case unix.NFTA_SET_ELEM_KEY:
			into = key[:k.keyLen()]
		case unix.NFTA_SET_ELEM_DATA:
			into = d.value[:valueLen]
		case keyEnd:
			into = end[:k.keyLen()]
		case unix.NFTA_SET_ELEM_USERDATA:
			d.name = parseComment(part)
			return nil
		default:
			return nil
		}
		return attributes(part, func(kind uint16, value []byte) error {
			if kind != unix.NFTA_DATA_VALUE || len(value) != len(into) {
				return fmt.Errorf("element attribute %d: expected %d bytes, found %d", kind, len(into), len(value))
			}
			copy(into, value)
			return nil
		})
	})
	d.key, d.end = k.takeKey(key[:]), k.takeKey(end[:])
	return d, err
}

// attributes calls fn for each attribute in b, with its type and content.
func attributes(b []byte, fn func(kind uint16, data []byte) error) error {
	const flags = unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER
	for len(b) >= headerLen {
		length := int(binary.NativeEndian.Uint16(b))
		kind := binary.NativeEndian.Uint16(b[2:])
		if length < headerLen || length > len(b) {
			return fmt.Errorf("attribute length %d, buffer %d bytes", length, len(b))
		}
		if err := fn(kind&^flags, b[headerLen:length]); err != nil {
			return err
		}
		b = b[min(len(b), (length+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1)):]
	}
	return nil
}
