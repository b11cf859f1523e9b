package ci

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Each line of the list of .ci/kernels chooses a test of its package, and its feature has no
// other line: it is the name of a log.
func TestKernelsList(t *testing.T) {
	list, err := os.ReadFile("../testdata/kernels")
	if err != nil {
		t.Fatal(err)
	}
	features := map[string]bool{}
	for line := range strings.Lines(string(list)) {
		text, _, _ := strings.Cut(line, "#")
		fields := strings.Fields(text)
		if len(fields) == 0 || len(fields) == 1 && fields[0] == "wait" {
			continue
		}
		if len(fields) < 3 {
			t.Errorf("%q: expected a package, a pattern and a feature", line)
			continue
		}
		feature := strings.Join(fields[2:], " ")
		if features[feature] {
			t.Errorf("two lines with the feature %q", feature)
		}
		features[feature] = true
		pattern, _, _ := strings.Cut(fields[1], "/") // of tests, without their subtests
		re, err := regexp.Compile(pattern)
		if err != nil {
			t.Errorf("%q: %v", line, err)
			continue
		}
		files, err := filepath.Glob(filepath.Join("..", fields[0], "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9_]*)\(`).FindAllSubmatch(text, -1) {
				found = found || re.Match(m[1])
			}
		}
		if !found {
			t.Errorf("%q: no such test", line)
		}
	}
	if len(features) == 0 {
		t.Error("the list is empty")
	}
}
