// Package httpproxy is a forward proxy for HTTP and, by CONNECT, for everything
// else, which reaches what its rules allow and nothing more. Whence its
// connections leave is up to the network that the router has made.
//
// A request goes one way: framing (what the standard library is lenient about is
// refused), target (host and port), rules (decided on the addresses that are then
// dialled), and then either forward, by httputil.ReverseProxy, or tunnel, which
// hands both sockets to the kernel.
//
// The grammar of the rules and what they decide are pure, in rule.go and
// decide.go.
package httpproxy
