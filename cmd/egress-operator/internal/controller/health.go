package controller

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
)

const (
	healthInterval = 15 * time.Second // of reading the health of each container in mode monitor
	healthTimeout  = 2 * time.Second  // of one answer
	healthReaders  = 16               // requests at a time
	mostAnswer     = 4096             // bytes of /readyz that are read
	mostMetrics    = 1 << 20          // bytes of /metrics that are read; the counter is among the first metrics, in the order of their names

	// conflictAge is the time for which a claim of the reserved address by another host is
	// reported. A host that is in use asks for the hardware address of its gateway, and so
	// claims its own address, at least every few minutes.
	conflictAge = 10 * time.Minute

	// startTime is the time that a container gets to be ready: that of three failed readiness
	// probes, after which a kubelet takes readiness away as well.
	startTime = 15 * time.Second
)

// conflictsMetric counts the claims of the reserved address by other hosts.
const conflictsMetric = "egress_router_address_conflicts_total"

// A podHealth is what a container in mode monitor reports.
type podHealth struct {
	notReady string // why it is not ready; empty: not known
	conflict bool   // another host has claimed the reserved address lately

	counted bool      // claims are known
	claims  float64   // since the start of the container
	claimed time.Time // the last one
}

// A healthReader reads the health of the containers in mode monitor. The kubelet does not
// pass on the reasons in the answer to a readiness probe by HTTP, and a conflict of addresses
// leaves a container ready. A container that does not answer, since a NetworkPolicy keeps
// the operator away, has no reasons.
type healthReader struct {
	client.Reader
	changed chan event.GenericEvent // of the pods whose health has changed
	now     func() time.Time
	timeout time.Duration // of one answer

	mu   sync.Mutex
	pods map[types.UID]podHealth
}

func newHealthReader(c client.Reader) *healthReader {
	return &healthReader{Reader: c, changed: make(chan event.GenericEvent), now: time.Now, timeout: healthTimeout, pods: map[types.UID]podHealth{}}
}

// Start reads the health of all pods at an interval, until the context ends.
func (h *healthReader) Start(ctx context.Context) error {
	ticker := time.NewTicker(healthInterval)
	defer ticker.Stop()
	for {
		h.read(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// of returns the health of a pod.
func (h *healthReader) of(pod *corev1.Pod) podHealth {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pods[pod.UID]
}

// read reads the health of all pods once.
func (h *healthReader) read(ctx context.Context) {
	var pods corev1.PodList
	if h.List(ctx, &pods) != nil {
		return // the cache has stopped
	}
	var all sync.WaitGroup
	readers := make(chan struct{}, healthReaders)
	found := map[types.UID]bool{}
	for i := range pods.Items {
		pod := &pods.Items[i]
		address, started, monitors := endpoint(pod)
		if !monitors {
			continue
		}
		found[pod.UID] = true
		all.Go(func() {
			readers <- struct{}{}
			defer func() { <-readers }()
			before := h.of(pod)
			ctx, cancel := context.WithTimeout(ctx, h.timeout)
			defer cancel()
			now := before.next(ctx, address, isReady(pod), started, h.now())
			h.mu.Lock()
			h.pods[pod.UID] = now
			h.mu.Unlock()
			if now.notReady != before.notReady || now.conflict != before.conflict {
				select {
				case h.changed <- event.GenericEvent{Object: pod}:
				case <-ctx.Done():
				}
			}
		})
	}
	all.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	for uid := range h.pods {
		if !found[uid] {
			delete(h.pods, uid)
		}
	}
}

func isReady(pod *corev1.Pod) bool {
	return condition(pod, corev1.PodReady).Status == corev1.ConditionTrue
}

// endpoint returns the health endpoint of a pod whose container monitors, and the start of
// the container. A pod of the node's network is no router's: its endpoint is another program.
// A port that is no number is none: whoever may create pods writes it, and in a URL it could
// name another host ("1@host").
func endpoint(pod *corev1.Pod) (address string, started time.Time, monitors bool) {
	port, s := pod.Annotations[render.PortAnnotation], pod.Status
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || pod.DeletionTimestamp != nil || s.PodIP == "" || s.PodIP == s.HostIP || len(s.ContainerStatuses) == 0 || s.ContainerStatuses[0].State.Running == nil {
		return "", time.Time{}, false
	}
	return net.JoinHostPort(s.PodIP, port), s.ContainerStatuses[0].State.Running.StartedAt.Time, true
}

// next returns the health after an earlier one. A container that does not answer keeps what
// it has reported.
func (p podHealth) next(ctx context.Context, address string, ready bool, started, now time.Time) podHealth {
	switch {
	case !ready && now.Sub(started) >= startTime:
		if reasons, answers := readReasons(ctx, address); answers {
			p.notReady = reasons
		}
	case ready:
		p.notReady = ""
		if claims, answers := readClaims(ctx, address); answers {
			if claims < p.claims { // the container has started again
				p.claims = 0
			}
			// What a container has counted before the operator started may be long ago.
			if claims > p.claims && (p.counted || now.Sub(started) < conflictAge) {
				p.claimed = now
			}
			p.counted, p.claims = true, claims
		}
	}
	p.conflict = !p.claimed.IsZero() && now.Sub(p.claimed) < conflictAge
	return p
}

// healthClient opens a connection for each request, as the endpoint expects, and follows
// nothing.
var healthClient = &http.Client{
	Transport:     &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: mostAnswer},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// get requests a page of a health endpoint.
func get(ctx context.Context, address, path string) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	return healthClient.Do(request)
}

// readReasons returns why a container is not ready, as one line.
func readReasons(ctx context.Context, address string) (reasons string, answers bool) {
	response, err := get(ctx, address, "/readyz")
	if err != nil {
		return "", false
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusServiceUnavailable {
		return "", response.StatusCode == http.StatusOK
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, mostAnswer))
	if err != nil {
		return "", false
	}
	reasons = strings.ReplaceAll(strings.TrimSpace(strings.ToValidUTF8(string(text), "")), "\n", "; ")
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, reasons), true
}

// readClaims returns how often another host has claimed the reserved address.
func readClaims(ctx context.Context, address string) (claims float64, answers bool) {
	response, err := get(ctx, address, "/metrics")
	if err != nil {
		return 0, false
	}
	defer response.Body.Close()
	for lines := bufio.NewScanner(io.LimitReader(response.Body, mostMetrics)); lines.Scan(); {
		if value, is := strings.CutPrefix(lines.Text(), conflictsMetric+" "); is {
			claims, err := strconv.ParseFloat(value, 64)
			return claims, err == nil
		}
	}
	return 0, false
}
