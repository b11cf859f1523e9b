package httpproxy

import (
	"context"
	"io"
	"net"
	"net/http"
	"sync"
)

// connect opens a tunnel (RFC 9110 section 9.3.6).
func (p *Proxy) connect(x *exchange) {
	if x.request.ContentLength != 0 || len(x.request.TransferEncoding) > 0 {
		x.refuse(&refusal{http.StatusBadRequest, "CONNECT must not have a body"})
		return
	}
	ctx := x.request.Context()
	r, refusal := p.route(ctx, x.route.target)
	x.route = r
	if refusal != nil {
		x.refuse(refusal)
		return
	}
	server, err := p.dial(ctx, r)
	if err != nil {
		x.refuse(undialled(err))
		return
	}
	defer server.Close()
	x.server = server.RemoteAddr()
	early, err := x.takeConnection()
	if err != nil {
		x.refuse(failed(err))
		return
	}
	defer x.client.Close()
	x.status = http.StatusOK

	client := x.client.TCPConn
	stop := context.AfterFunc(ctx, func() {
		_ = client.Close()
		_ = server.Close()
	})
	defer stop()
	if _, err := io.WriteString(client, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	if n, err := server.Write(early); err != nil {
		return
	} else if n > 0 {
		x.received.Add(int64(n))
	}
	received, sent := relay(client, server)
	x.received.Add(received)
	x.sent.Add(sent)
}

// relay copies both directions until both have ended. The end of one is forwarded and
// the other continues: a client may close its half and still wait for a response. Both
// are plain TCP connections, for which io.Copy uses splice(2).
func relay(client, server *net.TCPConn) (received, sent int64) {
	var back sync.WaitGroup
	back.Go(func() { sent = pass(client, server) })
	received = pass(server, client)
	back.Wait()
	return received, sent
}

// pass copies one direction. After an error it closes both connections.
func pass(to, from *net.TCPConn) int64 {
	n, err := io.Copy(to, from)
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		_ = to.Close()
		_ = from.Close()
	}
	return n
}
