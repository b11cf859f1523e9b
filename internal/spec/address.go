package spec

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// ParseAddress parses an address, or returns why it is none.
func ParseAddress(s string) (a netip.Addr, why string) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil && strings.Contains(s, "/"):
		return a, "expected one address, without a length"
	case err != nil && s != "" && strings.Trim(s, "0123456789.") == "":
		return a, "an IPv4 address is four numbers from 0 to 255, without leading zeros"
	case err != nil:
		return a, "expected an IPv4 or IPv6 address"
	case a.Zone() != "":
		return a, "an address has no zone: the interface is known, write " + a.WithZone("").String()
	case a.Is4In6():
		return a, "an IPv4 address within IPv6: write " + a.Unmap().String()
	}
	return a, ""
}

// ParsePrefix parses an address with or without the length of its subnet, or returns why it
// is none. Without a length it has that of the address.
func ParsePrefix(s string) (p netip.Prefix, why string) {
	address, length, given := strings.Cut(s, "/")
	a, why := ParseAddress(address)
	bits := a.BitLen()
	if given && why == "" {
		bits, why = ParseLength(length, bits)
	}
	if why != "" {
		return p, why
	}
	return netip.PrefixFrom(a, bits), ""
}

// ParseLength parses the length of a subnet, in bits of an address that has most, or returns
// why it is none. Like netip, it takes no leading zeros.
func ParseLength(s string, most int) (bits int, why string) {
	bits, err := strconv.Atoi(s)
	if err != nil || bits < 0 || bits > most || strconv.Itoa(bits) != s {
		return 0, fmt.Sprintf("the length after the slash is a number from 0 to %d", most)
	}
	return bits, ""
}

// last returns the last address of an IPv4 network, its broadcast address
// (RFC 919).
func last(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	n := binary.BigEndian.Uint32(a[:]) | uint32(1<<(32-p.Bits())-1)
	binary.BigEndian.PutUint32(a[:], n)
	return netip.AddrFrom4(a)
}

// Unusable returns the reason why no host of the physical network can have an
// address (RFC 6890; RFC 1122, 3.2.1.3); empty: none. A subnet of 31 or 32 bits has
// neither network nor broadcast address (RFC 3021). The original accepted such
// addresses and failed half-way, or never sent a packet.
func Unusable(a netip.Addr, subnet netip.Prefix) string {
	switch {
	case a.IsUnspecified():
		return "the unspecified address"
	case a.Is4() && a.As4()[0] == 0:
		return "an address of 0.0.0.0/8"
	case a.IsLoopback():
		return "a loopback address"
	case a.IsMulticast():
		return "a multicast address"
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "the broadcast address"
	case a.Is6() || subnet.Bits() >= 31 || !subnet.Contains(a):
		return ""
	case a == subnet.Masked().Addr():
		return "the network address of " + subnet.Masked().String()
	case a == last(subnet):
		return "the broadcast address of " + subnet.Masked().String()
	}
	return ""
}

// unusableSource is Unusable for a source of either family. The address of a link is not
// routed (RFC 4291, section 2.5.6), and the first address of an IPv6 subnet is that of
// every router in it (section 2.6.1; RFC 6164 excepts a length of 127).
func unusableSource(p netip.Prefix) string {
	a := p.Addr()
	if a.Is4() {
		return Unusable(a, p)
	}
	switch {
	case a.IsUnspecified():
		return "the unspecified address"
	case a.IsLoopback():
		return "the loopback address"
	case a.IsMulticast():
		return "a multicast address"
	case a.IsLinkLocalUnicast():
		return "a link-local address"
	case p.Bits() < 127 && a == p.Masked().Addr():
		return "the address of all routers of " + p.Masked().String()
	}
	return ""
}

// UnusableServer returns why no external server has an address; empty: one may have it.
func (s Sources) UnusableServer(a netip.Addr) string {
	if s.Have(a) {
		return "the reserved address"
	}
	if a.Is6() && a.IsLinkLocalUnicast() {
		return "a link-local address"
	}
	for _, s := range s {
		if why := Unusable(a, s.Prefix); why != "" {
			return why
		}
	}
	return ""
}

// FaultOfInterface returns why a name is not that of an interface which leads to a network;
// empty: it may be. It accepts the kernel's interface names (dev_valid_name in
// net/core/dev.c: 1 to 15 bytes, no slash, colon or white space) that are literal in
// a rule: for iptables, + at the end of a name is a pattern and ! a negation, and
// restore input has its own quoting. The kernel takes %d for a number of its choice
// (dev_alloc_name).
func FaultOfInterface(name string) string {
	switch {
	case name == "":
		return "it is empty"
	case len(name) > 15:
		return "it has more than 15 bytes"
	// The last two are names of sysctls (devinet_sysctl_register in net/ipv4/devinet.c).
	case name == "." || name == ".." || name == "all" || name == "default":
		return "the kernel does not allow it"
	case strings.HasPrefix(name, "-") || strings.HasPrefix(name, "!"):
		return "it begins with " + name[:1]
	}
	for _, r := range name {
		if r <= ' ' || r > '~' || strings.ContainsRune(`/:+%"'\`+"`", r) {
			return fmt.Sprintf("it contains %q", r)
		}
	}
	return ""
}

// Loopback is the kernel's name of the loopback interface (drivers/net/loopback.c).
const Loopback = "lo"

func familyName(a netip.Addr) string {
	if a.Is6() {
		return "IPv6"
	}
	return "IPv4"
}
