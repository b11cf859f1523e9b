package rules

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The expected lines are those of bash 5.2 with `while read dest; ... done <<< "$value"`.
func TestLines(t *testing.T) {
	for name, test := range map[string]struct {
		value string
		want  []Line
	}{
		"one line":                            {"a b", []Line{{1, "a b"}}},
		"final newline leaves an empty line":  {"a\n", []Line{{1, "a"}, {2, ""}}},
		"blanks are cut at both ends":         {" \t a  b \t ", []Line{{1, "a  b"}}},
		"other white space stays":             {"\va\r", []Line{{1, "\va\r"}}},
		"a backslash joins lines":             {"a \\\n  b\nc", []Line{{1, "a   b"}, {3, "c"}}},
		"joined blanks at the front are cut":  {"  \\\n  a", []Line{{1, "a"}}},
		"a backslash is dropped":              {`a\b\\c\#`, []Line{{1, `ab\c#`}}},
		"a protected blank stays in front":    {`\ a`, []Line{{1, " a"}}},
		"and at the end of a single word":     {`a\ `, []Line{{1, "a "}}},
		"also with blanks behind it":          {`a\   `, []Line{{1, "a "}}},
		"but not at the end of several words": {`a b\ `, []Line{{1, "a b"}}},
		"nor where several are protected":     {"a b\\ \t\\\t", []Line{{1, "a b"}}},
		"protected blanks apart":              {`\  \ `, []Line{{1, "\x01"}}},
		"a line of protected blanks":          {`\ \ `, []Line{{1, "  "}}},
		"bash loses a \\x01 before a blank":   {"a b\x01 ", []Line{{1, "a b"}}},
		"but keeps it elsewhere":              {"a\x01 b\x01\na\x01 ", []Line{{1, "a\x01 b\x01"}, {2, "a\x01"}}},
		"bytes that are not UTF-8 stay":       {"\xff \xfe", []Line{{1, "\xff \xfe"}}},
		"a line continued into nothing":       {"a\nb\\", []Line{{1, "a"}}},
		"two backslashes are one":             {"a\nb\\\\", []Line{{1, "a"}, {2, `b\`}}},
		"empty":                               {"", []Line{{1, ""}}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, Lines(test.value)); diff != "" {
				t.Errorf("Lines(%q), - want, + got:\n%s", test.value, diff)
			}
		})
	}
}

func TestUnread(t *testing.T) {
	for name, test := range map[string]struct {
		value string
		want  Line
		ok    bool
	}{
		"nothing continued":       {"a\nb", Line{}, false},
		"continued into nothing":  {"a\nb c\\", Line{2, "b c"}, true},
		"a literal backslash":     {`b\\`, Line{}, false},
		"two lines into nothing":  {"a\nb\\\nc\\", Line{2, "bc"}, true},
		"a newline after the end": {"a\\\n", Line{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok := Unread(test.value)
			if got != test.want || ok != test.ok {
				t.Errorf("Unread(%q) = %v, %v; want %v, %v", test.value, got, ok, test.want, test.ok)
			}
		})
	}
}

// Lines splits every value of up to five special characters as bash does.
func TestLinesAsBash(t *testing.T) {
	values := []string{""}
	for begin := 0; len(values[len(values)-1]) < 5; {
		end := len(values)
		for _, v := range values[begin:end] {
			for _, c := range []string{`\`, " ", "\t", "\n", "x", "\x01"} {
				values = append(values, v+c)
			}
		}
		begin = end
	}
	// A line contains no newline, so one ends the lines of a value.
	const script = `while IFS= read -r -d '' value; do
		while read line; do printf '%s\0' "$line"; done <<< "$value"
		printf '\n\0'
	done`
	bash := exec.Command("bash", "-c", script)
	bash.Env = []string{"LC_ALL=C"}
	bash.Stdin = strings.NewReader(strings.Join(values, "\x00") + "\x00")
	var stderr bytes.Buffer
	bash.Stderr = &stderr
	out, err := bash.Output()
	if err != nil {
		t.Fatalf("running bash: %v\n%s", err, &stderr)
	}
	answers := strings.Split(string(out), "\n\x00")
	if len(answers) != len(values)+1 {
		t.Fatalf("bash answered %d values of %d", len(answers)-1, len(values))
	}
	for i, v := range values {
		var got strings.Builder
		for _, line := range Lines(v) {
			got.WriteString(line.Text + "\x00")
		}
		if got.String() != answers[i] {
			t.Errorf("Lines(%q) = %q, bash: %q", v, got.String(), answers[i])
		}
	}
}
