// Package endpoints writes the EndpointSlices of a Service without selector, so that the
// Service leads to the router that holds the reserved address.
//
// Nobody waits for it: Hold and Release return at once, and a write that fails is repeated
// for as long as the router holds the address.
//
// # Two writers
//
// A router that has lost the address writes nothing over the entry of the next holder,
// however long a request of it was delayed. Every write is bound to the resource version of
// the slice that the router read before it, and the router asks after that read whether it
// still holds (no Release, and Options.Holds): the next holder's first write comes later and
// changes the version. It changes it even if the slice already has the right content,
// because it contains an annotation that differs for each time of holding. So a delayed
// write is either refused by the API server (409) or overwritten.
//
// Sources: the Kubernetes API reference of EndpointSlice (discovery.k8s.io/v1) and Service,
// and "Server-Side Apply" and "Accessing the Kubernetes API from a Pod" of its documentation.
package endpoints

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Options describe the Service and this router.
type Options struct {
	Service   string       // name, in the namespace of the pod
	Addresses []netip.Addr // of the pod, on the cluster side; the first of a family is used
	Pod, Node string       // names; empty: not part of the endpoint

	Server  string // host and port of the API server
	Account string // directory of the service account's files; empty: ServiceAccount

	// Holds reports whether this router holds the address at this instant, from the kernel.
	// nil: it holds between Hold and Release.
	Holds func() bool

	Log *slog.Logger
}

// ServiceAccount is the directory into which Kubernetes mounts the token, the certificates
// of the API server's authority, and the name of the namespace.
const ServiceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

// The times of a Writer.
const (
	// lookEvery is the interval at which the Service and its slices are read: the holder
	// corrects changes by others, and a standby finds faults before it has to write.
	lookEvery = 5 * time.Second

	// After a failure the next attempt comes after leastDelay, which doubles up to mostDelay.
	leastDelay = 100 * time.Millisecond
	mostDelay  = 5 * time.Second

	// urgentDelay is the longest delay of a holder to which the Service does not lead yet: clients
	// go to a router that may be gone.
	urgentDelay = time.Second

	// The time for one request is leastTimeout, and doubles with each failure, to 8 s: a
	// server that is dead delays a take-over by a second, and one that is slow still serves.
	leastTimeout     = time.Second
	timeoutDoublings = 3
)

// errNotHeld reports that the router does not hold the address although nobody has called
// Release yet.
var errNotHeld = errors.New("the reserved address is not held")

// A Status is the state of a Writer.
type Status struct {
	Holding bool
	Written time.Time     // of the last write; zero: none since Hold
	Took    time.Duration // from Hold to the first write
	Err     error         // of the last attempt to read or write; nil: none
	Since   time.Time     // start of the state of Err; zero: no attempt has ended
}

// A Writer writes the slices of one Service. Its methods may be called from any goroutine.
type Writer struct {
	o    Options
	api  *client
	wake chan struct{}

	// lookEvery and leastTimeout, but for tests.
	look, timeout time.Duration

	mu     sync.Mutex
	role   *role
	status Status

	// Used by Run alone.
	service *service            // nil: unknown
	found   map[string]revision // by the name of a slice
}

// A role is a time during which the router holds the address, or does not.
type role struct {
	ctx   context.Context // ends with the role
	end   context.CancelFunc
	held  bool
	began time.Time

	// Used by Run alone.
	written map[string]written // by the name of a slice
	led     bool               // an attempt of the holder has succeeded
}

// A written slice is one that this router wrote, and the API server confirmed.
type written struct {
	at      revision
	content string
}

// New returns a Writer that does not hold the address. Run starts it.
func New(o Options) *Writer {
	if o.Account == "" {
		o.Account = ServiceAccount
	}
	w := &Writer{o: o, api: newClient(o), wake: make(chan struct{}, 1), look: lookEvery, timeout: leastTimeout}
	w.role = newRole(false)
	return w
}

func newRole(held bool) *role {
	r := &role{held: held, began: time.Now(), written: map[string]written{}}
	r.ctx, r.end = context.WithCancel(context.Background())
	return r
}

// Hold makes the Service lead to this router, until Release. It does not wait.
func (w *Writer) Hold() { w.change(true) }

// Release ends what Hold began, and a request that runs. It does not wait. The slices stay:
// the next holder overwrites them.
func (w *Writer) Release() { w.change(false) }

func (w *Writer) change(held bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.role.held == held {
		return
	}
	w.role.end()
	w.role = newRole(held)
	w.status.Holding, w.status.Written, w.status.Took = held, time.Time{}, 0
	select {
	case w.wake <- struct{}{}:
	default: // Run has not seen the change before either
	}
}

// Status returns the state of the Writer.
func (w *Writer) Status() Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.status
}

