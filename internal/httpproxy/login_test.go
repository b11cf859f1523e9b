package httpproxy

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// A loginServer authenticates connections, as servers with NTLM and Negotiate do: after
// a handshake of two requests every request on the connection is the user's.
type loginServer struct {
	scheme  string
	closing string // header of the response that ends the handshake

	ended chan string // the user of a connection that the client has closed

	mu    sync.Mutex
	conns map[string]*net.TCPConn // of each user
}

func (s *loginServer) handle(conn *net.TCPConn) {
	r := bufio.NewReader(conn)
	user, challenged := "", false
	for {
		request, err := http.ReadRequest(r)
		if err != nil {
			s.ended <- user
			return
		}
		_, _ = io.Copy(io.Discard, request.Body)
		_, message, _ := strings.Cut(request.Header.Get("Authorization"), " ")
		status, headers := "401 Unauthorized", "WWW-Authenticate: Basic realm=\"x\", "+s.scheme+"\r\n"
		switch {
		case message == "begin":
			challenged = true
			headers = "WWW-Authenticate: " + s.scheme + " challenge\r\n"
		case message != "" && challenged:
			user, challenged = message, false
			s.mu.Lock()
			s.conns[user] = conn
			s.mu.Unlock()
			headers = s.closing
		}
		if user != "" {
			status, headers = "200 OK", s.closing
		}
		body := "hello " + user
		if _, err := io.WriteString(conn, "HTTP/1.1 "+status+"\r\n"+headers+"Content-Length: "+strconv.Itoa(len(body))+"\r\n\r\n"+body); err != nil {
			return
		}
	}
}

// end closes the connection of a user.
func (s *loginServer) end(user string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.conns[user].CloseWrite()
}

func newLoginServer(t *testing.T, scheme string) (*loginServer, string) {
	s := &loginServer{scheme: scheme, conns: map[string]*net.TCPConn{}, ended: make(chan string, 1000)}
	return s, serve(t, s.handle)
}

// A session is a connection of a client, for several requests.
type session struct {
	*net.TCPConn
	r *bufio.Reader
}

func (p *testProxy) session(t *testing.T) *session {
	conn := p.connect(t)
	return &session{conn, bufio.NewReader(conn)}
}

// ask sends a request and returns the status and the body, or 0 after the end of the
// connection.
func (s *session) ask(t *testing.T, method, server, headers string) (int, string) {
	t.Helper()
	_, _ = io.WriteString(s, method+" http://"+server+"/ HTTP/1.1\r\nHost: x\r\n"+headers+"\r\n")
	response, err := http.ReadResponse(s.r, nil)
	if err != nil {
		if isTimeout(err) {
			t.Fatal(err)
		}
		return 0, ""
	}
	body, err := io.ReadAll(response.Body)
	check(t, err)
	return response.StatusCode, string(body)
}

func (s *session) want(t *testing.T, method, server, headers string, status int, body string) {
	t.Helper()
	if gotStatus, got := s.ask(t, method, server, headers); gotStatus != status || got != body {
		t.Fatalf("%s %s, %q: %d %q, want %d %q", method, server, headers, gotStatus, got, status, body)
	}
}

// login authenticates the connection.
func (s *session) login(t *testing.T, server, scheme, user string) {
	t.Helper()
	s.want(t, "GET", server, "", 401, "hello ")
	s.want(t, "GET", server, "Authorization: "+scheme+" begin\r\n", 401, "hello ")
	s.want(t, "POST", server, "Authorization: "+scheme+" "+user+"\r\nContent-Length: 0\r\n", 200, "hello "+user)
}

// A server connection that one client has authenticated serves no other client, and all
// requests of its own client.
func TestLogins(t *testing.T) {
	for _, scheme := range []string{"NTLM", "negotiate"} {
		t.Run(scheme, func(t *testing.T) {
			_, server := newLoginServer(t, scheme)
			other, elsewhere := newLoginServer(t, scheme)
			p := start(t, "*", nil, nil)
			alice := p.session(t)
			alice.login(t, server, scheme, "alice")
			for range 5 {
				p.session(t).want(t, "GET", server, "", 401, "hello ")
				alice.want(t, "GET", server, "", 200, "hello alice")
				alice.want(t, "POST", server, "Content-Length: 0\r\n", 200, "hello alice")
			}
			// Another server, with a login or without, is no obstacle.
			alice.login(t, elsewhere, scheme, "al")
			alice.want(t, "GET", server, "", 200, "hello alice")
			alice.want(t, "GET", elsewhere, "", 200, "hello al")
			p.session(t).want(t, "GET", elsewhere, "", 401, "hello ")
			alice.Close() // and its server connections
			for user := ""; user != "al"; {
				user = <-other.ended
			}
		})
	}
}

