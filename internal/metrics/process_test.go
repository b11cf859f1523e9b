package metrics

import (
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

// ofProcess returns the values of collectProcess by the name.
func ofProcess(proc fs.FS) map[string]float64 {
	values := make(map[string]float64)
	collectProcess(func(name string, value float64, _ ...string) { values[name] = value }, proc)
	return values
}

// The metrics of the process are those of client_golang, with the same types, help and
// values.
func TestProcessAsClientGolang(t *testing.T) {
	before := ofProcess(os.DirFS("/proc"))
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{ReportErrors: true}))
	gathered, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	w, _ := serve(t, nil, func(Emit) {})
	after := ofProcess(os.DirFS("/proc"))

	page := families(t, w.Body.String())
	if len(page) != len(gathered) || len(before) != len(gathered) {
		t.Errorf("%d metrics on the page, %d collected, %d of client_golang", len(page), len(before), len(gathered))
	}
	for _, theirs := range gathered {
		name, value := theirs.GetName(), theirs.Metric[0].GetGauge().GetValue()+theirs.Metric[0].GetCounter().GetValue()
		ours := page[name]
		if ours.GetHelp() != theirs.GetHelp() || ours.GetType() != theirs.GetType() {
			t.Errorf("client_golang: %v\nours: %v", theirs, ours)
		}
		switch {
		case name == "process_resident_memory_bytes" || name == "process_virtual_memory_bytes":
			// They can shrink between two readings: within a factor they have the same unit.
			if before[name] > 2*value || before[name] < value/2 {
				t.Errorf("%s: %v before client_golang found %v", name, before[name], value)
			}
		case theirs.GetType() == dto.MetricType_COUNTER:
			if before[name] > value || value > after[name] {
				t.Errorf("%s: %v before client_golang found %v, %v after", name, before[name], value, after[name])
			}
		case name == "process_open_fds":
			// The test opens none in between; each reading has one of its own on kernels before 6.2.
			if before[name] != value {
				t.Errorf("%s: %v, client_golang found %v", name, before[name], value)
			}
		case before[name] != value:
			t.Errorf("%s: %v, client_golang found %v", name, before[name], value)
		}
	}
	// In the same order, with the same lines HELP and TYPE.
	var theirs, ours bytes.Buffer
	for _, f := range gathered {
		f.Metric[0].Counter, f.Metric[0].Gauge = &dto.Counter{Value: new(float64)}, &dto.Gauge{Value: new(float64)}
		if _, err := expfmt.MetricFamilyToText(&theirs, f); err != nil {
			t.Fatal(err)
		}
	}
	l, err := newLayout(process)
	if err != nil {
		t.Fatal(err)
	}
	s := newScrape(l)
	for _, m := range process {
		s.emit(m.Name, 0)
	}
	ours.Write(s.text())
	if diff := cmp.Diff(theirs.String(), ours.String()); diff != "" {
		t.Errorf("(- client_golang, + ours)\n%s", diff)
	}
}

// The numbers are read from the fields that proc(5) says; files that lack them leave their
// metrics out, and no others.
func TestProcess(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	proc := fstest.MapFS{
		"stat":             file("cpu  1 2 3\nctxt 5\nbtime 1700000000\nprocesses 9\n"),
		"self/stat":        file("7 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 150 75 0 0 20 0 4 0 250 4096000 12 18446744073709551615 1 2\n"),
		"self/limits":      file("Limit                     Soft Limit           Hard Limit           Units     \nMax open files            1024                 524288               files     \nMax address space         unlimited            unlimited            bytes     \n"),
		"self/net/netstat": file("TcpExt: InOctets OutOctets\nTcpExt: 1 2\nIpExt: InMcastPkts InOctets OutOctets\nIpExt: 3 4000 5000\n"),
		"self/fd/0":        file(""),
		"self/fd/1":        file(""),
	}
	all := map[string]float64{
		"process_cpu_seconds_total":            2.25,
		"process_open_fds":                     2,
		"process_max_fds":                      1024,
		"process_virtual_memory_bytes":         4096000,
		"process_virtual_memory_max_bytes":     1<<64 - 1,
		"process_resident_memory_bytes":        float64(12 * os.Getpagesize()),
		"process_start_time_seconds":           1700000002.5,
		"process_network_receive_bytes_total":  4000,
		"process_network_transmit_bytes_total": 5000,
	}
	if diff := cmp.Diff(all, ofProcess(proc)); diff != "" {
		t.Errorf("(- want, + got)\n%s", diff)
	}
	for _, test := range []struct {
		file, text string // "" removes it
		lacks      []string
	}{
		{"stat", "", []string{"start_time_seconds"}},
		{"stat", "btime\n", []string{"start_time_seconds"}},
		{"stat", "btime x\n", []string{"start_time_seconds"}},
		{"self/stat", "", []string{"cpu_seconds_total", "virtual_memory_bytes", "resident_memory_bytes", "start_time_seconds"}},
		{"self/stat", "7 (a) S 1 2", []string{"cpu_seconds_total", "virtual_memory_bytes", "resident_memory_bytes", "start_time_seconds"}},
		{"self/stat", "7 (a) S 1 2 3 4 5 6 7 8 9 10 x 75 0 0 20 0 4 0 250 4096000 12 1", []string{"cpu_seconds_total", "virtual_memory_bytes", "resident_memory_bytes", "start_time_seconds"}},
		{"self/limits", "", []string{"max_fds", "virtual_memory_max_bytes"}},
		{"self/limits", "Max address space 18446744073709551615 1 bytes\n", []string{"max_fds"}},
		{"self/net/netstat", "", []string{"network_receive_bytes_total", "network_transmit_bytes_total"}},
		{"self/net/netstat", "IpExt: InOctets\nIpExt: 1\n", []string{"network_receive_bytes_total", "network_transmit_bytes_total"}},
		{"self/net/netstat", "IpExt: InOctets OutOctets\nIpExt: 1\n", []string{"network_receive_bytes_total", "network_transmit_bytes_total"}},
		{"self/net/netstat", "IpExt: InOctets OutOctets\nIpExt: 1 x\n", []string{"network_receive_bytes_total", "network_transmit_bytes_total"}},
		{"self/net/netstat", "IpExt: InOctets OutOctets\n", []string{"network_receive_bytes_total", "network_transmit_bytes_total"}},
	} {
		t.Run(fmt.Sprintf("%s %q", test.file, test.text), func(t *testing.T) {
			broken, want := maps.Clone(proc), maps.Clone(all)
			delete(broken, test.file)
			if test.text != "" {
				broken[test.file] = file(test.text)
			}
			for _, name := range test.lacks {
				delete(want, "process_"+name)
			}
			if diff := cmp.Diff(want, ofProcess(broken)); diff != "" {
				t.Errorf("(- want, + got)\n%s", diff)
			}
		})
	}
}
