package tcpproxy

import (
	"encoding/binary"
	"net/netip"
)

// signature begins every header of the PROXY protocol, version 2
// (haproxy, doc/proxy-protocol.txt, section 2.2).
const signature = "\r\n\r\n\x00\r\nQUIT\n"

// The second half of each byte is the version, or the transport: TCP.
const (
	commandLocal = 0x20 // for the proxy itself
	commandProxy = 0x21 // for a client
	familyNone   = 0x00
	familyIPv4   = 0x11
	familyIPv6   = 0x21
)

// localHeader is the header of a probe: a connection without a client.
var localHeader = append([]byte(signature), commandLocal, familyNone, 0, 0)

// proxyHeader returns the header with the addresses of a client's connection.
func proxyHeader(client, local netip.AddrPort) []byte {
	b := append([]byte(signature), commandProxy)
	from, to := client.Addr().Unmap(), local.Addr().Unmap()
	if from.Is4() && to.Is4() {
		b = append(b, familyIPv4, 0, 4+4+2+2)
		b = append(append(b, from.AsSlice()...), to.AsSlice()...)
	} else {
		b = append(b, familyIPv6, 0, 16+16+2+2)
		from16, to16 := from.As16(), to.As16()
		b = append(append(b, from16[:]...), to16[:]...)
	}
	b = binary.BigEndian.AppendUint16(b, client.Port())
	return binary.BigEndian.AppendUint16(b, local.Port())
}
