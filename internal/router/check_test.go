package router_test

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

const nothingMissing = "nothing is missing"

// missingSteps runs plan --kernel, which changes nothing, and returns its output.
func missingSteps(p *labtest.Pod) string {
	p.Helper()
	return missingStepsOf(p, p.State())
}

// missingStepsOf is missingSteps in a known state.
func missingStepsOf(p *labtest.Pod, before string) string {
	p.Helper()
	r := p.Exec("egress-router", "plan", "--kernel")
	if r.Code != 0 || r.Stderr != "" {
		p.Fatalf("plan --kernel: exit code %d, stderr:\n%s", r.Code, r.Stderr)
	}
	p.WantState(before)
	return r.Stdout
}

// networkSteps returns the changes of the network in a plan, without the numbers, with
// each sysctl as a step.
func networkSteps(plan string) []string {
	var steps []string
	for line := range strings.Lines(plan) {
		line = strings.TrimSpace(line)
		if name, value, is := strings.Cut(line, " = "); is && strings.HasPrefix(name, "net/") {
			steps = append(steps, "set "+name+" = "+value)
		}
		_, step, numbered := strings.Cut(line, ". ")
		verb, _, _ := strings.Cut(step, " ")
		if numbered && slices.Contains([]string{"set", "add", "replace", "delete", "remove"}, verb) && step != "set sysctls:" && !strings.Contains(step, "tracked connections") {
			steps = append(steps, step)
		}
	}
	return steps
}

var loggedStep = regexp.MustCompile(`msg="network changed" step=("(?:[^"\\]|\\.)*")`)

// loggedSteps returns the changes of the network in the log of a run.
func loggedSteps(t *testing.T, log string) []string {
	t.Helper()
	var steps []string
	for _, m := range loggedStep.FindAllStringSubmatch(log, -1) {
		step, err := strconv.Unquote(m[1])
		if err != nil {
			t.Fatal(err)
		}
		if settings, is := strings.CutPrefix(step, "set net/"); is {
			for s := range strings.SplitSeq(settings, ", net/") {
				steps = append(steps, "set net/"+s)
			}
			continue
		}
		steps = append(steps, step)
	}
	return steps
}

// plan --kernel prints what a run then does, in its order, and nothing afterwards.
func TestPlanIsWhatRunDoes(t *testing.T) {
	t.Parallel()
	labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
		text := missingSteps(p)
		for _, want := range []string{"load the rules, because ", "probe for another host with 192.168.12.99, and log it", "announce 192.168.12.99 by gratuitous ARP", "request the gateway 192.168.12.1 by ARP", "backend    "} {
			if !strings.Contains(text, want) || strings.Contains(text, "backend    auto") {
				p.Errorf("the plan lacks %q, or has no backend:\n%s", want, text)
			}
		}
		planned := networkSteps(text)
		if len(planned) < 10 {
			p.Errorf("%d steps: %q", len(planned), planned)
		}
		if diff := cmp.Diff(planned, loggedSteps(p.T, p.OK().Stderr)); diff != "" {
			p.Errorf("- planned, + done:\n%s", diff)
		}
		if text := missingSteps(p); !strings.Contains(text, nothingMissing) {
			p.Errorf("after the run:\n%s", text)
		}
	})
}

// plan --kernel prints that a run would doubt the gateway, and refuse it without an answer.
func TestPlanDoubtsGateway(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_GATEWAY"] = lab.NodeAddr.String()
	if text := missingSteps(p); !strings.Contains(text, ". ask for the gateway on the physical network: gateway 10.128.0.1: expected the router of the physical network, found the cluster side's gateway\n") {
		t.Errorf("plan:\n%s", text)
	}
}

// plan --kernel prints the creation of the egress interface, and creates none.
func TestPlanCreatesNoMacvlan(t *testing.T) {
	t.Parallel()
	p := labtest.NewWithoutMacvlan(t)
	pod, host := p.Inventory(p.Lab.Router), p.Inventory(p.Lab.Node)
	r := p.Exec("egress-router", "plan", "--kernel")
	planned := networkSteps(r.Stdout)
	if r.Code != 0 || r.Stderr != "" || !strings.Contains(r.Stdout, " 1. create macvlan0, a macvlan of the NIC of the host's IPv4 default route in mode private, with its MTU\n") {
		t.Errorf("exit code %d, stderr %q, stdout:\n%s", r.Code, r.Stderr, r.Stdout)
	}
	p.WantInventory(p.Lab.Router, "pod", pod)
	p.WantInventory(p.Lab.Node, "host", host)
	done := loggedSteps(t, p.OK().Stderr)
	for _, step := range planned {
		if !slices.Contains(done, step) {
			t.Errorf("step %q was not taken, but %q", step, done)
		}
	}
	if text := missingSteps(p); !strings.Contains(text, nothingMissing) {
		t.Errorf("after the run:\n%s", text)
	}
}
