package config

import (
	"slices"

	"github.com/egress-router/egress-router/internal/wording"
)

// Names are the names of the variables, for messages of other packages about the fields
// that they set.
type Names struct{}

// Name returns the variable that sets a field.
func (Names) Name(f wording.Field) string {
	for _, v := range slices.Concat(Variables(), HTTPProxyVariables(), DNSProxyVariables()) {
		if v.Field == f {
			return v.Name
		}
	}
	return string(f)
}

// Set returns the assignment to that variable.
func (n Names) Set(f wording.Field, value string) string { return n.Name(f) + "=" + value }