// Run reads and writes until ctx ends.
func (w *Writer) Run(ctx context.Context) {
	defer w.api.close()
	var of *role
	failures := 0 // in a row, in this role
	for {
		w.mu.Lock()
		r := w.role
		w.mu.Unlock()
		if r != of {
			of, failures = r, 0
		}
		w.api.timeout = w.timeout << min(failures, timeoutDoublings)
		err := w.attempt(ctx, r)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			failures, r.led = 0, r.held
		} else {
			failures++
			// A role that ended during a read leaves to the next one what was read before, unless that
			// is the absence of a slice: nothing distinguishes it from a later one.
			if absent := slices.Contains(slices.Collect(maps.Values(w.found)), revision{}); r.ctx.Err() == nil || absent {
				w.service = nil // read everything again
			}
		}
		w.note(r, err)
		timer := time.NewTimer(w.delay(r.held && !r.led, failures, err))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-w.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// delay returns the time until the next attempt, after a number of failures in a row. It is urgent
// until the Service leads to the holder.
func (w *Writer) delay(urgent bool, failures int, err error) time.Duration {
	if failures == 0 {
		return w.look
	}
	if failures == 1 && hasCode(err, http.StatusConflict) {
		return 0 // a write by another client came in between
	}
	delay, most := leastDelay<<min(failures-1, 10), mostDelay
	if urgent {
		most = urgentDelay
		if errors.Is(err, errNoAnswer) {
			most = leastDelay // it has taken a second or more
		}
	}
	delay = min(delay, most)
	if refused, ok := errors.AsType[*statusError](err); ok {
		delay = max(delay, refused.retryAfter)
	}
	return delay
}

// attempt reads the Service and its slices, and writes what the holder has to write.
func (w *Writer) attempt(ctx context.Context, r *role) error {
	run := ctx
	ctx, cancel := context.WithCancel(r.ctx) // a child of the role's: it has ended when Release returns
	defer cancel()
	defer context.AfterFunc(run, cancel)()

	// A take-over takes a single request, with the revision that was read while another
	// router held: if it is outdated, the API server refuses it.
	if r.held && len(r.written) == 0 && w.service != nil {
		if err := w.write(ctx, r); err != nil && !hasCode(err, http.StatusConflict) {
			return err
		}
	}
	if err := w.read(ctx); err != nil {
		return err
	}
	if !r.held {
		return nil
	}
	return w.write(ctx, r)
}

// read reads the Service, and the versions of its slices.
func (w *Writer) read(ctx context.Context) error {
	s, err := w.api.service(ctx, w.o.Service)
	if err != nil {
		return err
	}
	found := map[string]revision{}
	for _, want := range s.slices(w.o, "") {
		if found[want.Metadata.Name], err = w.api.revision(ctx, want.Metadata.Name); err != nil {
			return err
		}
	}
	w.service, w.found = s, found
	return nil
}

// write writes the slices that are not as this router wrote them. One that fails does not
// keep the others from being written.
func (w *Writer) write(ctx context.Context, r *role) error {
	var failed []error
	for _, want := range w.service.slices(w.o, r.began.UTC().Format(time.RFC3339Nano)) {
		name, content := want.Metadata.Name, want.text()
		before, wrote := r.written[name]
		if wrote && before == (written{w.found[name], content}) {
			continue
		}
		if r.ctx.Err() != nil || w.o.Holds != nil && !w.o.Holds() {
			return errNotHeld
		}
		now, err := w.api.apply(ctx, want, w.found[name])
		if err != nil {
			failed = append(failed, err)
			continue
		}
		if wrote && before.content == content && now != w.found[name] {
			w.o.Log.Warn("EndpointSlice restored", "slice", name)
		}
		r.written[name] = written{now, content}
		w.found[name] = now
		w.wrote(r)
	}
	if len(failed) > 0 {
		w.service = nil // one may have been written all the same
	}
	return errors.Join(failed...)
}

// wrote records the time of a write.
func (w *Writer) wrote(r *role) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.role != r {
		return
	}
	w.status.Written = time.Now()
	if w.status.Took == 0 {
		w.status.Took = time.Since(r.began)
		w.o.Log.Info("EndpointSlice written", "service", w.o.Service, "after", w.status.Took)
	}
}

// note records the end of an attempt. That of a role before the present one was cancelled.
func (w *Writer) note(r *role, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.role != r || errors.Is(err, errNotHeld) {
		return
	}
	before := w.status.Err
	if (before == nil) != (err == nil) || w.status.Since.IsZero() {
		w.status.Since = time.Now()
	}
	w.status.Err = err
	switch {
	case err != nil && (before == nil || before.Error() != err.Error()):
		w.o.Log.Warn("EndpointSlice update failed", "service", w.o.Service, "holding", r.held, "error", err)
	case err == nil && before != nil:
		w.o.Log.Info("EndpointSlice update works again", "service", w.o.Service, "holding", r.held)
	}
}
