package rules

import (
	"cmp"
	"slices"
)

// A Lookup finds the redirect of a port.
type Lookup struct {
	redirects []Redirect
	single    map[service]int
	ranges    map[service][]int // by their first ports; without a port
}

// A service is a local port.
type service struct {
	family   Family
	protocol Protocol
	port     Port
}

// NewLookup returns a Lookup of redirects, no two of which have the same family, protocol
// and port.
func NewLookup(redirects []Redirect) Lookup {
	l := Lookup{redirects, make(map[service]int, len(redirects)), make(map[service][]int)}
	for i, r := range redirects {
		if f := FamilyOf(r.To); r.Last == 0 {
			l.single[service{f, r.Protocol, r.Port}] = i
		} else {
			of := service{f, r.Protocol, 0}
			l.ranges[of] = append(l.ranges[of], i)
		}
	}
	for _, ranges := range l.ranges {
		slices.SortFunc(ranges, func(a, b int) int { return cmp.Compare(redirects[a].Port, redirects[b].Port) })
	}
	return l
}

// Find returns the index of the redirect of a port, and whether there is one.
func (l Lookup) Find(f Family, p Protocol, local Port) (i int, ok bool) {
	if i, ok := l.single[service{f, p, local}]; ok {
		return i, true
	}
	ranges := l.ranges[service{f, p, 0}]
	at, _ := slices.BinarySearchFunc(ranges, local, func(i int, port Port) int { return cmp.Compare(l.redirects[i].last(), port) })
	if at < len(ranges) && l.redirects[ranges[at]].Contains(p, local) {
		return ranges[at], true
	}
	return 0, false
}
