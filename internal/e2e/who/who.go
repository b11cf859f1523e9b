// Package who has servers that answer with where they were reached and by whom,
// and asks them. That is how a test sees both translations of a router, whatever
// stands between: a proxy passes the answer on.
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

// An Answer is what a server says.
type Answer struct {
	Server netip.AddrPort // where it was reached
	Peer   netip.Addr     // by whom
}

// String is the line that a server answers with, without its end.
func (a Answer) String() string { return fmt.Sprintf("%s %s", a.Server, a.Peer) }

// Parse reads such a line.
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

// Ask sends one request by a connection and returns the answer. Over TCP it is
// one of HTTP, after which the connection can be used again.
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
