// Package wording writes messages about the parts of a router's description, without regard
// to the front end that configures it: environment variables, the JSON of a CNI plugin, the
// YAML of a resource.
//
// Only a front end knows what its users call a field. Packages below it write a Text about
// fields, which the front end prints with its own Names.
package wording

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// A Field is a part of the description that a message is about. Its text is the name
// without a front end.
type Field string

// The fields of the router and the HTTP proxy.
const (
	Mode                Field = "mode"
	Source              Field = "source"
	Gateway             Field = "gateway"
	Destinations        Field = "destinations"
	Grammar             Field = "grammar"
	Interface           Field = "interface"
	ClusterInterface    Field = "cluster interface"
	Backend             Field = "backend"
	Helpers             Field = "helpers"
	ReplyMark           Field = "reply mark"
	ReplyTable          Field = "reply table"
	ClusterDestinations Field = "cluster networks"
	MacvlanParent       Field = "macvlan parent"
	HostNetns           Field = "host network namespace"
	Conflict            Field = "conflict"
	HealthListen        Field = "health address"
	Standby             Field = "standby"
	StandbyPeers        Field = "standby peers"
	StandbyWitness      Field = "standby witness"
	StandbyKey          Field = "standby key"
	HTTPProxyListen     Field = "HTTP proxy address"
)

// Names are the names of the fields for the users of a front end.
type Names interface {
	Name(Field) string
}

// A Setter is Names of a front end whose users write a field with a value in another form
// than field=value.
type Setter interface {
	Names
	Set(f Field, value string) string
}

// A Text is a message about fields, before they have names. The zero Text is empty.
type Text struct {
	format string
	args   []any
}

// A setting is a field with a value.
type setting struct {
	field Field
	value string
}

func (s setting) in(names Names) string {
	if setter, is := names.(Setter); is {
		return setter.Set(s.field, s.value)
	}
	return names.Name(s.field) + "=" + s.value
}

// Textf returns a Text with a format of package fmt, for which a Field and a Text among the
// arguments are strings.
func Textf(format string, args ...any) Text { return Text{format, args} }

// Set returns a Text that is a field with a value.
func Set(f Field, value string) Text { return Textf("%s", setting{f, value}) }

// In returns the text with the names of a front end; nil: without one.
func (t Text) In(names Names) string {
	if names == nil {
		names = plain{}
	}
	args := slices.Clone(t.args)
	for i, a := range args {
		switch a := a.(type) {
		case Field:
			args[i] = names.Name(a)
		case setting:
			args[i] = a.in(names)
		case Text:
			args[i] = a.In(names)
		}
	}
	return fmt.Sprintf(t.format, args...)
}

// plain is the names without a front end.
type plain struct{}

func (plain) Name(f Field) string { return string(f) }

// OneLine joins the lines of a text by "; ", and replaces control characters by blanks: the
// text of an error, a name or a file comes from elsewhere.
func OneLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimSpace(line)
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.Join(lines, "; "))
}
