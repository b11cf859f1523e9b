package config

import (
	"errors"
	"fmt"
	"os"

	"github.com/egress-router/egress-router/rules"
)

// A list is a destination list, from a variable or from a file named by another
// variable.
type list struct {
	variable    string // name of the variable; with _FILE, of the file's variable
	value, file string // values of both variables
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
			return "", &Error{l.from(), fmt.Sprintf("%s %q cannot be read: %v", l.from(), l.file, cause(err)),
				"hint: set it to a file inside the container, such as a key of a mounted ConfigMap"}
		}
		text = string(data)
	}
	err := grammar(text)
	if parse, ok := errors.AsType[*rules.ParseError](err); ok {
		return "", &Error{l.from(), parse.Sentence, l.hint(text, parse)}
	} else if err != nil {
		return "", &Error{l.from(), err.Error(), ""}
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
	switch {
	case what == "":
		return where
	case where == "":
		return "hint: " + what
	}
	return where + "\nhint: " + what
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
