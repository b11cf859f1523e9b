package httpproxy

import (
	"context"
	"io"
	"net/http"
)

// connect opens a tunnel (RFC 9110 section 9.3.6).
func (p *Proxy) connect(x *exchange) {
	if x.request.ContentLength != 0 || len(x.request.TransferEncoding) > 0 {
		x.refuse(&refusal{http.StatusBadRequest, "CONNECT must not have a body"})
		return
	}
	if refusal := p.route(x); refusal != nil {
		x.refuse(refusal)
		return
	}
	ctx := x.life.context()
	server, err := p.dial(ctx, &x.route)
	if err != nil {
		x.refuse(undialled(err))
		return
	}
	defer p.leave()
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
	received, sent := p.relay(client, server)
	x.received.Add(received)
	x.sent.Add(sent)
}
