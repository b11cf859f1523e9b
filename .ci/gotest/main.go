// Gotest runs go test with its arguments and prints a line when a package ends, in the
// order in which packages end, and the output of the tests that fail. go test itself
// prints packages in the order of their names: one that takes minutes holds back the
// results of all that follow.
//
//	go run ./.ci/gotest -timeout 30m ./...
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// silence is how long gotest prints nothing before it lists the tests that run.
const silence = 30 * time.Second

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run runs go test and returns its exit code.
func run(args []string, stdout, stderr io.Writer) int {
	fmt.Fprintf(stdout, "go test %s\n", strings.Join(args, " "))
	// A terminal sends these to go test, too, which ends after its tests. Ignored signals
	// would also be ignored in child processes.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGQUIT)
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = stderr
	events, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintf(stderr, "gotest: starting go test: %v\n", err)
		return 1
	}
	begin := time.Now()
	r := report{out: stdout, tests: map[test]*progress{}}
	lines := make(chan []byte)
	go func() {
		defer close(lines)
		s := bufio.NewScanner(events)
		s.Buffer(nil, 64<<20)
		for s.Scan() {
			lines <- slices.Clone(s.Bytes())
		}
	}()
	quiet := time.NewTimer(silence)
	for open := true; open; {
		var line []byte
		select {
		case line, open = <-lines:
			if !open || !r.add(line) {
				continue
			}
		case <-quiet.C:
			fmt.Fprintf(stdout, "running for %s: %s\n", time.Since(begin).Round(time.Second), r.running())
		}
		quiet.Reset(silence)
	}
	err = cmd.Wait()
	verdict := "ok"
	if err != nil {
		verdict = "FAIL"
	}
	fmt.Fprintf(stdout, "%s: %d packages, %d tests passed, %d failed, in %s\n", verdict, r.packages, r.passed, r.failed, time.Since(begin).Round(time.Second))
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return exit.ExitCode()
	} else if err != nil {
		fmt.Fprintf(stderr, "gotest: running go test: %v\n", err)
		return 1
	}
	return 0
}

// An event is a line of go test -json (go doc test2json).
type event struct {
	Action, Package, Test, Output string
	ImportPath                    string // of build-output and build-fail
	Elapsed                       float64
}

// A test is one test of a package; Name is empty for the package itself.
type test struct{ Package, Name string }

// progress is a test that has started and not ended.
type progress struct {
	started int // position in the order of starts
	output  strings.Builder
}

// A report prints events as lines for people.
type report struct {
	out                               io.Writer
	tests                             map[test]*progress
	started, packages, passed, failed int
}

// add adds a line of go test -json and reports whether it printed something.
func (r *report) add(line []byte) (printed bool) {
	var e event
	if err := json.Unmarshal(line, &e); err != nil {
		fmt.Fprintf(r.out, "%s\n", line) // not from a test: go's own message
		return true
	}
	id := test{e.Package, e.Test}
	p := r.tests[id]
	if p == nil {
		r.started++
		p = &progress{started: r.started}
		r.tests[id] = p
	}
	switch e.Action {
	case "build-output":
		delete(r.tests, id)
		fmt.Fprint(r.out, e.Output)
		return true
	case "build-fail":
		delete(r.tests, id)
	case "output":
		p.output.WriteString(e.Output)
	case "pass", "skip", "fail":
		delete(r.tests, id)
		if e.Test == "" {
			r.ended(e, p.output.String())
			return true
		}
		return r.endedTest(e, p.output.String())
	}
	return false
}

// endedTest prints the output of a test unless it passed: a skip is as loud as a
// failure.
func (r *report) endedTest(e event, output string) (printed bool) {
	switch {
	case e.Action == "fail":
		r.failed++
	case e.Action == "pass":
		r.passed++
		return false
	}
	fmt.Fprintf(r.out, "%s: %s %s\n", strings.ToUpper(e.Action), e.Package, e.Test)
	for line := range strings.Lines(output) {
		if line := strings.TrimLeft(line, " "); !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- FAIL: ") {
			fmt.Fprintf(r.out, "    %s", line)
		}
	}
	return true
}

// ended prints a package that has ended. If it failed, what its unfinished tests
// printed comes first: a panic and a time limit leave tests without an end.
func (r *report) ended(e event, output string) {
	r.packages++
	verdict := map[string]string{"pass": "ok", "skip": "none", "fail": "FAIL"}[e.Action]
	if e.Action == "fail" {
		for _, id := range r.unfinished() {
			if id.Package == e.Package {
				fmt.Fprintf(r.out, "FAIL, unfinished: %s %s\n%s", id.Package, id.Name, &r.tests[id].output)
				delete(r.tests, id)
				r.failed++
			}
		}
		fmt.Fprint(r.out, strings.TrimSuffix(output, "FAIL\n"))
	}
	cached := ""
	if strings.Contains(output, "\t(cached)") {
		cached = " (cached)"
	}
	fmt.Fprintf(r.out, "%-4s %7.1f s  %s%s\n", verdict, e.Elapsed, e.Package, cached)
}

// running lists the tests that run, without those that only wait for a subtest.
func (r *report) running() string {
	var names []string
	all := r.unfinished()
	for _, id := range all {
		parent := slices.ContainsFunc(all, func(other test) bool {
			return other.Package == id.Package && other.Name != id.Name && (id.Name == "" || strings.HasPrefix(other.Name, id.Name+"/"))
		})
		if !parent {
			names = append(names, strings.TrimSpace(id.Package+" "+id.Name))
		}
	}
	if len(names) == 0 {
		return "compiling"
	}
	return strings.Join(names, ", ")
}

// unfinished lists the tests without an end in the order of their starts.
func (r *report) unfinished() []test {
	var all []test
	for id := range r.tests {
		all = append(all, id)
	}
	slices.SortFunc(all, func(a, b test) int { return r.tests[a].started - r.tests[b].started })
	return all
}
