package httpproxy

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Requests of curl to servers with and without TLS.
func TestCurl(t *testing.T) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Errorf("the server reads %v", err)
		}
		w.Header().Set("X-Saw", fmt.Sprintf("%s %s %d %v", r.Method, r.RequestURI, len(body), r.TransferEncoding))
		_, _ = io.WriteString(w, "hello\n")
	})
	serve := func(start func(*httptest.Server)) *httptest.Server {
		s := httptest.NewUnstartedServer(handler)
		l, err := net.Listen("tcp", "203.0.113.1:0")
		check(t, err)
		s.Listener.Close()
		s.Listener = l
		start(s)
		t.Cleanup(s.Close)
		return s
	}
	plain, secure := serve((*httptest.Server).Start), serve((*httptest.Server).StartTLS)
	// The name in the certificate of httptest.
	at := func(s *httptest.Server) string {
		_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
		return "example.com:" + port
	}
	dir := t.TempDir()
	certificate, large := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "large")
	check(t, os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o644))
	check(t, os.WriteFile(large, make([]byte, 3<<20), 0o644))
	p := start(t, "!denied.example\n*", zone{"example.com": {"203.0.113.1"}}, func(p *Proxy) {
		p.tls.RootCAs = secure.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	})
	http, https := "http://"+at(plain), "https://"+at(secure)
	for name, test := range map[string]struct {
		args string
		want []string // in the output of curl
		exit int
	}{
		"GET":              {http + "/a?b", []string{"HTTP/1.1 200 OK", "X-Saw: GET /a?b 0 []", "Via: 1.1 egress-router", "hello\n"}, 0},
		"TLS in a tunnel":  {https + "/a?b", []string{"HTTP/1.1 200 Connection established", "X-Saw: GET /a?b 0 []", "hello\n"}, 0},
		"a tunnel for all": {"--proxytunnel " + http + "/", []string{"HTTP/1.1 200 Connection established", "X-Saw: GET / 0 []", "hello\n"}, 0},
		"HTTP/1.0":         {"--http1.0 " + http + "/", []string{"HTTP/1.0 200 OK", "X-Saw: GET / 0 []", "hello\n"}, 0},
		"a large body":     {"--data-binary @" + large + " " + http + "/", []string{"X-Saw: POST / 3145728 []"}, 0},
		"a body in chunks": {"--header Transfer-Encoding:chunked --data-binary @" + large + " " + http + "/", []string{"X-Saw: POST / 3145728 [chunked]"}, 0},
		"over TLS":         {"--data-binary @" + large + " " + https + "/", []string{"X-Saw: POST / 3145728 []"}, 0},
		"PUT that expects": {"--header Expect:100-continue --upload-file " + large + " " + http + "/", []string{"X-Saw: PUT /large 3145728 []"}, 0},
		"HEAD":             {"--head " + http + "/", []string{"X-Saw: HEAD / 0 []"}, 0},
		"an address":       {"http://" + plain.Listener.Addr().String() + "/", []string{"X-Saw: GET / 0 []"}, 0},
		"denied":           {"http://denied.example/", []string{"HTTP/1.1 403 Forbidden", "egress-router: denied.example is denied by rule 1: !denied.example\n"}, 0},
		"denied with TLS":  {"https://denied.example/", []string{"HTTP/1.1 403 Forbidden"}, 56},
		"an upgrade to h2": {"--http2 " + http + "/", []string{"HTTP/1.1 200 OK", "X-Saw: GET / 0 []"}, 0},
		"twice":            {http + "/1 " + http + "/2", []string{"X-Saw: GET /1 0 []", "X-Saw: GET /2 0 []"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			args := append([]string{"--silent", "--show-error", "--include", "--max-time", "60", "--proxy", "http://" + p.addr, "--cacert", certificate}, strings.Fields(test.args)...)
			curl := exec.Command("curl", args...)
			curl.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}
			var stdout, stderr bytes.Buffer
			curl.Stdout, curl.Stderr = &stdout, &stderr
			err := curl.Run()
			if curl.ProcessState == nil {
				t.Fatalf("starting curl: %v (.ci/install curl)", err)
			}
			if got := curl.ProcessState.ExitCode(); got != test.exit {
				t.Errorf("exit code %d, want %d: %s", got, test.exit, &stderr)
			}
			got := strings.ReplaceAll(stdout.String(), "\r\n", "\n")
			for _, want := range test.want {
				if !strings.Contains(got, want) {
					t.Errorf("got %q, want it to contain %q", got, want)
				}
			}
		})
	}
	t.Run("https in absolute form", func(t *testing.T) {
		conn := p.connect(t)
		send(t, conn, "GET "+https+"/x HTTP/1.1\r\nHost: x\r\n\r\n")
		if status, text := answer(t, conn); status != 200 || text != "hello\n" {
			t.Errorf("%d %q", status, text)
		}
	})
	t.Run("with an untrusted certificate", func(t *testing.T) {
		conn := start(t, "*", zone{"example.com": {"203.0.113.1"}}, nil).connect(t)
		send(t, conn, "GET "+https+"/x HTTP/1.1\r\nHost: x\r\n\r\n")
		if status, text := answer(t, conn); status != 502 || !strings.Contains(text, "certificate") {
			t.Errorf("%d %q", status, text)
		}
	})
}
