package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// BenchmarkPlugin measures calls of the program that make plugin has built, with their start:
// ADD of 1,000 destinations takes at most 90 ms on an idle machine, of which it waits 50 ms at
// most for an answer to its conflict probe.
func BenchmarkPlugin(b *testing.B) {
	const program = "../../bin/egress-router-cni"
	if _, err := os.Stat(program); err != nil {
		b.Fatalf("run make plugin first: %v", err)
	}
	for _, destinations := range []int{3, 1000} {
		b.Run(fmt.Sprintf("%d-destinations", destinations), func(b *testing.B) {
			took, log := make(map[string]time.Duration), b.TempDir()+"/log"
			for b.Loop() {
				b.StopTimer()
				l, err := lab.New(lab.Options{NoMacvlan: true})
				if err != nil {
					b.Fatal(err)
				}
				conf := map[string]any{"cniVersion": "1.0.0", "type": "egress-router", "name": "bench", "log_file": log, "log_level": "debug", "ip": map[string]any{
					"addresses": []string{"192.168.12.99/24"}, "gateway": "192.168.12.1", "destinations": lines(destinations)}}
				b.StartTimer()
				for _, verb := range []string{"ADD", "CHECK", "DEL"} {
					begin := time.Now()
					result := call(b, l, program, verb, conf)
					took[verb] += time.Since(begin)
					if verb == "ADD" {
						conf["prevResult"] = json.RawMessage(result)
					}
				}
				b.StopTimer()
				l.Close()
				b.StartTimer()
			}
			for verb, t := range took {
				b.ReportMetric(float64(t.Microseconds())/1000/float64(b.N), "ms/"+verb)
			}
		})
	}
}

// lines returns a list of n destinations.
func lines(n int) []string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf("%d TCP 203.0.113.26 443", 10001+i))
	}
	return all
}

// call calls the plugin on the node of a lab, and returns its result.
func call(b *testing.B, l *lab.Lab, program, verb string, conf map[string]any) []byte {
	b.Helper()
	text, err := json.Marshal(conf)
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=c1", fmt.Sprintf("CNI_NETNS=/proc/%d/fd/%d", os.Getpid(), l.Router.Fd()), "CNI_IFNAME=net1", "CNI_PATH=/opt/cni/bin", "TMPDIR=" + os.TempDir()}
	var stdout bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(text), &stdout, os.Stderr
	if err := l.Run(l.Node, cmd); err != nil {
		b.Fatalf("%s: %v\n%s", verb, err, &stdout)
	}
	return stdout.Bytes()
}
