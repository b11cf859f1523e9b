package link

import (
	"bytes"
	"encoding/binary"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Counter is a counter of an interface, with its name in ip-link(8) or ethtool(8).
type Counter struct {
	Name  string
	Value uint64
}

// Troubles returns the counters of dropped frames and of errors of an interface that are not
// 0, since the interface exists: those of the kernel, then those of its driver, which has none
// for many kinds. k has to be of the calling thread's namespace. It needs no privilege.
func (k *Kernel) Troubles(name string) ([]Counter, error) {
	l, err := k.find(name)
	if err != nil {
		return nil, err
	}
	var all []Counter
	if s := l.Attrs().Statistics; s != nil {
		all = []Counter{
			{"rx_errors", s.RxErrors}, {"rx_dropped", s.RxDropped}, {"rx_over_errors", s.RxOverErrors}, {"rx_crc_errors", s.RxCrcErrors},
			{"rx_missed_errors", s.RxMissedErrors}, {"tx_errors", s.TxErrors}, {"tx_dropped", s.TxDropped}, {"tx_carrier_errors", s.TxCarrierErrors},
			{"collisions", s.Collisions},
		}
	}
	own, err := driverCounters(name)
	for _, c := range own {
		same := slices.ContainsFunc(all, func(other Counter) bool { return other.Name == c.Name })
		if trouble := func(part string) bool { return strings.Contains(c.Name, part) }; !same && slices.ContainsFunc(troubles, trouble) {
			all = append(all, c)
		}
	}
	return slices.DeleteFunc(all, func(c Counter) bool { return c.Value == 0 }), err
}

// troubles are parts of the names of drivers' counters, of which there is no standard.
var troubles = []string{"drop", "error", "_err", "discard", "missed", "crc", "fifo", "timeout", "nobuf", "no_buf"}

const (
	statisticsSet = 1  // ETH_SS_STATS (linux/ethtool.h)
	nameLength    = 32 // ETH_GSTRING_LEN
	// moreCounters is the room for counters that a driver adds between two calls: the kernel
	// writes as many as it has then, whatever the caller expects (net/ethtool/ioctl.c).
	moreCounters = 4096
)

// driverCounters returns all counters of an interface's driver, in the calling thread's
// namespace; none if it has none.
func driverCounters(name string) ([]Counter, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	n := counterNumber(fd, name)
	if n == 0 {
		return nil, nil
	}
	// struct ethtool_gstrings and struct ethtool_stats.
	names, values := make([]byte, 12+(n+moreCounters)*nameLength), make([]byte, 8+(n+moreCounters)*8)
	binary.NativeEndian.PutUint32(names, unix.ETHTOOL_GSTRINGS)
	binary.NativeEndian.PutUint32(names[4:], statisticsSet)
	binary.NativeEndian.PutUint32(values, unix.ETHTOOL_GSTATS)
	for _, command := range [][]byte{names, values} {
		if err := ethtool(fd, name, command); err != nil {
			return nil, err
		}
	}
	n = min(int(binary.NativeEndian.Uint32(names[8:])), int(binary.NativeEndian.Uint32(values[4:])), n+moreCounters)
	all := make([]Counter, 0, n)
	for i := range n {
		text, _, _ := bytes.Cut(names[12+i*nameLength:][:nameLength], []byte{0})
		all = append(all, Counter{strings.TrimSpace(string(text)), binary.NativeEndian.Uint64(values[8+i*8:])})
	}
	return all, nil
}

// counterNumber returns the number of the counters of an interface's driver. An error means
// that it has none.
func counterNumber(fd int, name string) int {
	set := make([]byte, 20) // struct ethtool_sset_info, with room for one number
	binary.NativeEndian.PutUint32(set, unix.ETHTOOL_GSSET_INFO)
	binary.NativeEndian.PutUint64(set[8:], 1<<statisticsSet)
	if err := ethtool(fd, name, set); err != nil || binary.NativeEndian.Uint64(set[8:]) == 0 {
		return 0
	}
	return int(binary.NativeEndian.Uint32(set[16:]))
}

// ethtool runs a command for an interface.
func ethtool(fd int, name string, command []byte) error {
	request := struct { // struct ifreq (netdevice(7))
		name    [unix.IFNAMSIZ]byte
		command unsafe.Pointer
		_       [16]byte
	}{command: unsafe.Pointer(&command[0])}
	copy(request.name[:unix.IFNAMSIZ-1], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return os.NewSyscallError("ioctl SIOCETHTOOL", errno)
	}
	return nil
}
