package config

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// serviceName matches the variables that Kubernetes sets in a container for each
// Service of its namespace, NAME_SERVICE_HOST, NAME_SERVICE_PORT[_PORTNAME] and the
// form of docker's links (NAME_PORT, NAME_PORT_80_TCP, NAME_PORT_80_TCP_ADDR, …):
// Kubernetes documentation, Service, "Environment variables". For a Service whose
// name begins with egress they begin with EGRESS_; none has the name of a variable.
var serviceName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)$|_PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$`)
})

// unknownVariables returns a warning for each name that resembles a variable and is
// none. Of equally near variables, one of the program itself comes first.
func unknownVariables(names []string, own []Variable) (warnings []string) {
	var known []string
	for _, v := range slices.Concat(own, Variables(), HTTPProxyVariables(), DNSProxyVariables()) {
		known = append(known, v.Name)
	}
	for _, name := range names {
		if !resemblesPrefix(name) || slices.Contains(known, name) {
			continue
		}
		if serviceName().MatchString(name) {
			continue
		}
		if near, ok := nearest(name, known); ok {
			warnings = append(warnings, fmt.Sprintf("unknown variable %s has no effect: the nearest one is %s", quoteName(name), near))
		}
	}
	slices.Sort(warnings)
	return warnings
}

// quoteName quotes a name only if it has other characters than a variable's name:
// Kubernetes allows every printable one but "=".
func quoteName(name string) string {
	if regexp.MustCompile(`^\w+$`).MatchString(name) {
		return name
	}
	return quote(name)
}

const prefix = "EGRESS"

// resemblesPrefix reports whether a name begins with EGRESS, in any case, with at
// most one mistake. INGRESS has two.
func resemblesPrefix(name string) bool {
	upper := strings.ToUpper(name[:min(len(name), len(prefix)+1)])
	if strings.HasPrefix(upper, prefix) {
		return true
	}
	// A mistake in one half leaves the other one. Most names have neither.
	if !strings.HasPrefix(upper, prefix[:2]) && !strings.Contains(upper, prefix[3:]) {
		return false
	}
	for n := len(prefix) - 1; n <= len(prefix)+1 && n <= len(upper); n++ {
		if distance(upper[:n], prefix) == 1 {
			return true
		}
	}
	return false
}

// nearest returns the variable with the fewest mistakes in name, if they are few
// for its length. A word too few or too many counts less than a mistake, unless it is
// the last one: EGRESS_MODE resembles EGRESS_ROUTER_MODE.
func nearest(name string, known []string) (near string, ok bool) {
	upper := strings.NewReplacer("-", "_", ".", "_").Replace(strings.ToUpper(name))
	extra, least := withoutWord(upper), 0
	for _, k := range known {
		try := func(a, b string, cost int) {
			mistakes := distance(a, b)
			if mistakes > min(3, max(1, (len(a)-len(prefix)-1)/3)) {
				return
			}
			if cost += 3 * mistakes; !ok || cost < least {
				near, ok, least = k, true, cost
			}
		}
		try(upper, k, 0)
		for _, missing := range withoutWord(k) {
			try(upper, missing, 1)
		}
		for _, shorter := range extra {
			try(shorter, k, 2)
		}
	}
	return near, ok
}

// withoutWord returns the forms of a name that lack one word, which is neither the
// first nor the last.
func withoutWord(name string) (forms []string) {
	words := strings.Split(name, "_")
	for i := 1; i < len(words)-1; i++ {
		forms = append(forms, strings.Join(slices.Concat(words[:i], words[i+1:]), "_"))
	}
	return forms
}

// distance returns the number of mistakes that make b of a: characters inserted,
// deleted, replaced, or swapped with the next (optimal string alignment).
func distance(a, b string) int {
	n := len(b) + 1
	rows := make([]int, 3*n)
	before, last, row := rows[:n], rows[n:2*n], rows[2*n:]
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			d := last[j]
			if a[i] != b[j] {
				d++
			}
			d = min(d, last[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				d = min(d, before[j-1]+1)
			}
			row[j+1] = d
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
