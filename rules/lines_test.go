package rules

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What bash 5.2 makes of each value with `while read dest; ... done <<< "$value"`.
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
				t.Errorf("Lines(%q), - wanted, + got:\n%s", test.value, diff)
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
