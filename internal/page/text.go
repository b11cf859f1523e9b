package page

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Markup is HTML. A constant of a program's text is one, a text that was made at run
// time is not: Go converts only untyped constants.
type markup string

// A writer collects HTML.
type writer struct{ bytes.Buffer }

// put writes markup with a text, or other markup, for each %s. Texts are escaped for
// elements and for attributes in double quotes.
func (w *writer) put(format markup, values ...any) {
	escaped := make([]any, len(values))
	for i, v := range values {
		if m, ok := v.(markup); ok {
			escaped[i] = string(m)
		} else {
			escaped[i] = escape(fmt.Sprint(v))
		}
	}
	fmt.Fprintf(w, string(format), escaped...)
}

// special are the characters that end a text, or begin a reference. The package html would
// add its table of all references, 100 KB.
var special = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&#34;", "'", "&#39;")

// escape escapes a text. Control characters, and those that change the direction of the
// text after them, are replaced: a name or an error of the network could look like
// another one.
func escape(text string) string {
	return special.Replace(strings.Map(func(r rune) rune {
		if r == utf8.RuneError || unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) {
			return utf8.RuneError
		}
		return r
	}, text))
}

// Count returns a number with a comma before every three digits.
func Count[N int | int64 | uint64](n N) string {
	digits := strconv.FormatInt(int64(n), 10) //nolint:gosec // counters are far below the limit
	var b strings.Builder
	for i, c := range []byte(digits) {
		if i > 0 && (len(digits)-i)%3 == 0 && digits[i-1] != '-' {
			b.WriteByte(',')
		}
		b.WriteByte(c)
	}
	return b.String()
}

// Bytes returns a number of bytes with a unit of the powers of 1000 and three digits.
func Bytes(n float64) string {
	unit := 0
	units := [...]string{"B", "kB", "MB", "GB", "TB", "PB", "EB"}
	for ; n >= 999.5 && unit < len(units)-1; unit++ {
		n /= 1000
	}
	decimals := 0
	if unit > 0 && n < 99.95 {
		decimals = 1
	}
	return strconv.FormatFloat(n, 'f', decimals, 64) + " " + units[unit]
}
