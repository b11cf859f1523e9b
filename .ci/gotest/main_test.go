package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestReport(t *testing.T) {
	const events = `{"Action":"start","Package":"a"}
{"Action":"start","Package":"b"}
{"Action":"run","Package":"a","Test":"TestGood"}
{"Action":"output","Package":"a","Test":"TestGood","Output":"=== RUN   TestGood\n"}
{"Action":"run","Package":"b","Test":"TestBad"}
{"Action":"output","Package":"b","Test":"TestBad","Output":"=== RUN   TestBad\n"}
{"Action":"run","Package":"b","Test":"TestBad/case"}
{"Action":"output","Package":"b","Test":"TestBad/case","Output":"    bad_test.go:7: got 1, want 2\n"}
{"Action":"output","Package":"a","Test":"TestGood","Output":"    good_test.go:3: noise\n"}
? 1
{"Action":"output","Package":"b","Test":"TestBad/case","Output":"    --- FAIL: TestBad/case (0.00s)\n"}
{"Action":"fail","Package":"b","Test":"TestBad/case","Elapsed":0}
{"Action":"output","Package":"b","Test":"TestBad","Output":"--- FAIL: TestBad (0.01s)\n"}
{"Action":"fail","Package":"b","Test":"TestBad","Elapsed":0.01}
{"Action":"output","Package":"b","Output":"FAIL\n"}
{"Action":"fail","Package":"b","Elapsed":1.25}
{"Action":"pass","Package":"a","Test":"TestGood","Elapsed":0}
{"Action":"skip","Package":"a","Test":"TestLeftOut","Elapsed":0}
{"Action":"output","Package":"a","Output":"PASS\n"}
{"Action":"pass","Package":"a","Elapsed":2}
{"ImportPath":"c","Action":"build-output","Output":"c.go:1: no\n"}
{"ImportPath":"c","Action":"build-fail"}
{"Action":"run","Package":"d","Test":"TestHangs"}
{"Action":"output","Package":"d","Test":"TestHangs","Output":"panic: test timed out\n"}
{"Action":"fail","Package":"d","Elapsed":3}
{"Action":"output","Package":"e","Output":"ok  \te\t(cached)\n"}
{"Action":"pass","Package":"e","Elapsed":0}`
	const want = `? 1: a TestGood, b TestBad/case
FAIL: b TestBad/case
    bad_test.go:7: got 1, want 2
FAIL: b TestBad
FAIL     1.2 s  b
SKIP: a TestLeftOut
ok       2.0 s  a
c.go:1: no
FAIL, unfinished: d TestHangs
panic: test timed out
FAIL     3.0 s  d
ok       0.0 s  e (cached)
`
	var got strings.Builder
	r := report{out: &got, tests: map[test]*progress{}}
	for line := range strings.Lines(events) {
		if line == "? 1\n" {
			got.WriteString("? 1: " + r.running() + "\n")
			continue
		}
		r.add([]byte(strings.TrimSuffix(line, "\n")))
	}
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
	if r.packages != 4 || r.passed != 1 || r.failed != 3 {
		t.Errorf("%d packages, %d passed, %d failed, want 4, 1 and 3", r.packages, r.passed, r.failed)
	}
}

func TestExitCode(t *testing.T) {
	for _, test := range []struct {
		args []string
		want int
		text string
	}{
		{[]string{"-run", "^TestReport$", "."}, 0, "ok: 1 packages, 1 tests passed, 0 failed, in "},
		{[]string{"./nowhere"}, 1, "directory not found"},
		{[]string{"-run", "^TestReport$", "-no-such-flag", "."}, 1, "flag provided but not defined"},
	} {
		var out strings.Builder
		if got := run(test.args, &out, &out); got != test.want || !strings.Contains(out.String(), test.text) {
			t.Errorf("run(%q) = %d, want %d; output, want %q in it:\n%s", test.args, got, test.want, test.text, &out)
		}
	}
}
