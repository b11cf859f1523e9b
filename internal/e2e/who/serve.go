package who

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"

	"github.com/egress-router/egress-router/internal/netns"
)

// ServeHTTP starts a server at an address of a namespace. Like the other servers it
// runs until the process ends.
func ServeHTTP(ns *netns.Namespace, addr string) error {
	listener, err := listenTCP(ns, addr)
	if err != nil {
		return fmt.Errorf("serving %q: %w", addr, err)
	}
	go func() { _ = http.Serve(listener, http.HandlerFunc(answer)) }()
	return nil
}

// ServeHTTPS is ServeHTTP with TLS and a test certificate.
func ServeHTTPS(ns *netns.Namespace, addr string) error {
	listener, err := listenTCP(ns, addr)
	if err != nil {
		return fmt.Errorf("serving %q: %w", addr, err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(answer))
	_ = server.Listener.Close()
	server.Listener = listener
	server.StartTLS()
	return nil
}

func answer(w http.ResponseWriter, r *http.Request) {
	local := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	fmt.Fprintln(w, Answer{netip.MustParseAddrPort(local.String()), netip.MustParseAddrPort(r.RemoteAddr).Addr()})
}

// ServeUDP starts a server for datagrams.
func ServeUDP(ns *netns.Namespace, addr string) error {
	at, err := netip.ParseAddrPort(addr)
	if err != nil {
		return err
	}
	return ServeDatagrams(ns, addr, func(_ []byte, peer netip.AddrPort) ([]byte, error) {
		return fmt.Appendln(nil, Answer{at, peer.Addr()}), nil
	})
}

// ServeDatagrams starts a server that answers each datagram with one. If answer returns
// an error there is none.
func ServeDatagrams(ns *netns.Namespace, addr string, answer func(question []byte, peer netip.AddrPort) ([]byte, error)) error {
	conn, err := listen(ns, func() (net.PacketConn, error) { return net.ListenPacket("udp4", addr) })
	if err != nil {
		return fmt.Errorf("serving %q: %w", addr, err)
	}
	go func() {
		buf := make([]byte, 2048)
		for {
			n, peer, err := conn.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			} else if err != nil {
				continue
			}
			if text, err := answer(buf[:n], peer.(*net.UDPAddr).AddrPort()); err == nil {
				_, _ = conn.WriteTo(text, peer)
			}
		}
	}()
	return nil
}

// listenTCP listens for plain TCP, without the Multipath TCP that Go would add.
func listenTCP(ns *netns.Namespace, addr string) (net.Listener, error) {
	return listen(ns, func() (net.Listener, error) {
		var config net.ListenConfig
		config.SetMultipathTCP(false)
		return config.Listen(context.Background(), "tcp", addr)
	})
}

// listen opens a socket in a namespace.
func listen[T any](ns *netns.Namespace, open func() (T, error)) (opened T, err error) {
	err = ns.Do(func() (err error) {
		opened, err = open()
		return err
	})
	return opened, err
}
