package endpoints

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// The slice of the holder is what Kubernetes would write for the pod.
func TestSliceOfHolder(t *testing.T) {
	s := newServer(t)
	w := s.start("127.0.0.1")
	w.Hold()
	s.awaitHolder("127.0.0.1")
	s.mu.Lock()
	defer s.mu.Unlock()
	got := *s.slices["web-egress-router"]
	since, pod, _ := strings.Cut(got.Metadata.Annotations["egress-router/held-since"], " ")
	if _, err := time.Parse(time.RFC3339Nano, since); err != nil || pod != "pod-127.0.0.1" {
		t.Errorf("held-since is %q", got.Metadata.Annotations)
	}
	got.Metadata.Annotations, got.Metadata.revision = nil, revision{}
	const want = `{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{"name":"web-egress-router","labels":{"endpointslice.kubernetes.io/managed-by":"egress-router","kubernetes.io/service-name":"web"},"ownerReferences":[{"apiVersion":"v1","kind":"Service","name":"web","uid":"uid-service"}]},` +
		`"addressType":"IPv4","endpoints":[{"addresses":["127.0.0.1"],"conditions":{"ready":true,"serving":true,"terminating":false},"nodeName":"node-127.0.0.1","targetRef":{"kind":"Pod","namespace":"egress","name":"pod-127.0.0.1"}}],` +
		`"ports":[{"name":"http","protocol":"TCP","port":8080},{"name":"dns","protocol":"UDP","port":53}]}`
	if diff := cmp.Diff(want, got.text()); diff != "" {
		t.Errorf("slice (-want +got):\n%s", diff)
	}
	for client := range s.clients {
		if host, _, _ := net.SplitHostPort(client); host != "127.0.0.1" {
			t.Errorf("a connection comes from %s, want the pod's address", client)
		}
	}
}

// Each holder overwrites the one before, with a single request, and a router that does not
// hold writes nothing.
func TestHoldersInTurn(t *testing.T) {
	s := newServer(t)
	routers := []*running{s.start("127.0.0.2"), s.start("127.0.0.3"), s.start("127.0.0.4")}
	for _, i := range []int{0, 1, 2, 1, 0, 0, 2} {
		w := routers[i]
		w.Release() // a holder that holds again
		w.awaitRead(t)
		patches := 0
		s.change(func() { patches = s.count("PATCH") })
		w.Hold()
		s.awaitHolder(fmt.Sprintf("127.0.0.%d", i+2))
		w.await(t, "written", func(s Status) bool { return s.Holding && !s.Written.IsZero() && s.Took > 0 && s.Err == nil })
		w.Release()
		if now := w.Status(); now.Holding || !now.Written.IsZero() {
			t.Errorf("after Release: %+v", now)
		}
		s.change(func() {
			// The version that a standby read last may be outdated: then there is a second one.
			if n := s.count("PATCH") - patches; n > 2 {
				t.Errorf("a take-over took %d patches", n)
			}
		})
	}
	for _, w := range routers {
		if strings.Contains(w.log.String(), "failed") {
			t.Errorf("log:\n%s", w.log)
		}
	}
}

// A standby that has read the slice writes it with the first request after Hold, on the
// connection that it has.
func TestTakeOverTakesOneRequest(t *testing.T) {
	// The library drops a connection whose request left more than 50 ms late (persistConn in
	// net/http/transport.go).
	connections := 0
	for range 20 {
		if connections = takeOver(t); connections == 1 {
			return
		}
	}
	t.Errorf("%d connections, want 1", connections)
}

// takeOver has a standby hold, and returns the number of its connections.
func takeOver(t *testing.T) (connections int) {
	t.Helper()
	s := newServer(t)
	w := s.start("127.0.0.1")
	w.awaitRead(t)
	from := 0
	s.change(func() { from = len(s.requests) })
	w.Hold()
	s.awaitHolder("127.0.0.1")
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.requests[from] != "PATCH web-egress-router" {
		t.Errorf("requests after Hold: %q", s.requests[from:])
	}
	return len(s.clients)
}

// A parking holds back patches at the server, after they have left the router.
type parking struct {
	s      *server
	parked map[string][]chan struct{} // by the address of the pod
	open   bool                       // nothing more is held back
	gone   int                        // patches that were answered
}

