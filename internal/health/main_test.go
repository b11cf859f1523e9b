package health

import (
	"bytes"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// patience is how long a test waits for an event, which a busy machine may delay.
const patience = 10 * time.Minute

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

func (b *book) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// newPlace returns a place of its own for a test.
func newPlace(t *testing.T) place {
	t.Helper()
	return place{t.TempDir() + "/egress-router", "/proc/self/ns/net", fmt.Sprintf("@%s/", t.Name()), patience, patience}
}

// report returns a report to compare with: times from JSON have no monotonic clock.
func report(program string) Report {
	at := time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)
	return Report{
		Program: program, Version: "v1.2.3", Mode: "legacy", Started: at, Reasons: []string{"the gateway does not answer"},
		Checks: []Check{{"gateway", Failed, "192.168.12.1", at, "gateway-silent"}, {"rules", OK, "", at, ""}},
	}
}
