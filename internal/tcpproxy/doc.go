// Package tcpproxy is the DNS proxy: it relays TCP connections to hosts that are
// given by name, and follows the addresses of these names.
//
// The destinations are those of a list (Parse). A Proxy listens on the port of each
// and accepts its connections in one goroutine per port. A pool holds the addresses of
// one destination in rotation; unreachable addresses are set aside and probed. A relay
// joins two connections until both directions have ended, in the kernel (splice(2)).
// From the moment at which its server's socket connects it belongs to one of a few
// loops, which move the data of all relays. Steps before that which may take long, and
// the next attempt after a failed one, run in a goroutine of their own.
package tcpproxy
