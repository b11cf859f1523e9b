package metrics

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
)

// process are the metrics of the process, with the names and help of Prometheus's client
// libraries. Those that cannot be read are left out.
var process = []Metric{
	{"process_cpu_seconds_total", Counter, nil, "Total user and system CPU time spent in seconds."},
	{"process_open_fds", Gauge, nil, "Number of open file descriptors."},
	{"process_max_fds", Gauge, nil, "Maximum number of open file descriptors."},
	{"process_virtual_memory_bytes", Gauge, nil, "Virtual memory size in bytes."},
	{"process_virtual_memory_max_bytes", Gauge, nil, "Maximum amount of virtual memory available in bytes."},
	{"process_resident_memory_bytes", Gauge, nil, "Resident memory size in bytes."},
	{"process_start_time_seconds", Gauge, nil, "Start time of the process since unix epoch in seconds."},
	{"process_network_receive_bytes_total", Counter, nil, "Number of bytes received by the process over the network."},
	{"process_network_transmit_bytes_total", Counter, nil, "Number of bytes sent by the process over the network."},
}

// ticks is USER_HZ, the unit in which the kernel reports times: clock ticks in a second,
// 100 on all architectures that Go supports (time(7)).
const ticks = 100

// collectProcess exports the metrics of the process of proc/self, from a file system as
// proc(5).
func collectProcess(emit Emit, proc fs.FS) {
	if s, err := readStat(proc); err == nil {
		emit("process_cpu_seconds_total", float64(s.user+s.system)/ticks)
		emit("process_virtual_memory_bytes", float64(s.virtual))
		emit("process_resident_memory_bytes", float64(s.resident)*float64(os.Getpagesize()))
		if boot, err := readValue(proc, "stat", "btime"); err == nil {
			emit("process_start_time_seconds", float64(boot)+float64(s.start)/ticks)
		}
	}
	if n, err := openFiles(proc); err == nil {
		emit("process_open_fds", float64(n))
	}
	for line, name := range map[string]string{"Max open files": "process_max_fds", "Max address space": "process_virtual_memory_max_bytes"} {
		if n, err := readValue(proc, "self/limits", line); err == nil {
			emit(name, float64(n))
		}
	}
	if in, out, err := octets(proc); err == nil {
		emit("process_network_receive_bytes_total", float64(in))
		emit("process_network_transmit_bytes_total", float64(out))
	}
}

// A stat is a part of /proc/self/stat.
type stat struct {
	user, system uint64 // ticks
	start        uint64 // ticks since the kernel started
	virtual      uint64 // bytes
	resident     uint64 // pages
}

// readStat reads /proc/self/stat. The second field is the name of the program in
// parentheses, which can contain spaces and parentheses.
func readStat(proc fs.FS) (stat, error) {
	text, err := fs.ReadFile(proc, "self/stat")
	if err != nil {
		return stat{}, err
	}
	const after = 2 // fields, up to the name
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	var s stat
	for _, field := range []struct {
		number int // of proc_pid_stat(5)
		to     *uint64
	}{{14, &s.user}, {15, &s.system}, {22, &s.start}, {23, &s.virtual}, {24, &s.resident}} {
		i := field.number - after - 1
		if i >= len(fields) {
			return stat{}, fmt.Errorf("reading /proc/self/stat: expected %d fields, found %d", field.number, len(fields)+after)
		}
		if *field.to, err = strconv.ParseUint(fields[i], 10, 64); err != nil {
			return stat{}, fmt.Errorf("reading field %d of /proc/self/stat: %w", field.number, err)
		}
	}
	return s, nil
}

// readValue returns the number behind a name at the beginning of a line. The word
// unlimited is the largest number, as the kernel has it.
func readValue(proc fs.FS, file, name string) (uint64, error) {
	text, err := fs.ReadFile(proc, file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		rest, found := strings.CutPrefix(line, name+" ")
		if !found {
			continue
		}
		value, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
		if value == "unlimited" {
			return ^uint64(0), nil
		}
		return strconv.ParseUint(value, 10, 64)
	}
	return 0, fmt.Errorf("reading /proc/%s: expected a line %q, found none", file, name)
}

// openFiles returns the number of open file descriptors: the size of the directory from
// Linux 6.2 on (commit f1f1f2569901), otherwise that of its entries, with the one that
// reads them.
func openFiles(proc fs.FS) (int64, error) {
	info, err := fs.Stat(proc, "self/fd")
	if err != nil {
		return 0, err
	}
	if info.Size() > 0 {
		return info.Size(), nil
	}
	entries, err := fs.ReadDir(proc, "self/fd")
	return int64(len(entries)), err
}

// octets returns the bytes of the IPv4 packets received and sent in the network namespace
// of the process: InOctets and OutOctets of the group IpExt, whose first line has the
// names, the second the numbers.
func octets(proc fs.FS) (in, out uint64, err error) {
	text, err := fs.ReadFile(proc, "self/net/netstat")
	if err != nil {
		return 0, 0, err
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0 || fields[0] != "IpExt:":
		case names == nil:
			names = fields
		default:
			for name, to := range map[string]*uint64{"InOctets": &in, "OutOctets": &out} {
				i := slices.Index(names, name)
				if i < 0 || i >= len(fields) {
					return 0, 0, fmt.Errorf("reading /proc/self/net/netstat: IpExt lacks %s", name)
				}
				if *to, err = strconv.ParseUint(fields[i], 10, 64); err != nil {
					return 0, 0, fmt.Errorf("reading %s of /proc/self/net/netstat: %w", name, err)
				}
			}
			return in, out, nil
		}
	}
	return 0, 0, errors.New("reading /proc/self/net/netstat: expected a group IpExt, found none")
}
