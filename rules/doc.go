// Package rules defines what an egress router redirects and the kernel rules for
// it: the destination grammar, the set of redirects, the plan of chains and
// rules, and the text forms of that plan.
//
// The package is pure. It uses the standard library only, reads no file, no
// environment and no kernel, and every value it returns can be compared, printed
// and tested without privilege. A backend loads a plan into the kernel and adds
// no policy of its own.
package rules
