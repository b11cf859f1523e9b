package config

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// A list is a destination list, from a variable or from a file named by another
// variable.
type list struct {
	variable    string           // name of the variable; with _FILE, of the file's variable
	value, file string           // values of both variables
	unset       rules.ParseError // the error if both are empty, or the file
}

// from returns the variable that provides the list.
func (l list) from() string {
	if l.file != "" {
		return l.variable + "_FILE"
	}
	return l.variable
}

// place returns the location of a line.
func (l list) place(n int) string {
	if l.file != "" {
		return fmt.Sprintf("%s:%d", l.file, n)
	}
	return fmt.Sprintf("%s line %d", l.variable, n)
}

// read parses the list by a grammar, which returns a *rules.ParseError; an error
// without a line is about the whole list. The warning, if any, is about a valid
// list with probably unintended content.
func (l list) read(readFile func(name string) ([]byte, error), grammar func(list string) error) (warning string, fault *Error) {
	text := l.value
	if l.file != "" {
		if text != "" {
			return "", &Error{l.from(), fmt.Sprintf("%s and %s are both set: unset one of them", l.variable, l.from()), ""}
		}
		data, err := readFile(l.file)
		if err != nil {
			return "", &Error{l.from(), fmt.Sprintf("%s %s cannot be read: %v", l.from(), quote(l.file), cause(err)), fileHint(l.file, err)}
		}
		text = string(data)
	}
	var err error = &l.unset
	if text != "" {
		err = grammar(text)
	}
	if parse, ok := errors.AsType[*rules.ParseError](err); ok {
		return "", &Error{l.from(), parse.Sentence, l.hint(text, parse)}
	} else if err != nil {
		return "", &Error{l.from(), err.Error(), ""}
	}
	if n := joined(text); n > 0 {
		return fmt.Sprintf("%s contains the two characters \\n, which are no line end: the rest belongs to the same line", l.place(n)), nil
	}
	if line, ok := rules.Unread(text); ok && line.Text != "" && line.Text[0] != '#' {
		warning = fmt.Sprintf("%s: %q is ignored, since it ends with a backslash: remove the backslash", l.place(line.Number), shorten(line.Text))
	}
	return warning, nil
}

// hint returns the location of the error, and advice.
func (l list) hint(text string, fault *rules.ParseError) string {
	where, what := "", fault.Hint
	if fault.Line.Number > 0 {
		where = fmt.Sprintf("%s: %q", l.place(fault.Line.Number), shorten(fault.Line.Text))
	}
	if text == "" && l.file != "" {
		what = fmt.Sprintf("the file %q is empty", l.file)
	}
	if strings.ContainsAny(fault.Line.Text, `"'`) && !strings.Contains(fault.Line.Text, "#") {
		what = "the quotation marks are part of the line: remove them"
	}
	if n := joined(text); n > 0 && n == fault.Line.Number {
		what = `the two characters \n are no line end: write each line on a line of its own (in YAML, "|" keeps line ends; in a shell, $'80 tcp IP\n81 tcp IP' has one)`
	}
	switch {
	case what == "":
		return where
	case where == "":
		return "hint: " + what
	}
	return where + "\nhint: " + what
}

// isEmpty reports whether a list has only comments and blank lines.
func isEmpty(text string) bool {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			return false
		}
	}
	return true
}

// joined returns the number of the first line, other than a comment, that contains a
// backslash and n, which were probably meant as a line end; 0: none. In a list of one
// line a comment counts, too: it hides the others.
func joined(text string) int {
	if !strings.Contains(text, `\n`) {
		return 0
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		comment := strings.HasPrefix(strings.TrimLeft(line, " \t"), "#") && strings.Contains(strings.TrimSpace(text), "\n")
		if strings.Contains(line, `\n`) && !comment {
			return n
		}
	}
	return 0
}

// fileHint returns the remedy for a file that cannot be read.
func fileHint(name string, err error) string {
	switch m := mistake(name); {
	case m != "":
		return remedy("%s", m)
	case errors.Is(err, os.ErrPermission):
		return remedy("the container's user may not read the file: set defaultMode of the volume, or runAsUser or fsGroup of the pod")
	}
	return remedy("set it to a file inside the container, such as a key of a mounted ConfigMap")
}

// cause returns an error without the file name, which the message has already.
func cause(err error) error {
	if path, ok := errors.AsType[*os.PathError](err); ok {
		return path.Err
	}
	return err
}

// shorten limits a line to a length suitable for the log. The original's sentence
// has the whole line.
func shorten(s string) string {
	const most = 120
	if len(s) <= most {
		return s
	}
	return s[:most] + "..."
}
