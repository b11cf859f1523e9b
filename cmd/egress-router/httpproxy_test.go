package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// proxyAddr is where the clients of a pod's HTTP proxy connect.
var proxyAddr = netip.AddrPortFrom(lab.RouterAddr, 8080)

// httpProxy starts the HTTP proxy as the pod's second container, without any
// privilege, and waits until it listens.
func httpProxy(p *labtest.Pod, rules string, at netip.AddrPort) (*exec.Cmd, *bytes.Buffer) {
	p.Helper()
	p.Env["EGRESS_ROUTER_MODE"] = "http-proxy"
	p.OK()
	cmd := p.Command("without-privilege", "http-proxy")
	cmd.Env = append(cmd.Env, "EGRESS_HTTP_PROXY_DESTINATION="+rules, fmt.Sprintf("EGRESS_HTTP_PROXY_LISTEN=:%d", at.Port()))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := p.Lab.Start(p.Lab.Router, cmd); err != nil {
		p.Fatal(err)
	}
	p.Until("the proxy listens", func() bool { return opens(p, p.Lab.Client, at.Addr(), at.Port(), labtest.Patience) })
	return cmd, &stderr
}

// request sends a request to the proxy and returns its response.
func request(p *labtest.Pod, from *netns.Namespace, proxy netip.AddrPort, text string) *bufio.Reader {
	p.Helper()
	conn := p.Dial(from, "tcp", proxy)
	if err := conn.SetDeadline(time.Now().Add(labtest.Patience)); err != nil {
		p.Fatal(err)
	}
	if _, err := io.WriteString(conn, text); err != nil {
		p.Fatal(err)
	}
	return bufio.NewReader(conn)
}

// wantTunnel makes a tunnel and checks who answers at its end, and whom that
// server saw.
func wantTunnel(p *labtest.Pod, from *netns.Namespace, to, server string) {
	p.Helper()
	r := request(p, from, proxyAddr, "CONNECT "+to+" HTTP/1.1\r\n\r\n")
	for _, want := range []string{"HTTP/1.1 200 Connection established\r\n", "\r\n"} {
		if line, err := r.ReadString('\n'); line != want {
			p.Fatalf("%s: got %q, %v", to, line, err)
		}
	}
	if a, err := lab.ReadAnswer(r); err != nil || a.Peer.Addr() != lab.Source || a.Server.String() != server {
		p.Errorf("%s: %v, %v; want %s, which sees %s", to, a, err, server, lab.Source)
	}
}

