package httpproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
)

// connect opens a tunnel (RFC 9110 section 9.3.6).
func (p *Proxy) connect(x *exchange) {
	if x.request.length != 0 {
		x.refuse(&refusal{http.StatusBadRequest, "CONNECT must not have a body"})
		return
	}
	if refusal := p.route(x); refusal != nil {
		x.refuse(refusal)
		return
	}
	ctx := x.life.context()
	server, err := p.dial(ctx, x.route.target, x.route.addrs)
	if err != nil {
		x.refuse(undialled(err))
		return
	}
	defer p.leave()
	defer server.Close()
	x.server = server.RemoteAddr()
	early := x.take()
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
	x.client.freeReader()
	received, sent := p.relay(x.client, server)
	x.received.Add(received)
	x.sent.Add(sent)
}

var errEarlySwitch = errors.New("the server switched protocols before the end of the request")

// switchProtocols forwards a protocol switch, and then both directions (RFC 9110 section
// 7.8).
func (x *exchange) switchProtocols() {
	server := x.conn
	defer server.Close()
	r := &x.response
	protocol := r.fields.upgrade()
	err := x.checkReason()
	switch {
	case err != nil:
	case x.body != nil && !x.body.ended.Load():
		err = errEarlySwitch
	case !isPrintable(protocol):
		err = fmt.Errorf("backend tried to switch to invalid protocol %q", protocol)
	case !equalFold(protocol, x.upgrade):
		err = fmt.Errorf("backend tried to switch protocol %q when %q was requested", protocol, x.upgrade)
	}
	if err != nil {
		x.fail(err)
		return
	}
	early := x.take()
	defer x.client.Close()
	x.status = r.status
	w := x.writer()
	_, _ = fmt.Fprintf(w, "HTTP/%d.%d %03d %s\r\n", r.major, r.minor, r.status, r.reason)
	f := append(r.fields.withoutNamed(), via(r.major, r.minor))
	f.sort()
	f.write(w)
	_, _ = w.WriteString("\r\n")
	if err := w.Flush(); err != nil {
		return
	}
	x.switched(early)
}

// withoutNamed removes the fields that Connection names, but not those of a switch, and
// those of a framing. It changes the slice.
func (f fields) withoutNamed() fields {
	named := f.named()
	return slices.DeleteFunc(f, func(one field) bool {
		switch one.name {
		case "Connection", "Upgrade":
			return false
		case "Content-Length", "Transfer-Encoding", "Trailer":
			return true
		}
		return named.has(one.name)
	})
}

// switched moves the data of both directions after a protocol switch, first those that
// were read before.
func (x *exchange) switched(early []byte) {
	server, client := x.conn, x.client.TCPConn
	n, err := server.Write(early)
	x.received.Add(int64(n))
	if err != nil {
		return
	}
	x.client.freeReader()
	before, _ := server.reader.Peek(server.reader.Buffered()) // cannot fail
	n, err = client.Write(before)
	x.sent.Add(int64(n))
	if err != nil {
		return
	}
	putReader(server.reader)
	server.reader = nil
	if plain, ok := server.duplex.(*socket); ok {
		received, sent := x.proxy.relay(x.client, plain.TCPConn)
		x.received.Add(received)
		x.sent.Add(sent)
		return
	}
	var back sync.WaitGroup
	back.Go(func() {
		x.sent.Add(x.copyHalf(client, server.duplex))
	})
	x.received.Add(x.copyHalf(server.duplex, client))
	back.Wait()
}

// copyHalf copies one direction of a connection with TLS, which the kernel cannot move. After
// an error it closes both connections.
func (x *exchange) copyHalf(to, from duplex) (n int64) {
	defer func() {
		if x.proxy.panicked(recover(), x.client) {
			_ = to.Close()
			_ = from.Close()
		}
	}()
	n, err := io.Copy(struct{ io.Writer }{to}, struct{ io.Reader }{from})
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		_ = to.Close()
		_ = from.Close()
	}
	return n
}
