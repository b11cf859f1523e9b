package endpoints

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// patience ends a test that hangs. No test measures time by it.
const patience = 10 * time.Minute

// never is the interval of what a test does not want to happen.
const never = 1000 * time.Hour

// A server is an API server. It treats resourceVersion, uid, force and a patch without
// effect as that of Kubernetes 1.34 does, which was tried with curl.
type server struct {
	t    *testing.T
	http *httptest.Server

	mu       sync.Mutex
	changed  chan struct{} // closed at the next change
	service  string        // JSON; empty: there is none
	slices   map[string]*slice
	versions int
	token    string
	requests []string                                          // METHOD NAME, in the order of their arrival
	before   func(w http.ResponseWriter, r *http.Request) bool // called without mu; reports whether it has answered
	clients  map[string]bool                                   // addresses with ports: one for each connection
}

const plain = `{"metadata": {"namespace": "egress", "uid": "uid-service"}, "spec": {"type": "ClusterIP", "ipFamilies": ["IPv4"],
	"ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}, {"name": "dns", "protocol": "UDP", "port": 53}]}}`

func newServer(t *testing.T) *server {
	t.Helper()
	return newServerAt(t, nil)
}

// newServerAt returns a server at a listener; nil: one of the loopback network.
func newServerAt(t *testing.T, l net.Listener) *server {
	t.Helper()
	s := &server{t: t, changed: make(chan struct{}), service: plain, slices: map[string]*slice{}, versions: 100, token: "first", clients: map[string]bool{}}
	s.http = httptest.NewUnstartedServer(s)
	if l != nil {
		s.http.Listener.Close()
		s.http.Listener = l
	}
	s.http.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	s.http.StartTLS()
	t.Cleanup(s.http.Close)
	return s
}

// account writes the files of a service account, and returns their directory.
func (s *server) account() string {
	dir := s.t.TempDir()
	s.write(dir, "namespace", "egress")
	s.write(dir, "token", s.token+"\n")
	s.write(dir, "ca.crt", encode(s.http.Certificate().Raw))
	return dir
}

func (s *server) write(dir, file, content string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "new"), []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, file)); err != nil {
		s.t.Fatal(err)
	}
}

// change runs f while no request is handled.
func (s *server) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	s.notify()
}

func (s *server) notify() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// await waits until the state of the server fulfils a condition.
func (s *server) await(what string, done func() bool) {
	s.t.Helper()
	limit := time.After(patience)
	for {
		s.mu.Lock()
		ok, changed := done(), s.changed
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-limit:
			s.t.Fatalf("not seen: %s; requests: %q", what, s.requests)
		}
	}
}

// leads returns the addresses of a slice; nil: there is no slice. It needs mu.
func (s *server) leads(name string) []string {
	one := s.slices[name]
	if one == nil {
		return nil
	}
	to := []string{}
	for _, e := range one.Endpoints {
		to = append(to, fmt.Sprint(e.Addresses))
	}
	return to
}

// awaitHolder waits until the IPv4 slice leads to an address.
func (s *server) awaitHolder(address string) {
	s.t.Helper()
	s.await("the slice leads to "+address, func() bool { return s.holder() == address })
}

// holder returns the only address of the IPv4 slice. It needs mu.
func (s *server) holder() string {
	if to := s.leads("web-egress-router"); len(to) == 1 {
		return strings.Trim(to[0], "[]")
	}
	return ""
}

// count returns the number of requests of a method. It needs mu.
func (s *server) count(method string) int {
	n := 0
	for _, r := range s.requests {
		if strings.HasPrefix(r, method+" ") {
			n++
		}
	}
	return n
}

// fail makes the next n requests of a method fail.
func (s *server) fail(method string, n, code int, header ...string) {
	s.change(func() {
		s.before = func(w http.ResponseWriter, r *http.Request) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			if r.Method != method || n == 0 {
				return false
			}
			n--
			if len(header) == 2 {
				w.Header().Set(header[0], header[1])
			}
			refuse(w, code, fmt.Sprintf("refused with %d", code))
			return true
		}
	})
}

