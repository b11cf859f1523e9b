// Package httpproxy is a forward proxy for HTTP and, by CONNECT, for any protocol over
// TCP. It connects only to destinations that its rules allow. The network that the
// router has configured determines the source address.
//
// A request passes these steps: framing (faults that the standard library tolerates
// are refused), target (host and port), rules (evaluated on the addresses that are
// then dialled), and either forward, over a pool of server connections and by
// httputil.ReverseProxy if the request has a body or an upgrade, or tunnel, whose bulk
// data the kernel moves.
//
// The parsing and the evaluation of rules are pure, in rule.go and decide.go.
package httpproxy
