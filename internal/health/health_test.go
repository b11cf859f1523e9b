package health

import (
	"encoding/json"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestBoard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b Board
		start := time.Now()
		b.Set("rules", OK, "3 of them")
		time.Sleep(time.Minute)
		b.Set("gateway", Failed, "no answer")
		b.Set("rules", OK, "4 of them") // the same state keeps its time
		time.Sleep(time.Minute)
		b.Set("gateway", OK, "")
		want := []Check{{"rules", OK, "4 of them", start, ""}, {"gateway", OK, "", start.Add(2 * time.Minute), ""}}
		if diff := cmp.Diff(want, b.Checks()); diff != "" {
			t.Errorf("checks (- want, + got):\n%s", diff)
		}
		b.Remove("rules")
		b.Remove("rules")
		if got := b.Checks(); len(got) != 1 || got[0].Name != "gateway" {
			t.Errorf("after removing one: %v", got)
		}
	})
}

func TestState(t *testing.T) {
	for _, s := range []State{OK, Warning, Failed} {
		text, err := s.MarshalText()
		var back State
		if err != nil || back.UnmarshalText(text) != nil || back != s {
			t.Errorf("%v: %s, %v, back as %v", s, text, err, back)
		}
	}
	if err := new(State).UnmarshalText([]byte("fine")); err == nil {
		t.Error(`"fine" accepted as a state`)
	}
	if got := State(7).String(); got != "State(7)" {
		t.Errorf("State(7): %s", got)
	}
}

func TestWriteTable(t *testing.T) {
	now := report(Router).Started.Add(3*time.Hour + 2*time.Minute)
	router := report(Router)
	router.Checks = append(router.Checks, Check{"destinations", Warning, "line 2:\tbad\x1b[m\nthe old ones stay", now.Add(-90 * time.Second), "rules-missing"}, Check{Name: "new"})
	ready := Report{Program: HTTPProxy, Ready: true, Started: now.Add(-50 * time.Hour)}
	var got strings.Builder
	if err := WriteTable(&got, []Report{ready, router}, now); err != nil {
		t.Fatal(err)
	}
	const want = `http-proxy: ready, started 2d2h ago
router v1.2.3 (legacy): not ready, started 3h2m ago
  not ready: the gateway does not answer
  gateway       failed   3h2m   192.168.12.1
    fault: gateway-silent
  rules         ok       3h2m
  destinations  warning  1m30s  line 2: bad [m; the old ones stay
    fault: rules-missing
  new           ok       -
`
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("table (- want, + got):\n%s", diff)
	}
}

func TestWriteJSON(t *testing.T) {
	for _, reports := range [][]Report{nil, {report(Router)}, {report(DNSProxy), report(Router)}} {
		var text strings.Builder
		if err := WriteJSON(&text, reports); err != nil {
			t.Fatal(err)
		}
		var back []Report
		if err := json.Unmarshal([]byte(text.String()), &back); err != nil || len(back) != len(reports) || !strings.HasPrefix(text.String(), "[") {
			t.Errorf("%d reports: %v\n%s", len(reports), err, &text)
		}
	}
	// Other programs rely on the names.
	var text strings.Builder
	if err := WriteJSON(&text, []Report{report(Router)}); err != nil {
		t.Fatal(err)
	}
	const want = `[
  {
    "program": "router",
    "version": "v1.2.3",
    "mode": "legacy",
    "started": "2026-07-01T12:00:00Z",
    "ready": false,
    "reasons": [
      "the gateway does not answer"
    ],
    "checks": [
      {
        "name": "gateway",
        "state": "failed",
        "detail": "192.168.12.1",
        "since": "2026-07-01T12:00:00Z",
        "fault": "gateway-silent"
      },
      {
        "name": "rules",
        "state": "ok",
        "since": "2026-07-01T12:00:00Z"
      }
    ]
  }
]
`
	if diff := cmp.Diff(want, text.String()); diff != "" {
		t.Errorf("JSON (- want, + got):\n%s", diff)
	}
}
