// Package who contains servers that answer with their own address and the client's,
// and their client. The answer shows both translations of a router, also through a
// proxy.
package who

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
)

// An Answer is a server's answer.
type Answer struct {
	Server netip.AddrPort // destination that the server sees
	Peer   netip.Addr     // source that the server sees
}

// String returns the line of the answer without its end.
func (a Answer) String() string { return fmt.Sprintf("%s %s", a.Server, a.Peer) }

// Parse parses such a line.
func Parse(line string) (Answer, error) {
	server, peer, _ := strings.Cut(strings.TrimSpace(line), " ")
	s, err := netip.ParseAddrPort(server)
	if err != nil {
		return Answer{}, fmt.Errorf("reading answer %q: %w", line, err)
	}
	p, err := netip.ParseAddr(peer)
	if err != nil {
		return Answer{}, fmt.Errorf("reading answer %q: %w", line, err)
	}
	return Answer{s, p}, nil
}

// Ask sends one request and returns the answer. Over TCP the request is HTTP, and the
// connection stays usable.
func Ask(conn net.Conn, replies *bufio.Reader) (Answer, error) {
	_, datagrams := conn.RemoteAddr().(*net.UDPAddr)
	request := "GET / HTTP/1.1\r\nHost: who\r\n\r\n"
	if datagrams {
		request = "?"
	}
	if _, err := io.WriteString(conn, request); err != nil {
		return Answer{}, err
	}
	if datagrams {
		line, err := replies.ReadString('\n')
		if err != nil {
			return Answer{}, err
		}
		return Parse(line)
	}
	response, err := http.ReadResponse(replies, nil)
	if err != nil {
		return Answer{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return Answer{}, err
	}
	return Parse(string(body))
}
