package rules

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unique"
)

// A Limit bounds the new connections of a redirect: of all its clients and ports together.
// The first packet of each counts, also of a UDP flow. What is beyond is refused.
type Limit struct {
	PerMinute uint32 // new connections a minute; zero: any number
	Burst     uint32 // new connections that may come at once; zero if PerMinute is
	// The connections at a time, as conntrack has them: a TCP connection that both ends have
	// closed does not count, a UDP flow counts until its entry times out. Zero: any number.
	Max uint32
}

// Limited are the limits of a redirect. The zero value is none. They have the size of a
// pointer, since few redirects have some, and are comparable, since redirects are.
type Limited struct {
	limit unique.Handle[Limit] // zero: none
}

// NewLimited returns the limits of a redirect.
func NewLimited(l Limit) Limited {
	if l == (Limit{}) {
		return Limited{}
	}
	return Limited{unique.Make(l)}
}

// Value returns the limits, zero if there are none.
func (l Limited) Value() Limit {
	if l == (Limited{}) {
		return Limit{}
	}
	return l.limit.Value()
}

// Equal reports whether both are the same limits.
func (l Limited) Equal(other Limited) bool { return l == other }

// set changes the limits.
func (l *Limited) set(change func(*Limit) (fault string)) (fault string) {
	value := l.Value()
	fault = change(&value)
	*l = NewLimited(value)
	return fault
}

// mostLimit is the largest number of connections in a limit, per second or at a time.
const mostLimit = 1_000_000

// second returns the number of new connections in a second, rounded up.
func (l Limit) second() uint32 { return (l.PerMinute + 59) / 60 }

// rate returns the rate as a number and a unit, in seconds.
func (l Limit) rate() (n, unit uint32) {
	if l.PerMinute%60 == 0 {
		return l.PerMinute / 60, 1
	}
	return l.PerMinute, 60
}

// String returns the limit as options of a line, which begin with a space.
func (l Limit) String() string {
	var s string
	if n, unit := l.rate(); n != 0 {
		s = fmt.Sprintf(" limit=%d/%s", n, map[uint32]string{1: "s", 60: "m"}[unit])
		if l.Burst != l.second() {
			s += fmt.Sprintf(" burst=%d", l.Burst)
		}
	}
	if l.Max != 0 {
		s += fmt.Sprintf(" max=%d", l.Max)
	}
	return s
}

// fault returns the reason why the limit is invalid, empty if it is valid.
func (l Limit) fault() string {
	switch {
	case (l.PerMinute == 0) != (l.Burst == 0):
		return "a burst needs a rate, and a rate a burst"
	case l.second() > mostLimit || l.Burst > mostLimit || l.Max > mostLimit:
		return "too large"
	}
	return ""
}

// append writes the limit in iptables notation, which is only printed.
func (l Limit) append(b []byte) []byte {
	if n, unit := l.rate(); n != 0 {
		b = fmt.Appendf(b, "-m limit --limit %d/%s --limit-burst %d ", n, map[uint32]string{1: "sec", 60: "min"}[unit], l.Burst)
	}
	if l.Max != 0 {
		b = fmt.Appendf(b, "-m connlimit --connlimit-upto %d --connlimit-mask 0 ", l.Max)
	}
	return b
}

// setRate reads "N/s" or "N/m".
func (l *Limit) setRate(value string) (fault string) {
	number, unit, _ := strings.Cut(value, "/")
	n, ok := parseLimit(number)
	switch {
	case ok && unit == "s":
		l.PerMinute = n * 60
	case ok && unit == "m":
		l.PerMinute = n
	default:
		return fmt.Sprintf("limit=%s: expected new connections a second or a minute, such as limit=100/s or limit=30/m, up to %d", clip(value), mostLimit)
	}
	return ""
}

// setNumber returns a function that reads a number of connections.
func setNumber(key string, of func(*Limit) *uint32) func(*Redirect, string) string {
	return func(r *Redirect, value string) (fault string) {
		n, ok := parseLimit(value)
		if !ok {
			return fmt.Sprintf("%s=%s: expected a number of connections from 1 to %d", key, clip(value), mostLimit)
		}
		return r.Limits.set(func(l *Limit) string {
			*of(l) = n
			return ""
		})
	}
}

// parseLimit accepts a decimal number from 1 to mostLimit, without leading zeros.
func parseLimit(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && s[0] != '0' && isDigits(s) && n <= mostLimit
}

// complete sets the default burst, one second's worth.
func (l *Limit) complete() (fault string) {
	if l.PerMinute == 0 && l.Burst != 0 {
		return "burst needs limit: write limit=100/s, or max for the connections at a time"
	}
	if l.Burst == 0 {
		l.Burst = l.second()
	}
	return ""
}

// limited returns the redirects that have limits.
func limited(redirects []Redirect) []Redirect {
	if !slices.ContainsFunc(redirects, Redirect.limits) {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(redirects), func(r Redirect) bool { return !r.limits() })
}

// limits reports whether the redirect has an address and limits.
func (r Redirect) limits() bool { return r.Limits != Limited{} && r.To.IsValid() }

// sameLimits reports whether both have the same ports with the same limits.
func (r Redirect) sameLimits(other Redirect) bool {
	return FamilyOf(r.To) == FamilyOf(other.To) && r.Protocol == other.Protocol && r.Port == other.Port && r.Last == other.Last && r.Limits == other.Limits
}

// limitRules returns the rules that refuse connections beyond the limits of their
// redirects.
func limitRules(sides Sides) []Rule {
	return []Rule{
		{In: sides.Cluster, Target: CheckLimits},
		{In: sides.Cluster, Protocol: TCP, Target: Reject, Reason: OverLimit},
		{In: sides.Cluster, Target: Reject, Reason: OverLimit},
	}
}

// LimitsOf returns the redirects of a family that have limits.
func (p Plan) LimitsOf(f Family) []Redirect { return ofFamily(p.Limits, f) }
