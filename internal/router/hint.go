package router

import (
	"errors"

	"github.com/egress-router/egress-router/internal/wording"
)

// Hint returns the first hint in an error and the errors that it wraps, depth first, with
// the names of a front end; empty if there is none. That of a failed rollback counts before
// all others: it is about the pod as it is now, and they are about the reason.
func Hint(err error, names wording.Names) string {
	if undo, failed := errors.AsType[*UndoError](err); failed {
		return undo.Hint(names)
	}
	return firstHint(err, names)
}

// firstHint returns the first hint. An error may have the method Hint and no hint for its case:
// errors.As would stop there.
func firstHint(err error, names wording.Names) string {
	if h, ok := err.(interface{ Hint(wording.Names) string }); ok && h.Hint(names) != "" {
		return h.Hint(names)
	}
	switch wrapper := any(err).(type) {
	case interface{ Unwrap() error }:
		if wrapped := wrapper.Unwrap(); wrapped != nil {
			return firstHint(wrapped, names)
		}
	case interface{ Unwrap() []error }:
		for _, wrapped := range wrapper.Unwrap() {
			if h := firstHint(wrapped, names); h != "" {
				return h
			}
		}
	}
	return ""
}

// An advisedError is an error with a hint.
type advisedError struct {
	error
	hint wording.Text
}

// Unwrap returns the error without the hint.
func (e *advisedError) Unwrap() error { return e.error }

// Hint returns the hint.
func (e *advisedError) Hint(names wording.Names) string { return e.hint.In(names) }