// wantProxyError requests an unreachable host and checks the status and text of the
// proxy's response.
func wantProxyError(p *labtest.Pod, host string, status int, text string) {
	p.Helper()
	response, err := http.ReadResponse(request(p, p.Lab.Client, proxyAddr, "GET http://"+host+"/ HTTP/1.1\r\nHost: x\r\n\r\n"), nil)
	if err != nil {
		p.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	if want := "egress-router: " + text + "\n"; response.StatusCode != status || string(body) != want || err != nil {
		p.Errorf("%s: %d %q, %v; want %d %q", host, response.StatusCode, body, err, status, want)
	}
}

// wantNoUseFromOutside checks that a listening port of the pod is reachable from the
// cluster, but not from the physical network at either address, and that it is
// reachable from there without the rules. It removes them.
func wantNoUseFromOutside(p *labtest.Pod, port uint16) {
	p.Helper()
	wantClusterOnly(p, port)
	p.Clear()
	if !opens(p, p.Lab.Outside, lab.Source, port, labtest.Patience) {
		p.Errorf("port %d of %s is closed to the physical network without the rules, too", port, lab.Source)
	}
}

// wantClusterOnly checks that a port of the pod is open to the cluster, and closed to
// the physical network.
func wantClusterOnly(p *labtest.Pod, port uint16) {
	p.Helper()
	p.AddRoute(p.Lab.Outside, lab.LANLink, "10.128.0.0/23", lab.Source.String())
	if !opens(p, p.Lab.Client, lab.RouterAddr, port, labtest.Patience) {
		p.Errorf("port %d is closed to the cluster", port)
	}
	for _, a := range []netip.Addr{lab.Source, lab.RouterAddr} {
		if opens(p, p.Lab.Outside, a, port, labtest.Silence) {
			p.Errorf("port %d of %s is open to the physical network", port, a)
		}
	}
}

// opens reports whether a connection can be opened in time.
func opens(p *labtest.Pod, from *netns.Namespace, a netip.Addr, port uint16, patience time.Duration) bool {
	ctx, cancel := context.WithTimeout(p.Context(), patience)
	defer cancel()
	conn, err := p.Lab.Dial(ctx, from, "tcp", netip.AddrPortFrom(a, port))
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// The HTTP proxy runs without privilege, after an init container with it, and
// servers see the reserved address.
func TestHTTPProxyInPod(t *testing.T) {
	t.Parallel()
	for _, b := range []labtest.Backend{labtest.IptablesNFT, labtest.Nftables} {
		t.Run(b.Name, func(t *testing.T) {
			t.Parallel()
			testHTTPProxy(labtest.New(t, lab.Options{}, b))
		})
	}
}

func testHTTPProxy(p *labtest.Pod) {
	t := p.T
	p.Env["EGRESS_ACCESS_LOG"] = "true"
	p.Env["EGRESS_HTTP_PROXY_CONNECT_TIMEOUT"] = "60s" // for a busy machine to look a name up
	n := serveNames(p)
	n.set("www.example.com.", "203.0.113.25")
	n.set("mixed.example.com.", "203.0.113.25", "203.0.113.26") // the second is denied
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s\n", r.RemoteAddr)
	})}
	if err := p.Lab.Outside.Do(func() error {
		l, err := net.Listen("tcp4", "203.0.113.25:8081")
		if err == nil {
			go func() { _ = server.Serve(l) }()
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	cmd, stderr := httpProxy(p, "!203.0.113.26\n203.0.113.0/24\n192.168.12.80\n10.0.0.0/8\n*.example.com", proxyAddr)
	for name, from := range map[string]*netns.Namespace{"client": p.Lab.Client, "far": p.Lab.Far} {
		t.Run(name, func(t *testing.T) {
			p := p.For(t)
			r := request(p, from, proxyAddr, "GET http://203.0.113.25:8081/ HTTP/1.1\r\nHost: x\r\n\r\n")
			response, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(response.Body)
			if !strings.HasPrefix(string(body), lab.Source.String()+":") || err != nil {
				t.Errorf("the server saw %q, %v; want %s", body, err, lab.Source)
			}
			for _, to := range []string{"203.0.113.25:80", "203.0.113.27:9000", "192.168.12.80:80"} {
				wantTunnel(p, from, to, to)
			}
			// The rules deny the first, the proxy its own addresses.
			for _, to := range []string{"203.0.113.26:80", "10.128.0.98:8080", "192.168.12.99:8080", "127.0.0.1:8080"} {
				r := request(p, from, proxyAddr, "CONNECT "+to+" HTTP/1.1\r\n\r\n")
				if line, err := r.ReadString('\n'); line != "HTTP/1.1 403 Forbidden\r\n" {
					t.Errorf("%s: got %q, %v", to, line, err)
				}
			}
		})
	}
	t.Run("names", func(t *testing.T) {
		p := p.For(t)
		wantTunnel(p, p.Lab.Client, "www.example.com:80", "203.0.113.25:80")
		wantProxyError(p, "mixed.example.com", 403, "mixed.example.com (203.0.113.26) is denied by rule 1: !203.0.113.26")
		wantProxyError(p, "gone.example.com", 502, "looking up gone.example.com: no such name")
		n.setSilent(true)
		wantProxyError(p, "late.example.com", 504, "looking up late.example.com: no answer from the name servers")
	})
	n.wantAskedBy(t, lab.RouterAddr)
	wantNoUseFromOutside(p, 8080)

	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v, want exit code 0", err)
	}
	for _, want := range []string{
		"msg=ready", "msg=access client=10.128.0.71:", "destination=203.0.113.25:8081 address=203.0.113.25:8081 rule=203.0.113.0/24 status=200",
		"destination=203.0.113.26:80 rule=!203.0.113.26 status=403", "msg=stopping",
	} {
		if !strings.Contains(stderr.String(), want) {
			t.Errorf("stderr lacks %q:\n%s", want, labtest.Tail(stderr.String()))
		}
	}
}

// Ten thousand clients that send nothing, or too little, do not delay another one.
func TestHTTPProxyWithIdleClients(t *testing.T) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	clients := int(min(10000, limit.Cur/2))
	p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
	p.Env["EGRESS_HTTP_PROXY_HEADER_TIMEOUT"] = "1h"
	cmd, stderr := httpProxy(p, "203.0.113.25", proxyAddr)
	idle := netip.AddrPortFrom(lab.RouterAddr, 8081)
	httpProxy(p, "203.0.113.25", idle) // without other clients, for comparison
	begins := []string{"", "GET http://203.0.113.25/ HTTP/1.1\r\nHost:", "GET http://192.0.2.1/ HTTP/1.1\r\nHost: x\r\n\r\n"}
	var dialing sync.WaitGroup
	conns := make([]net.Conn, clients)
	const workers = 4
	for w := range workers {
		dialing.Go(func() {
			for i := w; i < clients; i += workers {
				// The kernel tries a connection again after a second if the accept
				// queue is full (RFC 6298, section 2).
				patient, cancel := context.WithTimeout(t.Context(), labtest.Patience)
				conn, err := p.Lab.Dial(patient, p.Lab.Client, "tcp", proxyAddr)
				cancel()
				if err == nil {
					_, err = io.WriteString(conn, begins[i%len(begins)])
					conns[i] = conn
				}
				if err != nil {
					t.Errorf("client %d: %v", i, err)
					return
				}
			}
		})
	}
	dialing.Wait()
	defer func() {
		for _, conn := range conns {
			if conn != nil {
				conn.Close()
			}
		}
	}()
	tunnel := func(proxy netip.AddrPort) time.Duration {
		begin := time.Now()
		r := request(p, p.Lab.Client, proxy, "CONNECT 203.0.113.25:80 HTTP/1.1\r\n\r\n")
		if line, err := r.ReadString('\n'); line != "HTTP/1.1 200 Connection established\r\n" {
			t.Errorf("got %q, %v", line, err)
		}
		return time.Since(begin)
	}
	tunnel(proxyAddr) // waits behind all that the proxy still accepts
	const times = 31
	var busy, free []time.Duration
	for range times { // in turn, so that both have the same load of the machine
		busy, free = append(busy, tunnel(proxyAddr)), append(free, tunnel(idle))
	}
	slices.Sort(busy)
	slices.Sort(free)
	memory := residentMemory(t, cmd.Process.Pid)
	t.Logf("%d idle clients: another is served in %s, without them in %s; the process has %d MB", clients, busy[times/2], free[times/2], memory>>20)
	if busy[times/2] > 10*free[times/2] {
		t.Errorf("with %d idle clients a tunnel takes %s, without them %s; want at most ten times that", clients, busy[times/2], free[times/2])
	}
	if memory > 160<<20 {
		t.Errorf("with %d idle clients the process has %d MB, want at most 160", clients, memory>>20)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if strings.Contains(stderr.String(), "level=WARN") {
		t.Errorf("stderr has a warning, want none:\n%s", labtest.Tail(stderr.String()))
	}
}

// residentMemory returns how many bytes of memory a process has (proc(5)).
func residentMemory(t *testing.T, pid int) int {
	t.Helper()
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}
