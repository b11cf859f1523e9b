package config

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// remedy returns a hint with its prefix.
func remedy(format string, args ...any) string { return "hint: " + fmt.Sprintf(format, args...) }

// choose returns an error unless value is one of the options.
func choose(variable, value string, options ...string) *Error {
	if slices.Contains(options, value) {
		return nil
	}
	last := len(options) - 1
	return &Error{variable, fmt.Sprintf("%s %s is neither %s nor %s", variable, quote(value), strings.Join(options[:last], ", "), options[last]), meant(value, options...)}
}

// meant returns the option that a value probably means, as a hint, or why it is not what
// it looks like; empty: none.
func meant(value string, options ...string) string {
	if m := mistake(value); m != "" {
		return remedy("%s", m)
	}
	lower := strings.ToLower(value)
	if len(lower) < 2 || len(lower) > 100 {
		return ""
	}
	near, least := "", 3
	for _, o := range options {
		mistakes := distance(lower, o)
		if mistakes > 1 && (strings.HasPrefix(lower, o) || strings.HasPrefix(o, lower)) {
			mistakes = 1 // such as warning and warn
		}
		if mistakes < least && mistakes <= len(o)/3 {
			near, least = o, mistakes
		}
	}
	if near == "" {
		return ""
	}
	return remedy("write %s", near)
}

// booleans are spellings of true and false that other programs accept.
var booleans = map[string]string{
	"true": "true", "t": "true", "yes": "true", "y": "true", "on": "true", "1": "true", "enabled": "true",
	"false": "false", "f": "false", "no": "false", "n": "false", "off": "false", "0": "false", "disabled": "false",
}

// meantBool is meant for a boolean.
func meantBool(value string) string {
	if b, ok := booleans[strings.ToLower(value)]; ok {
		return remedy("write %s", b)
	}
	return meant(value, "true", "false")
}

// meantTime is meant for a time, of which the unit is most often missing.
func meantTime(s string) string {
	if n, err := strconv.Atoi(s); err == nil && n > 0 {
		return remedy("write %ds for %[1]d seconds", n)
	}
	if days, ok := strings.CutSuffix(strings.ToLower(s), "d"); ok {
		if n, err := strconv.Atoi(days); err == nil && n > 0 && n < 100000 {
			return remedy("write %dh: the largest unit is the hour", 24*n)
		}
	}
	lower := strings.ToLower(strings.Join(strings.Fields(s), ""))
	if d, err := time.ParseDuration(lower); err == nil && d > 0 && lower != s {
		return remedy("write %s", lower)
	}
	return ""
}

// meantListen is meant for a listen address.
func meantListen(s, example string) string {
	digits := func(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
	colon := strings.LastIndex(s, ":")
	port := s[colon+1:]
	switch n, err := strconv.Atoi(port); {
	case digits(s):
		return remedy("write :%s, with a colon in front of the port", shorten(s))
	case colon < 0 || !digits(port):
		return remedy("the port is missing: write such as %s%s", shorten(s[:max(colon, 0)]), example)
	case err != nil || n == 0 || n > 65535:
		return remedy("the port is a number from 1 to 65535")
	case strings.HasPrefix(s, "*:"):
		return remedy("write :%s for all addresses", port)
	case strings.Count(s, ":") > 1 && !strings.Contains(s, "["):
		return remedy("write an IPv6 address in brackets: [%s]:%s", shorten(s[:colon]), port)
	}
	return remedy("the address is an IP address, not a name; :%s is all addresses", port)
}

// explain adds a hint to errors without one: the reason if the value is not what it
// looks like, otherwise the default. env is a struct of variables.
func (e Errors) explain(env any) {
	for _, fault := range e {
		if fault.Hint != "" {
			continue
		}
		value, unset := lookUp(reflect.ValueOf(env), fault.Variable)
		switch m := mistake(value); {
		case m != "":
			fault.Hint = remedy("%s", m)
		case strings.HasSuffix(fault.Variable, "_FILE"): // the sentence has the remedy
		case unset == "none":
			fault.Hint = remedy("correct the value, or unset the variable")
		case unset != "" && !strings.HasPrefix(unset, "required"):
			fault.Hint = remedy("correct the value, or unset the variable for the default, %s", unset)
		}
	}
}

// lookUp returns the value of a variable and its default.
func lookUp(env reflect.Value, variable string) (value, unset string) {
	for i := range env.NumField() {
		field := env.Type().Field(i)
		if field.Anonymous {
			if value, unset = lookUp(env.Field(i), variable); unset != "" {
				return value, unset
			}
		}
		if field.Tag.Get("envconfig") == variable {
			return env.Field(i).String(), field.Tag.Get("unset")
		}
	}
	return "", ""
}

// mistake returns the reason why a value of one line is not what it looks like, for any
// variable; empty: none.
func mistake(value string) string {
	if len(value) > 1 && strings.ContainsRune(`"'`, rune(value[0])) && value[0] == value[len(value)-1] {
		return "the quotation marks are part of the value: remove them (docker and podman keep those of an --env-file)"
	}
	if strings.TrimSpace(value) != value {
		return `the white space at an end is part of the value: remove it (in YAML, "|" ends a value with a line end and "|-" does not)`
	}
	if strings.Contains(value, "$(") || strings.Contains(value, "${") {
		return "a reference to another variable was not replaced: define that variable first (Kubernetes replaces only $(NAME))"
	}
	for _, r := range value {
		if unicode.IsControl(r) {
			return fmt.Sprintf("the value contains the control character %U: remove it", r)
		}
		if r >= utf8.RuneSelf {
			return fmt.Sprintf("the value contains %U, which is not ASCII: type it again", r)
		}
	}
	return ""
}
