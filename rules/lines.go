package rules

import "strings"

// A Line is one logical line of a destination list, as the shell's read passes it
// to the original router.
type Line struct {
	Number int    // number of its first physical line in the value, from 1
	Text   string // joined, unescaped, blanks removed at both ends
}

// Lines splits a destination list as the original does, with
//
//	while read dest; do ...; done <<< "$LIST"
//
// that is, by POSIX read without -r (IEEE Std 1003.1, XCU read): a backslash
// before a newline joins two lines, any other backslash is dropped and takes
// the special meaning from the character after it, and blanks (space, tab) are
// removed at both ends of a line, by bash's own rule; see cut.
//
// The here-string adds one newline, so that a value with an unprotected backslash
// at its end continues into nothing: read meets the end of the input, the loop
// ends, and the original ignores that line. Lines leaves it out too; see Unread.
func Lines(value string) []Line {
	lines, _ := split(value)
	return lines
}

// isSkipped reports whether the grammar skips the line: blank lines and comments.
func (l Line) isSkipped() bool { return isBlank(l.Text) || l.Text[0] == '#' }

// Unread returns the last line of a value that ends with a backslash. Neither the
// original nor Parse reads it, which its author hardly intended.
func Unread(value string) (Line, bool) {
	if !strings.HasSuffix(value, `\`) {
		return Line{}, false
	}
	_, last := split(value)
	return last, last.Number > 0
}

// split returns the lines of value and, if value ends in the middle of a
// continued line, that unfinished line.
func split(value string) (lines []Line, unfinished Line) {
	value += "\n"
	lines = make([]Line, 0, strings.Count(value, "\n"))
	for number := 1; value != ""; {
		text, used, joined, ended := logicalLine(value)
		if !ended {
			return lines, Line{Number: number, Text: text}
		}
		lines = append(lines, Line{Number: number, Text: text})
		number += 1 + joined
		value = value[used:]
	}
	return lines, Line{}
}

// logicalLine reads one line from s and returns it with its length in bytes, the
// number of newlines in it that a backslash removed, and whether it ends with a
// newline.
func logicalLine(s string) (text string, used, joined int, ended bool) {
	end := strings.IndexByte(s, '\n')
	if end >= 0 && !strings.ContainsAny(s[:end], "\\\x01") {
		return strings.Trim(s[:end], " \t"), end + 1, 0, true
	}
	var chars []byte
	var protected []bool
	for used < len(s) && !ended {
		c := s[used]
		used++
		switch {
		case c == '\n':
			ended = true
		case c != '\\':
			chars, protected = append(chars, c), append(protected, false)
		case used < len(s):
			if s[used] == '\n' {
				joined++
			} else {
				chars, protected = append(chars, s[used]), append(protected, true)
			}
			used++
		}
	}
	return cut(chars, protected), used, joined, ended
}

// cut removes the blanks at both ends of a line as bash (4.2 to 5.2) does for
// a read into one variable: at the front the unprotected blanks; at the end also
// only those if the line is a single word, otherwise all.
func cut(chars []byte, protected []bool) string {
	isBlank := func(i int) bool { return chars[i] == ' ' || chars[i] == '\t' }
	divides := func(i int) bool { return isBlank(i) && !protected[i] }
	first, n := 0, len(chars)
	for first < n && divides(first) {
		first++
	}
	word := first
	for word < n && !divides(word) {
		word++
	}
	rest := word
	for rest < n && divides(rest) {
		rest++
	}
	if rest == n {
		return string(chars[first:word])
	}
	last := n
	for last > first && isBlank(last-1) {
		last--
	}
	// bash marks protected characters with \x01. It takes a \x01 before a blank for
	// such a mark, except as the first character of the line.
	if last < n && last-1 > first && !protected[last] && chars[last-1] == '\x01' {
		last--
	}
	if last == first {
		// The line has only blanks, some of them protected: bash leaves the mark of
		// the first.
		return "\x01"
	}
	return string(chars[first:last])
}