// Many clients log in at the same time.
func TestLoginsAtOnce(t *testing.T) {
	_, server := newLoginServer(t, "NTLM")
	p := start(t, "*", nil, nil)
	var clients sync.WaitGroup
	for _, user := range []string{"alice", "bob", "carol", "dave", ""} {
		clients.Go(func() {
			for range 20 {
				s := p.session(t)
				if user == "" {
					if status, body := s.ask(t, "GET", server, ""); status != 401 {
						t.Errorf("without credentials: %d %q", status, body)
					}
				} else {
					for _, message := range []string{"begin", user, ""} {
						headers := ""
						if message != "" {
							headers = "Authorization: NTLM " + message + "\r\n"
						}
						status, body := s.ask(t, "GET", server, headers)
						if want := map[bool]string{true: "hello ", false: "hello " + user}[message == "begin"]; body != want {
							t.Errorf("%s, %q: %d %q", user, message, status, body)
						}
					}
				}
				s.Close()
			}
		})
	}
	clients.Wait()
}

// The connection of a client ends with the server's that it has authenticated.
func TestLoginEnds(t *testing.T) {
	t.Run("between two requests", func(t *testing.T) {
		s, server := newLoginServer(t, "NTLM")
		alice := start(t, "*", nil, nil).session(t)
		alice.login(t, server, "NTLM", "alice")
		s.end("alice")
		wantEnd(t, alice.r, "")
	})
	t.Run("with the response", func(t *testing.T) {
		s, server := newLoginServer(t, "NTLM")
		s.closing = "Connection: close\r\n"
		alice := start(t, "*", nil, nil).session(t)
		alice.login(t, server, "NTLM", "alice")
		wantEnd(t, alice.r, "")
	})
	t.Run("during a request to another server", func(t *testing.T) {
		s, server := newLoginServer(t, "NTLM")
		asked, answer := make(chan struct{}), make(chan struct{})
		slow := serve(t, func(conn *net.TCPConn) {
			header(conn)
			close(asked)
			<-answer
			send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
		})
		p := start(t, "*", nil, nil)
		alice := p.session(t)
		alice.login(t, server, "NTLM", "alice")
		var lost *clientConn // the only one
		clients := p.listener.Load().shares
		clients.mu.Lock()
		for _, conns := range clients.of {
			for lost = range conns {
			}
		}
		clients.mu.Unlock()
		go func() {
			<-asked
			s.end("alice")
			await(lost.logins.lost.Load)
			close(answer)
		}()
		alice.want(t, "GET", slow, "", 200, "hi")
		wantEnd(t, alice.r, "")
	})
}

// Each request reaches its server once, although the server closes each kept connection
// at the moment of the next request: one that may be repeated is, others have a new
// connection.
func TestServerClosesKept(t *testing.T) {
	for _, request := range []string{
		"GET", "HEAD", "OPTIONS", "DELETE", "PROPFIND", "POST", "POST Content-Length: 0\r\n", "POST Content-Length: 2\r\n\r\nhi",
		"PUT Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n", "PATCH Content-Length: 2\r\n\r\nhi", "GET Content-Length: 2\r\n\r\nhi",
	} {
		t.Run(strings.Map(func(r rune) rune {
			if r < ' ' {
				return '_'
			}
			return r
		}, request), func(t *testing.T) {
			method, rest, _ := strings.Cut(request, " ")
			var mu sync.Mutex
			ran := 0
			// It responds once, and closes when it has received the next request.
			server := serve(t, func(conn *net.TCPConn) {
				r := bufio.NewReader(conn)
				for n := range 2 {
					got, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					body, _ := io.ReadAll(got.Body)
					if len(body) != 0 && string(body) != "hi" {
						t.Errorf("the server got %q", body)
					}
					if n == 1 {
						if !isSafe(got.Method) || len(body) > 0 {
							t.Errorf("%s came on a kept connection", got.Method)
						}
						return
					}
					mu.Lock()
					ran++
					mu.Unlock()
					send(t, conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
				}
			})
			p := start(t, "*", nil, nil)
			const rounds = 10
			for range rounds {
				s := p.session(t)
				s.want(t, "GET", server, "", 200, "")
				_, _ = io.WriteString(s, method+" http://"+server+"/ HTTP/1.1\r\nHost: x\r\n"+rest+"\r\n")
				response, err := http.ReadResponse(s.r, &http.Request{Method: method})
				check(t, err)
				if response.StatusCode != 200 {
					t.Fatalf("status %d", response.StatusCode)
				}
				s.Close()
			}
			mu.Lock()
			defer mu.Unlock()
			if ran != 2*rounds {
				t.Errorf("the server ran %d requests, want %d", ran, 2*rounds)
			}
		})
	}
}
