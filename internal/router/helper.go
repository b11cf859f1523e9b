package router

import (
	"os"
	"strings"

	"github.com/egress-router/egress-router/rules"
)

// checkTranslators returns a *rules.HelperError if the kernel has a helper without the module that
// translates its messages: servers would get addresses of the cluster, and the connections that they
// announce would not come. The rules have been loaded, and with them the helpers.
func checkTranslators(helpers []rules.Helper) error {
	if len(helpers) == 0 {
		return nil
	}
	// A kernel without modules has no list, and a container may not show it: then nothing is missing.
	modules, _ := os.ReadFile("/proc/modules")
	return missingTranslator(helpers, string(modules))
}

// missingTranslator looks in the content of /proc/modules (proc_modules(5)). A helper that is not in it
// is part of the kernel itself, and so is its translator, as far as can be told.
func missingTranslator(helpers []rules.Helper, modules string) error {
	loaded := make(map[string]bool)
	for line := range strings.Lines(modules) {
		name, _, _ := strings.Cut(line, " ")
		loaded[name] = true
	}
	for _, h := range helpers {
		translator := h.Translator()
		if translator == "" || loaded[translator] {
			continue
		}
		if reader, _, _ := strings.Cut(h.Modules(), " "); loaded[reader] {
			return &rules.HelperError{Helper: h}
		}
	}
	return nil
}
