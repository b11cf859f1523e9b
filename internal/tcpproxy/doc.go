// Package tcpproxy is the DNS proxy: it relays TCP connections to hosts that are
// given by name, and follows the addresses of these names.
//
// Destinations come from a list (Parse). A Proxy listens on the port of each, and
// accepts its connections in a goroutine of the port. A pool holds the addresses of
// one destination, which take turns; those that do not answer are put aside and
// probed. A relay joins two connections until both have said their last word, in the
// kernel (splice(2)). As soon as its server's socket connects it belongs to one of
// a few loops, which move the data of all; what may take long before that, and the
// next try after one that failed, has a goroutine.
package tcpproxy
