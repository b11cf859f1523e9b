package wording

import (
	"strings"
	"testing"
)

// shouting are the names of a front end.
type shouting struct{}

func (shouting) Name(f Field) string              { return strings.ToUpper(string(f)) }
func (shouting) Set(f Field, value string) string { return string(f) + ": " + value }

func TestTextHasNamesOfFrontEnd(t *testing.T) {
	inner := Textf("set %s", Set(Conflict, "warn"))
	for text, want := range map[*Text][2]string{
		new(Text{}):        {"", ""},
		new(Textf("none")): {"none", "none"},
		new(inner):         {"set conflict=warn", "set conflict: warn"},
		new(Textf("%s %q: %d%%, or %[4]s; %[1]s", Gateway, "a%s", 5, inner)): {
			`gateway "a%s": 5%, or set conflict=warn; gateway`, `GATEWAY "a%s": 5%, or set conflict: warn; GATEWAY`},
	} {
		if got := [2]string{text.In(nil), text.In(shouting{})}; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestOneLine(t *testing.T) {
	for text, want := range map[string]string{
		"":                        "",
		" a b ":                   "a b",
		"first\n\tsecond\r\n":     "first; second",
		"a\tb\x1b[31mc\u0085\x00": "a b [31mc  ",
		"é 日本":                    "é 日本",
	} {
		if got := OneLine(text); got != want {
			t.Errorf("OneLine(%q): expected %q, found %q", text, want, got)
		}
	}
}