// park holds back all patches that come, until it is open.
func (s *server) park() *parking {
	p := &parking{s: s, parked: map[string][]chan struct{}{}}
	next := http.Handler(s)
	s.http.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r)
		if r.Method == http.MethodPatch {
			s.change(func() { p.gone++ })
		}
	})
	s.change(func() {
		s.before = func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodPatch {
				return false
			}
			pod, _, _ := net.SplitHostPort(r.RemoteAddr)
			on := make(chan struct{})
			s.change(func() {
				if p.open {
					close(on)
				} else {
					p.parked[pod] = append(p.parked[pod], on)
				}
			})
			<-on
			return false
		}
	})
	s.t.Cleanup(func() {
		s.change(func() { p.open = true })
		p.letOn("")
	})
	return p
}

// await waits until a number of patches of a pod is held back.
func (p *parking) await(pod string, n int) {
	p.s.t.Helper()
	p.s.await(fmt.Sprintf("%d patches of %s", n, pod), func() bool { return len(p.parked[pod]) >= n })
}

// letOn lets the patches of a pod, or of all, arrive.
func (p *parking) letOn(pod string) {
	p.s.change(func() {
		for of, patches := range p.parked {
			if pod == "" || of == pod {
				for _, on := range patches {
					close(on)
				}
				delete(p.parked, of)
			}
		}
	})
}

// A write that was under way when the router lost the address never wins, whatever the slice
// contained before and whenever it arrives.
func TestDelayedWriteDoesNotWin(t *testing.T) {
	for _, c := range []struct {
		name   string
		before func(s *server, a, b *running)
	}{
		{"without a slice", func(*server, *running, *running) {}},
		{"the next holder's slice", func(s *server, _, b *running) {
			b.Hold()
			s.awaitHolder("127.0.0.3")
			b.Release()
			b.awaitRead(s.t)
		}},
		{"the former holder's slice", func(s *server, a, _ *running) {
			a.Hold()
			s.awaitHolder("127.0.0.2")
			a.Release()
			a.awaitRead(s.t)
		}},
	} {
		for _, deleted := range []string{"never", "before", "after"} {
			if c.name == "without a slice" && deleted == "after" {
				continue // nothing distinguishes the absence before from that after: the holder restores the slice
			}
			t.Run(c.name+", deleted "+deleted, func(t *testing.T) {
				s := newServer(t)
				p := s.park()
				a, b := s.start("127.0.0.2"), s.start("127.0.0.3")
				a.awaitRead(t)
				b.awaitRead(t)
				s.change(func() { p.open = true })
				c.before(s, a, b)
				s.change(func() { p.open = false })
				s.readAgain(a)

				a.Hold()
				p.await("127.0.0.2", 1)
				a.Release()
				s.change(func() { p.open = true })
				if deleted == "before" {
					s.change(func() { clear(s.slices) })
				}
				b.Hold()
				s.awaitHolder("127.0.0.3")
				b.await(t, "written", func(s Status) bool { return !s.Written.IsZero() })
				want, done := "127.0.0.3", 0
				if deleted == "after" {
					want = ""
					b.stop() // it would restore the slice
					s.change(func() { clear(s.slices) })
				}
				s.change(func() { done = p.gone })
				p.letOn("127.0.0.2")
				s.await("the delayed patch", func() bool { return p.gone > done })
				s.change(func() {
					if got := s.holder(); got != want {
						t.Errorf("the slice leads to %q after the delayed write, want %q", got, want)
					}
				})
			})
		}
	}
}

