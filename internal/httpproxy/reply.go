package httpproxy

import (
	"bufio"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// A reply is the response to a client while it is sent.
type reply struct {
	w *bufio.Writer // nil: none is needed so far

	status   int
	reason   string // the phrase of a server
	own      bool   // the reason is a server's
	fields   fields // without those of the framing, but Content-Length
	trailers bool   // there may be trailers
	pending  bool   // the head is not written

	empty   bool // a body is not sent
	chunked bool
	left    int64 // of the length; -1: unknown
	closes  bool  // the connection ends with the response
	err     error // of writing
}

// head begins a response. It is written with the first part of the body, with flush, or at
// the end.
func (x *exchange) head(status int, f fields) {
	x.status = status
	a := &x.reply
	a.status, a.fields, a.pending, a.left = status, f, true, -1
	// The rest of a request's body may never arrive, and is no next request.
	if x.body != nil && !x.body.ended.Load() {
		a.fields = append(a.fields.without("Connection"), field{"Connection", "close"})
	}
}

// writer returns the buffer in front of the client.
func (x *exchange) writer() *bufio.Writer {
	if x.reply.w == nil {
		x.reply.w = getWriter(x.client.TCPConn)
	}
	return x.reply.w
}

// writeHead writes the head of the response. done means that there is no body.
func (x *exchange) writeHead(done bool) {
	x.stopContinue()
	a, r := &x.reply, &x.request
	a.pending = false
	a.empty = r.method == http.MethodHead || !bodyAllowed(a.status)
	length := a.fields.get("Content-Length")
	if length != "" {
		a.left, _ = parseLength(length) // the proxy's own, or checked
	}
	known := length != ""
	if !bodyAllowed(a.status) {
		a.fields = a.fields.without("Content-Length")
	}
	if a.status == http.StatusNotModified {
		a.fields = a.fields.without("Content-Type")
	}
	added := ""
	if done && !a.empty && !known && !a.trailers {
		added, known, a.left = "0", true, 0
	}
	a.chunked = !a.empty && !known && r.atLeast11()

	connection := ""
	switch {
	case r.keepAlive && (a.empty || known):
		if a.fields.count("Connection") == 0 {
			connection = "keep-alive"
		}
	case !r.atLeast11() || r.closes:
		a.closes = true
	}
	stopping := x.proxy.stopping.Load()
	listed := a.fields.hasToken("Connection", "close")
	a.closes = a.closes || listed || stopping || r.method == http.MethodConnect || !a.empty && !known && !a.chunked
	if a.closes && (stopping || !listed) {
		a.fields = a.fields.without("Connection")
		connection = ""
		if r.atLeast11() {
			connection = "close"
		}
	}

	w := x.writer()
	x.writeStatusLine(w)
	a.fields.sort()
	a.fields.write(w)
	if a.fields.count("Date") == 0 {
		_, _ = w.WriteString("Date: ")
		_, _ = w.Write(time.Now().UTC().AppendFormat(w.AvailableBuffer(), http.TimeFormat))
		_, _ = w.WriteString("\r\n")
	}
	for _, extra := range [...]field{{"Content-Length", added}, {"Connection", connection}} {
		if extra.value != "" {
			writeField(w, extra.name, extra.value)
		}
	}
	if a.chunked {
		writeField(w, "Transfer-Encoding", "chunked")
	}
	_, _ = w.WriteString("\r\n")
}

// writeStatusLine writes the status line, in the version of the request.
func (x *exchange) writeStatusLine(w *bufio.Writer) {
	a := &x.reply
	reason := a.reason
	if !a.own {
		reason = http.StatusText(a.status)
	}
	_, _ = w.WriteString(x.request.replyVersion())
	_, _ = w.WriteString(" ")
	if reason == "" && http.StatusText(a.status) == "" {
		reason = fmt.Sprintf("status code %d", a.status)
	}
	number := w.AvailableBuffer()
	for _, unit := range [...]int{100, 10, 1} {
		number = append(number, byte('0'+a.status/unit%10))
	}
	_, _ = w.Write(number)
	_, _ = w.WriteString(" ")
	_, _ = w.WriteString(reason)
	_, _ = w.WriteString("\r\n")
}

// write forwards a part of the body.
func (x *exchange) write(p []byte) error {
	a := &x.reply
	if a.pending {
		x.writeHead(false)
	}
	if a.err != nil {
		return a.err
	}
	x.sent.Add(int64(len(p)))
	if a.empty || len(p) == 0 {
		return nil
	}
	if !a.chunked && a.left >= 0 {
		a.left -= int64(len(p))
	}
	w := x.writer()
	writePiece(w, p, a.chunked)
	_, a.err = w.Write(nil) // the error of the writes so far
	return a.err
}

// flush forwards the buffered data before the proxy waits for more of the server: a part
// of a response, even the head alone, may be all for a long time.
func (x *exchange) flush() {
	a := &x.reply
	if a.pending {
		x.writeHead(false)
	}
	if a.w == nil {
		return
	}
	if err := a.w.Flush(); err != nil && a.err == nil {
		a.err = err
	}
}

// complete ends the response. It reports whether the connection may have another request.
func (x *exchange) complete(trailers fields) bool {
	a := &x.reply
	if a.pending {
		x.writeHead(len(trailers) == 0)
	}
	if a.chunked {
		writeLastChunk(x.writer(), trailers)
	}
	x.flush()
	return a.err == nil && !a.closes && (a.empty || a.chunked || a.left == 0)
}

// freeWriter returns the buffer to the pool.
func (x *exchange) freeWriter() {
	if x.reply.w != nil {
		putWriter(x.reply.w)
		x.reply.w = nil
	}
}

// forwardInterim forwards an interim response, without the headers of the server's
// connection: close in one of them would end that of the client. HTTP/1.0 has no interim
// responses (RFC 9110 section 15.2). A 100 that the client expects is sent when the body is
// read for the server, which may be before the server's own comes here.
func (x *exchange) forwardInterim() {
	r := &x.response
	expected := r.status == http.StatusContinue && x.body != nil && x.request.fields.count("Expect") > 0
	if !x.request.atLeast11() || expected {
		return
	}
	x.continues.Lock()
	defer x.continues.Unlock()
	x.reply.status = r.status
	w := x.writer()
	x.writeStatusLine(w)
	f := r.fields.withoutHopByHop().without("Content-Length")
	f.sort()
	f.write(w)
	_, _ = w.WriteString("\r\n")
	x.flushInterim()
}

func (x *exchange) flushInterim() {
	if err := x.reply.w.Flush(); err != nil && x.reply.err == nil {
		x.reply.err = err
	}
}

// sendContinue sends the interim response that the client expects before it sends the
// body, unless the response has begun.
func (x *exchange) sendContinue() {
	x.continues.Lock()
	defer x.continues.Unlock()
	if x.mayContinue {
		x.mayContinue = false
		_, _ = x.client.Write([]byte("HTTP/1.1 100 Continue\r\n\r\n")) // the client may be gone
	}
}

func (x *exchange) stopContinue() {
	x.continues.Lock()
	x.mayContinue = false
	x.continues.Unlock()
}

// writeRequest writes the head of the request to the server, in the order of net/http.
func (x *exchange) writeRequest(w *bufio.Writer) {
	r := &x.request
	_, _ = w.WriteString(r.method)
	_, _ = w.WriteString(" ")
	_, _ = w.WriteString(r.path)
	_, _ = w.WriteString(" HTTP/1.1\r\n")
	writeField(w, "Host", r.host)
	if agent := r.fields.get("User-Agent"); agent != "" {
		writeField(w, "User-Agent", agent)
	}
	switch {
	case r.length < 0:
		writeField(w, "Transfer-Encoding", "chunked")
	case r.length > 0 || r.method == http.MethodPost || r.method == http.MethodPut || r.method == http.MethodPatch:
		_, _ = w.WriteString("Content-Length: ")
		_, _ = w.Write(strconv.AppendInt(w.AvailableBuffer(), r.length, 10))
		_, _ = w.WriteString("\r\n")
	}
	for i, name := range r.trailers {
		if i == 0 {
			_, _ = w.WriteString("Trailer: ")
		} else {
			_, _ = w.WriteString(",")
		}
		_, _ = w.WriteString(name)
	}
	if len(r.trailers) > 0 {
		_, _ = w.WriteString("\r\n")
	}
	for _, one := range r.fields {
		if one.name != "User-Agent" {
			writeField(w, one.name, one.value)
		}
	}
	_, _ = w.WriteString("\r\n")
}
