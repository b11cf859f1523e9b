// Package httpproxy is a forward proxy for HTTP and, by CONNECT, for any protocol over
// TCP. It connects only to destinations that its rules allow. The network that the
// router has configured determines the source address.
//
// A clientConn reads one request after the other. Each is an exchange of these steps:
// framing (faults that the standard library tolerates are refused), target (host and
// port), rules (evaluated on the addresses that are then dialled), and either forward,
// over a pool of server connections, or tunnel, whose bulk data the kernel moves.
//
// The package has its own reader and writer of HTTP/1 in place of net/http: that takes
// ten times as much memory for a request, which costs time for its collection, and three
// times as much for an idle client. Heads, in head.go, request.go and response.go, are
// read as net/http does, which FuzzRequest and TestLikeStandardLibrary check; chunks are
// read by net/http/httputil.
//
// The parsing and the evaluation of rules are pure, in rule.go and decide.go.
package httpproxy
