// Package rules holds what an egress router redirects and what that means to
// the kernel: the destination grammar, the set of redirects it yields, the
// plan of chains and rules that carries them out, and the text forms of that
// plan.
//
// The package is pure. It uses the standard library only, reads no file, no
// environment and no kernel, and every value it returns can be compared,
// printed and tested without privilege. Whoever puts a plan into the kernel
// (a backend) takes its policy from here and adds none of its own.
package rules