func refuse(w http.ResponseWriter, code int, message string) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "message": message, "code": code})
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	patch := new(slice)
	if r.Method == http.MethodPatch {
		if err := json.NewDecoder(r.Body).Decode(patch); err != nil {
			s.t.Errorf("body of a patch: %v", err)
		}
	}
	s.mu.Lock()
	s.requests = append(s.requests, r.Method+" "+name)
	s.clients[r.RemoteAddr] = true
	before := s.before
	s.notify()
	s.mu.Unlock()
	if before != nil && before(w, r) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.notify()
	const slices = "/apis/discovery.k8s.io/v1/namespaces/egress/endpointslices/"
	switch {
	case r.Header.Get("Authorization") != "Bearer "+s.token:
		refuse(w, http.StatusUnauthorized, "Unauthorized")
	case r.Method == http.MethodGet && r.URL.Path == "/api/v1/namespaces/egress/services/web" && s.service != "":
		_, _ = w.Write([]byte(s.service))
	case r.Method == http.MethodGet && r.URL.Path == slices+name && s.slices[name] != nil:
		_ = json.NewEncoder(w).Encode(s.slices[name])
	case r.Method == http.MethodPatch && r.URL.Path == slices+name && name == patch.Metadata.Name && r.URL.RawQuery == "fieldManager=egress-router&force=true" && r.Header.Get("Content-Type") == "application/apply-patch+yaml":
		s.apply(w, patch)
	default:
		refuse(w, http.StatusNotFound, fmt.Sprintf("%s %s not found", r.Method, r.URL))
	}
}

// apply applies a patch.
func (s *server) apply(w http.ResponseWriter, patch *slice) {
	old, sent := s.slices[patch.Metadata.Name], patch.Metadata.revision
	switch {
	case old == nil && sent.UID != "":
		refuse(w, http.StatusConflict, "uid mismatch")
		return
	case old != nil && (sent.ResourceVersion != "" && sent.ResourceVersion != old.Metadata.ResourceVersion || sent.UID != "" && sent.UID != old.Metadata.UID):
		refuse(w, http.StatusConflict, "the object has been modified")
		return
	case old != nil:
		patch.Metadata.revision = old.Metadata.revision
		if patch.text() == old.text() {
			_ = json.NewEncoder(w).Encode(old)
			return
		}
	default:
		patch.Metadata.UID = "uid-" + strconv.Itoa(s.versions)
		defer w.WriteHeader(http.StatusCreated)
	}
	s.versions++
	patch.Metadata.ResourceVersion = strconv.Itoa(s.versions)
	s.slices[patch.Metadata.Name] = patch
	_ = json.NewEncoder(w).Encode(patch)
}

// A running Writer, and its log.
type running struct {
	*Writer
	log  *book
	stop func() // returns when Run has
}

// start runs a Writer of a router with addresses of the loopback network, which nothing
// wakes but Hold and Release.
func (s *server) start(addresses string, adapt ...func(*Writer)) *running {
	s.t.Helper()
	r := &running{log: new(book)}
	o := Options{Service: "web", Server: s.http.Listener.Addr().String(), Account: s.account(), Log: r.log.logger()}
	for a := range strings.FieldsSeq(addresses) {
		o.Addresses = append(o.Addresses, netip.MustParseAddr(a))
	}
	o.Pod, o.Node = "pod-"+addresses, "node-"+addresses
	r.Writer = New(o)
	r.look, r.timeout, r.api.connect, r.api.beside = never, patience, patience, never
	for _, f := range adapt {
		f(r.Writer)
	}
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.Run(ctx)
	}()
	r.stop = func() {
		cancel()
		<-ended
	}
	s.t.Cleanup(r.stop)
	return r
}

// await waits until the Status fulfils a condition.
func (r *running) await(t *testing.T, what string, done func(Status) bool) {
	t.Helper()
	for began := time.Now(); !done(r.Status()); time.Sleep(time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatalf("not seen: %s; status %+v, log:\n%s", what, r.Status(), r.log)
		}
	}
}

// awaitRead waits until a standby has read everything.
func (r *running) awaitRead(t *testing.T) {
	t.Helper()
	r.await(t, "everything is read", func(s Status) bool { return s.Err == nil && !s.Since.IsZero() })
}

// readAgain makes a standby read everything, which it does at intervals that tests do not wait
// for.
func (s *server) readAgain(w *running) {
	s.t.Helper()
	before := 0
	s.change(func() { before = s.count("GET") })
	w.wake <- struct{}{}
	s.await("everything is read again", func() bool { return s.count("GET") >= before+2 })
}

// A book is a log.
type book struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *book) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *book) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (b *book) logger() *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }

// tlsListener returns a listener with the certificate of the server.
func tlsListener(s *server, l net.Listener) net.Listener { return tls.NewListener(l, s.http.TLS) }

func encode(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// foreignCertificate returns one that has signed nothing here.
func foreignCertificate(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return encode(der)
}