// The same with random orders of holders and writes: in the end the slice leads to the last
// holder.
func TestRandomHolders(t *testing.T) {
	rounds := uint64(20)
	if nstest.Long() {
		rounds = 500
	}
	for seed := range rounds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 18))
			s := newServer(t)
			p := s.park()
			routers := []*running{s.start("127.0.0.2"), s.start("127.0.0.3"), s.start("127.0.0.4")}
			last, sent := 0, make([]int, len(routers))
			for range 12 {
				last = random.IntN(len(routers))
				w, pod := routers[last], fmt.Sprintf("127.0.0.%d", last+2)
				w.Hold()
				s.change(func() { sent[last] = len(p.parked[pod]) })
				p.await(pod, sent[last]+1-min(sent[last], random.IntN(2)))
				if random.IntN(2) == 0 {
					p.letOn(fmt.Sprintf("127.0.0.%d", random.IntN(len(routers))+2))
				}
				w.Release()
			}
			routers[last].Hold()
			s.change(func() { p.open = true })
			p.letOn(fmt.Sprintf("127.0.0.%d", last+2)) // one may have come before
			routers[last].await(t, "written", func(s Status) bool { return s.Err == nil && !s.Written.IsZero() })
			open, done := 0, 0
			s.change(func() {
				for _, patches := range p.parked {
					open += len(patches)
				}
				done = p.gone
			})
			p.letOn("")
			s.await("the delayed patches", func() bool { return p.gone >= done+open })
			s.change(func() {
				if got, want := s.holder(), fmt.Sprintf("127.0.0.%d", last+2); got != want {
					t.Errorf("the slice leads to %q, want the last holder %s", got, want)
				}
			})
		})
	}
}

