package limit

import (
	"fmt"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// An addressed is one end of a pipe, with the address of a client.
type addressed struct {
	net.Conn
	client string
}

func (a addressed) RemoteAddr() net.Addr {
	return &net.TCPAddr{IP: net.ParseIP(a.client), Port: 40000}
}

// A source is a listener to which a test passes connections.
type source struct {
	net.Listener
	conns chan net.Conn
	close func() // once
}

func (s *source) Accept() (net.Conn, error) {
	conn, ok := <-s.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (s *source) Close() error {
	s.close()
	return nil
}

// A server holds the connections that a Listener accepts.
type server struct {
	t        *testing.T
	source   *source
	listener *Listener
	conns    map[string]*Conn // by name
}

// inBubble tests with a server that has 4 slots, of which a client's share is 2.
func inBubble(t *testing.T, test func(*server)) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{conns: make(chan net.Conn)}
		s.close = sync.OnceFunc(func() { close(s.conns) })
		test(&server{t, s, New(s, 4, 2), make(map[string]*Conn)})
	})
}

// connect opens a connection. A millisecond passes before, so that there is an order.
func (s *server) connect(client, name string) {
	s.t.Helper()
	time.Sleep(time.Millisecond)
	_, far := net.Pipe()
	go func() { s.source.conns <- addressed{far, client} }()
	conn, err := s.listener.Accept()
	if err != nil {
		s.t.Fatal(err)
	}
	s.conns[name] = conn.(*Conn)
}

// wantClosed checks which connections, in their order, were closed since the last call.
func (s *server) wantClosed(names ...string) {
	s.t.Helper()
	synctest.Wait() // for blocked writes
	var got []string
	for _, name := range []string{"a", "b", "c", "d", "e", "f", "g"} {
		c := s.conns[name]
		if c == nil {
			continue
		}
		s.listener.mu.Lock()
		_, open := s.listener.conns[c]
		s.listener.mu.Unlock()
		if !open {
			got = append(got, name)
			delete(s.conns, name)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(names) {
		s.t.Errorf("closed: %q, want %q", got, names)
	}
}

// write writes an answer that nobody reads.
func (s *server) write(name string) {
	c := s.conns[name]
	c.Busy()
	go func() {
		_, _ = c.Write([]byte("answer"))
		c.Idle()
	}()
	synctest.Wait()
}

func (s *server) end() {
	for _, c := range s.conns {
		_ = c.Close()
	}
	_ = s.listener.Close()
	if len(s.listener.conns) > 0 || len(s.listener.clients) > 0 {
		s.t.Errorf("%d connections of %v remain", len(s.listener.conns), s.listener.clients)
	}
}

// The oldest connection that waits for a request is closed.
func TestOldest(t *testing.T) {
	inBubble(t, func(s *server) {
		defer s.end()
		for i, name := range []string{"a", "b", "c", "d"} {
			s.connect(fmt.Sprintf("10.0.0.%d", i), name)
		}
		s.conns["a"].Busy()
		s.wantClosed()
		s.connect("10.0.0.9", "e")
		s.wantClosed("b")
		s.conns["a"].Idle() // it is the latest now
		s.connect("10.0.0.9", "f")
		s.wantClosed("c")
		_ = s.conns["d"].Close()
		s.wantClosed("d")
		s.connect("10.0.0.9", "g")
		s.wantClosed()
	})
}

// A client with more than its share loses its own first.
func TestShare(t *testing.T) {
	for _, clients := range [][2]string{{"10.0.0.1", "10.0.0.2"}, {"2001:db8::1", "2001:db8:0:1::1"}} {
		inBubble(t, func(s *server) {
			defer s.end()
			s.connect(clients[0], "a")
			for _, name := range []string{"b", "c", "d"} {
				s.connect(clients[1], name)
			}
			s.connect(clients[1], "e")
			s.wantClosed("b")
			s.connect(clients[0], "f")
			s.wantClosed("c")
			s.connect(clients[0], "g") // both have their share
			s.wantClosed("a")
		})
	}
}

// An answer that is not read for a second goes before those who wait for their request,
// and one that is being read after them.
func TestAnswers(t *testing.T) {
	inBubble(t, func(s *server) {
		defer s.end()
		for i, name := range []string{"a", "b", "c", "d"} {
			s.connect(fmt.Sprintf("10.0.0.%d", i), name)
		}
		s.write("a")
		s.connect("10.0.0.5", "e")
		s.wantClosed("b")
		time.Sleep(stalled)
		s.write("c")
		s.connect("10.0.0.6", "f")
		s.wantClosed("a")
		s.connect("10.0.0.7", "g")
		s.wantClosed("d")
	})
}

// A request that is being processed keeps its connection: a new one waits for the first
// that ends, or for the end of the listener.
func TestBusy(t *testing.T) {
	inBubble(t, func(s *server) {
		defer s.end()
		for i, name := range []string{"a", "b", "c", "d"} {
			s.connect(fmt.Sprintf("10.0.0.%d", i), name)
			s.conns[name].Busy()
		}
		time.AfterFunc(time.Minute, s.conns["c"].Idle)
		begin := time.Now()
		s.connect("10.0.0.5", "e")
		if took := time.Since(begin).Truncate(time.Second); took != time.Minute {
			t.Errorf("it got its slot after %s", took)
		}
		s.wantClosed("c")
		s.conns["e"].Busy()
		_, far := net.Pipe()
		go func() { s.source.conns <- addressed{far, "10.0.0.6"} }()
		go func() {
			synctest.Wait()
			_ = s.listener.Close()
		}()
		if conn, err := s.listener.Accept(); err == nil {
			t.Errorf("after the end %v is accepted", conn)
		}
	})
}
