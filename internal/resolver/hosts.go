package resolver

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
)

// hosts is the content of a hosts(5) file, by name and by address.
type hosts struct {
	addrs map[string][]netip.Addr // by name, in lower case; IPv4 first
	names map[netip.Addr][]string // as written
}

// parseHosts parses a hosts(5) file: lines of an address and its names, comments after
// #. As in the system's resolver, lines without an address are ignored. A name on
// several lines has all their addresses.
func parseHosts(text []byte) hosts {
	h := hosts{map[string][]netip.Addr{}, map[netip.Addr][]string{}}
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		a, err := netip.ParseAddr(words[0])
		if err != nil {
			continue
		}
		a = a.Unmap()
		for _, name := range words[1:] {
			name = strings.TrimSuffix(name, ".")
			key := strings.ToLower(name)
			if !slices.Contains(h.addrs[key], a) {
				h.addrs[key] = append(h.addrs[key], a)
			}
			bare := a.WithZone("")
			if !slices.Contains(h.names[bare], name) {
				h.names[bare] = append(h.names[bare], name)
			}
		}
	}
	for _, addrs := range h.addrs {
		slices.SortStableFunc(addrs, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	}
	return h
}