// A router does not write after Release with a version that it has read since, which may be
// that of the next holder, even if what ends its requests comes late.
func TestNoWriteAfterRelease(t *testing.T) {
	s := newServer(t)
	w := New(Options{Service: "web", Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.2")}, Server: s.http.Listener.Addr().String(), Account: s.account(), Log: slog.New(slog.DiscardHandler)})
	defer w.api.close()
	w.api.timeout, w.api.connect = patience, patience
	w.Hold()
	r := w.role
	w.Release()
	if err := w.read(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.write(t.Context(), r); !errors.Is(err, errNotHeld) {
		t.Errorf("write returned %v, want %v", err, errNotHeld)
	}
	s.change(func() {
		if n := s.count("PATCH"); n != 0 {
			t.Errorf("%d patches", n)
		}
	})
}

// A router whose kernel no longer lets it send does not write, even if nobody has called
// Release: a process that was frozen.
func TestFrozenHolderDoesNotWrite(t *testing.T) {
	s := newServer(t)
	asked := make(chan struct{}, 1000)
	frozen := s.start("127.0.0.2", func(w *Writer) {
		w.o.Holds = func() bool { asked <- struct{}{}; return false }
	})
	frozen.Hold()
	for range 3 {
		<-asked
	}
	s.change(func() {
		if n := s.count("PATCH"); n != 0 {
			t.Errorf("%d patches", n)
		}
	})
	if now := frozen.Status(); !now.Written.IsZero() || strings.Contains(frozen.log.String(), "failed") {
		t.Errorf("status %+v, log:\n%s", now, frozen.log)
	}
}

// What others do to the slices or to the Service while a router holds is corrected.
func TestHolderCorrects(t *testing.T) {
	s := newServer(t)
	w := s.start("127.0.0.1", func(w *Writer) { w.look = time.Millisecond })
	w.Hold()
	s.awaitHolder("127.0.0.1")
	right := func() bool {
		one := s.slices["web-egress-router"]
		return one != nil && s.holder() == "127.0.0.1" && one.Metadata.Labels["kubernetes.io/service-name"] == "web" && len(one.Ports) == 2
	}
	for what, edit := range map[string]func(one *slice){
		"another endpoint": func(one *slice) {
			one.Endpoints = []endpoint{{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.9")}}}
		},
		"no endpoint":     func(one *slice) { one.Endpoints = nil },
		"no port":         func(one *slice) { one.Ports = nil },
		"another Service": func(one *slice) { one.Metadata.Labels = map[string]string{"kubernetes.io/service-name": "other"} },
		"deleted":         nil,
	} {
		s.change(func() {
			if edit == nil {
				clear(s.slices)
				return
			}
			edited := *s.slices["web-egress-router"]
			edit(&edited)
			s.versions++
			edited.Metadata.ResourceVersion = fmt.Sprint(s.versions)
			s.slices["web-egress-router"] = &edited
		})
		s.await("the slice is right again after "+what, right)
	}
	s.change(func() { s.service = strings.Replace(plain, "8080", "8181", 1) })
	s.await("the new port", func() bool { return s.slices["web-egress-router"].Ports[0].Port == 8181 })
	w.stop()
	if n := strings.Count(w.log.String(), "EndpointSlice restored"); n < 4 {
		t.Errorf("%d restorations in the log, want at least 4:\n%s", n, w.log)
	}

	// What is right is not written again.
	s.change(func() { s.requests = nil })
	again := s.start("127.0.0.1", func(w *Writer) { w.look = time.Millisecond })
	again.Hold()
	s.await("ten reads", func() bool { return s.count("GET") > 20 })
	again.stop()
	s.change(func() {
		if n := s.count("PATCH"); n > 2 {
			t.Errorf("%d patches of a slice that nobody changes", n)
		}
	})
}

// Failures are repeated until the slice is right, and reported once.
func TestFailuresAreRepeated(t *testing.T) {
	for _, c := range []struct {
		method string
		code   int
		header []string
		want   string
	}{
		{"PATCH", 409, nil, `patch endpointslices "web-egress-router": 409 refused with 409`},
		{"PATCH", 403, nil, "403 refused with 403"},
		{"GET", 403, nil, "403 refused with 403"},
		{"GET", 404, nil, `get services "web": 404 refused with 404`},
		{"PATCH", 404, nil, "404 refused with 404"},
		{"PATCH", 410, nil, "410 refused with 410"},
		{"GET", 410, nil, "410 refused with 410"},
		{"PATCH", 422, nil, "422 refused with 422"},
		{"PATCH", 429, []string{"Retry-After", "1"}, "429 refused with 429"},
		{"PATCH", 500, nil, "500 refused with 500"},
		{"GET", 503, nil, "503 refused with 503"},
	} {
		t.Run(fmt.Sprint(c.method, c.code), func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			s.fail(c.method, 3, c.code, c.header...)
			w := s.start("127.0.0.1")
			w.Hold()
			s.awaitHolder("127.0.0.1")
			w.await(t, "no error", func(s Status) bool { return s.Err == nil && !s.Written.IsZero() })
			w.stop()
			log := w.log.String()
			if strings.Count(log, "EndpointSlice update failed") != 1 || strings.Count(log, "EndpointSlice update works again") != 1 || !strings.Contains(strings.ReplaceAll(log, `\"`, `"`), c.want) {
				t.Errorf("log, want once %s:\n%s", c.want, log)
			}
		})
	}
}

// An answer 403 names the rule of the Role that is missing, if one is.
func TestForbidden(t *testing.T) {
	get := request{verb: "get", resource: "services", name: "web"}
	patch := request{verb: "patch", resource: endpointSlices, name: "web-egress-router"}
	create := patch
	create.creates = true
	const rbac = `forbidden: User "system:serviceaccount:egress:egress-router" cannot do it`
	for _, c := range []struct {
		request request
		message string
		want    string
	}{
		{get, rbac, `{apiGroups: [""], resources: ["services"], resourceNames: ["web"], verbs: ["get"]}`},
		{patch, rbac, `{apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"], resourceNames: ["web-egress-router"], verbs: ["patch"]}`},
		{create, rbac, `{apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"], resourceNames: ["web-egress-router"], verbs: ["patch", "create"]}`},
		{patch, "forbidden: endpoint address 10.128.0.98 is not allowed", `{apiGroups: ["discovery.k8s.io"], resources: ["endpointslices/restricted"], verbs: ["create"]}`},
		{create, "forbidden: unable to create new content in namespace egress because it is being terminated", ""},
	} {
		got := (&statusError{code: 403, message: c.message, server: "10.96.0.1:443", request: c.request}).Error()
		want := fmt.Sprintf("API server 10.96.0.1:443, %s %s %q: 403 %s", c.request.verb, c.request.resource, c.request.name, c.message)
		if c.want != "" {
			want += ": the Role of the service account needs the rule " + c.want
		}
		if got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

// The time until the next attempt doubles, and is at least what the server asks for. A holder to
// which the Service does not lead yet waits a second at most, and hardly at all for a silent server.
func TestDelay(t *testing.T) {
	w := New(Options{})
	fault := errors.New("fault")
	conflict, slow := &statusError{code: http.StatusConflict}, &statusError{code: http.StatusTooManyRequests, retryAfter: 2 * time.Second}
	silent := fmt.Errorf("%w in 1s", errNoAnswer)
	for _, c := range []struct {
		failures     int
		err          error
		want, urgent time.Duration
	}{
		{0, nil, lookEvery, lookEvery},
		{1, fault, 100 * time.Millisecond, 100 * time.Millisecond},
		{2, fault, 200 * time.Millisecond, 200 * time.Millisecond},
		{6, fault, 3200 * time.Millisecond, time.Second},
		{7, fault, 5 * time.Second, time.Second},
		{1000000, fault, 5 * time.Second, time.Second},
		{1, silent, 100 * time.Millisecond, 100 * time.Millisecond},
		{6, silent, 3200 * time.Millisecond, 100 * time.Millisecond},
		{1, conflict, 0, 0},
		{2, conflict, 200 * time.Millisecond, 200 * time.Millisecond},
		{1, slow, 2 * time.Second, 2 * time.Second},
		{6, slow, 3200 * time.Millisecond, 2 * time.Second},
	} {
		if got := w.delay(true, c.failures, c.err); got != c.urgent {
			t.Errorf("urgent delay(%d, %v) = %s, want %s", c.failures, c.err, got, c.urgent)
		}
		if got := w.delay(false, c.failures, c.err); got != c.want {
			t.Errorf("delay(%d, %v) = %s, want %s", c.failures, c.err, got, c.want)
		}
	}
}

// A Service that a router cannot serve is an error that says why, also of a standby, and
// gets no slice.
func TestUnsuitableService(t *testing.T) {
	for _, c := range []struct{ service, want string }{
		{strings.Replace(plain, `"type"`, `"selector": {"a": "b"}, "type"`, 1), `reading Service "web": expected no selector, found one`},
		{strings.Replace(plain, "ClusterIP", "ExternalName", 1), `reading Service "web": expected a Service with endpoints, found the type ExternalName`},
		{strings.Replace(plain, "8080", `"http"`, 1), `reading Service "web", port 80: expected a number as targetPort, found "http"`},
		{strings.Replace(plain, "IPv4", "IPv6", 1), `reading Service "web": expected an IP family of which the pod has an address, found ["IPv6"]`},
		{"", `get services "web": 404`},
		{"}", `invalid character '}'`},
	} {
		t.Run(c.want, func(t *testing.T) {
			s := newServer(t)
			s.service = c.service
			w := s.start("127.0.0.1")
			failed := func(s Status) bool {
				return s.Err != nil && strings.Contains(s.Err.Error(), c.want) && !s.Since.IsZero()
			}
			w.await(t, c.want, failed)
			w.Hold()
			w.await(t, c.want, func(s Status) bool { return failed(s) && s.Holding })
			w.stop()
			s.change(func() {
				if s.count("PATCH") != 0 {
					t.Error("a slice was written")
				}
			})
		})
	}
}

// A Service of both families has two slices. A family of which the pod has no address leads
// nowhere, and a fault of one slice leaves the other one alone.
func TestFamilies(t *testing.T) {
	both := strings.Replace(plain, `"IPv4"`, `"IPv6", "IPv4"`, 1)
	s := newServer(t)
	s.service = both
	w := s.start("127.0.0.2 fe80::1 ::1")
	w.Hold()
	s.await("both slices", func() bool {
		return slices.Equal(s.leads("web-egress-router"), []string{"[127.0.0.2]"}) && slices.Equal(s.leads("web-egress-router-ipv6"), []string{"[::1]"})
	})
	w.Release()

	s.change(func() {
		s.before = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPatch && strings.HasSuffix(r.URL.Path, "-ipv6") {
				refuse(w, 500, "broken")
				return true
			}
			return false
		}
	})
	other := s.start("127.0.0.3")
	other.Hold()
	s.awaitHolder("127.0.0.3")
	other.await(t, "the error", func(s Status) bool { return s.Err != nil && strings.Contains(s.Err.Error(), "broken") })
	s.change(func() { s.before = nil })
	s.await("the slice of the former holder is empty", func() bool { return len(s.leads("web-egress-router-ipv6")) == 0 })
}

// A server with an IPv6 address is reached from that of the pod.
func TestServerIPv6(t *testing.T) {
	s := newServer(t)
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = s.http.Config.Serve(tlsListener(s, l)) }()
	w := s.start("127.0.0.2 ::1", func(w *Writer) { w.api.o.Server = l.Addr().String() })
	w.Hold()
	s.awaitHolder("127.0.0.2")
}

// The token and the certificates are read again: both change in the life of a pod.
func TestAccountChanges(t *testing.T) {
	s := newServer(t)
	account := s.account()
	w := s.start("127.0.0.1", func(w *Writer) { w.api.o.Account, w.look = account, time.Millisecond })
	w.awaitRead(t)
	s.change(func() { s.token = "second" })
	w.await(t, "401", func(s Status) bool { return s.Err != nil && strings.Contains(s.Err.Error(), "401 Unauthorized") })
	s.write(account, "token", "second")
	w.awaitRead(t)

	// A certificate that does not fit counts from the next connection on.
	right := s.http.Certificate()
	for content, want := range map[string]string{"": "expected a certificate, found none", foreignCertificate(t): "certificate"} {
		s.write(account, "ca.crt", content)
		s.http.CloseClientConnections()
		w.await(t, want, func(s Status) bool { return s.Err != nil && strings.Contains(s.Err.Error(), want) })
		s.write(account, "ca.crt", encode(right.Raw))
		w.awaitRead(t)
	}
}

// A server that does not answer is given up and asked again, with more time, and one that
// was not there is found when it is.
func TestSlowAndDeadServer(t *testing.T) {
	t.Run("slow", func(t *testing.T) {
		s := newServer(t)
		silent := 3
		s.before = func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodPatch {
				return false
			}
			s.mu.Lock()
			silent--
			wait := silent >= 0
			s.mu.Unlock()
			if wait {
				<-r.Context().Done() // the client has gone
			}
			return wait
		}
		w := s.start("127.0.0.1", func(w *Writer) { w.timeout = 200 * time.Millisecond })
		w.Hold()
		w.await(t, "time-out", func(s Status) bool { return s.Err != nil && strings.Contains(s.Err.Error(), "no answer in ") })
		s.change(func() { silent = min(silent, 0) })
		s.awaitHolder("127.0.0.1")
	})
	t.Run("dead", func(t *testing.T) {
		s := newServer(t)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		w := s.start("127.0.0.1", func(w *Writer) { w.api.o.Server = l.Addr().String() })
		w.Hold()
		w.await(t, "refused", func(s Status) bool {
			return s.Err != nil && strings.Contains(s.Err.Error(), "connection refused") && strings.Contains(s.Err.Error(), l.Addr().String())
		})
		if l, err = net.Listen("tcp", l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		go func() { _ = s.http.Config.Serve(tlsListener(s, l)) }()
		s.awaitHolder("127.0.0.1")
	})
}

// Hold, Release and Status return at once, whatever the server does, and Run ends at once.
func TestNobodyWaits(t *testing.T) {
	s := newServer(t)
	hang := make(chan struct{})
	s.before = func(http.ResponseWriter, *http.Request) bool { <-hang; return false }
	t.Cleanup(func() { close(hang) })
	w := s.start("127.0.0.1")
	for range 100 {
		w.Hold()
		w.Hold()
		if !w.Status().Holding {
			t.Fatal("does not hold after Hold")
		}
		w.Release()
		w.Release()
	}
	w.Hold()
	s.await("a request", func() bool { return len(s.requests) > 0 })
	w.stop()
	if strings.Contains(w.log.String(), "failed") {
		t.Errorf("the end is no failure:\n%s", w.log)
	}
}

// What a server sends is a program's mistake at worst, and no crash.
func FuzzService(f *testing.F) {
	f.Add(plain)
	f.Add(strings.Replace(plain, "8080", `"http"`, 1))
	f.Add(`{"spec": {"ipFamilies": ["IPv4", ""], "ports": [{"targetPort": null}, {"targetPort": 70000}]}}`)
	f.Fuzz(func(t *testing.T, text string) {
		var object serviceObject
		if json.Unmarshal([]byte(text), &object) != nil {
			return
		}
		o := Options{Service: "web", Addresses: []netip.Addr{netip.MustParseAddr("10.128.0.98")}}
		found, err := object.service(o)
		if err != nil {
			return
		}
		for _, one := range found.slices(o, "now") {
			if !json.Valid([]byte(one.text())) {
				t.Errorf("slice %q", one.text())
			}
		}
	})
}
