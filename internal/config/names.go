package config

import (
	"slices"

	"github.com/egress-router/egress-router/internal/wording"
)

// Names are the names of the variables, for messages of other packages about the fields
// that they set; Object: the fields of an object that replaces some of them.
type Names struct{ Object bool }

// Names returns the names for the user of a configuration.
func (c Config) Names() Names { return Names{c.Object} }

// objectNames are the names of fields in the resource EgressRouter.
var objectNames = map[wording.Field]string{
	wording.Source: "spec.addresses[].ip", wording.Gateway: "spec.addresses[].gateway", wording.Destinations: "spec.redirect",
}

// Name returns the variable that sets a field.
func (n Names) Name(f wording.Field) string {
	if name := objectNames[f]; n.Object && name != "" {
		return name
	}
	for _, v := range slices.Concat(Variables(), HTTPProxyVariables(), DNSProxyVariables()) {
		if v.Field == f {
			return v.Name
		}
	}
	return string(f)
}
