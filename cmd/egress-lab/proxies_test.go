package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/lab"
)

// briefProxies is the effort of tests, which check that there are figures.
var briefProxies = proxyEffort{rounds: 1, each: 50 * time.Millisecond, idle: 20}

func TestMeasureProxies(t *testing.T) {
	program := router(t)
	for _, part := range proxyParts {
		t.Run(part, func(t *testing.T) {
			if part == partDNS {
				if _, err := findPeer("haproxy", "haproxy"); err != nil {
					t.Fatal(err, " (.ci/install haproxy)")
				}
			}
			c := contests[part]
			rows, err := measureProxies(t.Context(), program, c, briefProxies)
			if err != nil {
				t.Fatal(err)
			}
			checkRows(t, rows, briefProxies.rounds)
			want := 2 // readings of memory
			for _, trial := range c.trials {
				want += len(trial.readings)
				if trial.kind == drivePour {
					want++ // as an ordinary user
				}
			}
			if len(rows) != want {
				t.Errorf("%d rows, want %d", len(rows), want)
			}
		})
	}
}

// Each reading is compared to the better of the other proxies.
func TestCompareProxies(t *testing.T) {
	c := contest{trials: []trial{{driveDirect, 8, 0, false, []reading{
		{"rate", rate, false, goalShort},
		{"p99", p99, true, goalTail},
	}}}}
	contenders := []contender{{name: "ours"}, {name: "one"}, {name: "other"}}
	rows := c.compare(contenders, [][][]drove{{
		{{Rate: 100, P99: 4}, {Rate: 110, P99: 5}},
		{{Rate: 90, P99: 2}, {Rate: 80, P99: 2}},
		{{Rate: 200, P99: 3}, {Rate: 210, P99: 3}},
	}})
	want := []row{
		{"rate", "other", []pair{{200, 100}, {210, 110}}, goalShort},
		{"p99", "one", []pair{{2, 4}, {2, 5}}, goalTail},
	}
	if diff := cmp.Diff(want, rows, cmp.AllowUnexported(row{}, pair{}, goal{})); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

// The proxy as an ordinary user is compared with itself as root, and is no reference.
func TestCompareUser(t *testing.T) {
	c := contest{trials: []trial{
		{driveKept, 1, 0, false, []reading{{"rate", rate, false, goalHTTP}}},
		{drivePour, 1, 0, false, []reading{{"one tunnel", gbit, false, goalEqual}}},
	}}
	contenders := []contender{{name: "ours"}, {name: "squid"}, {name: "ours as a user", user: true}}
	rows := c.compare(contenders, [][][]drove{
		{{{Rate: 100}}, {{Rate: 50}}, nil},
		{{{Gbit: 20}}, {{Gbit: 10}}, {{Gbit: 19}}},
	})
	want := []row{
		{"rate", "squid", []pair{{50, 100}}, goalHTTP},
		{"one tunnel", "squid", []pair{{10, 20}}, goalEqual},
		{"the same as an ordinary user", "ours as root", []pair{{20, 19}}, goalUser},
	}
	if diff := cmp.Diff(want, rows, cmp.AllowUnexported(row{}, pair{}, goal{})); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

// A wrong answer is an error, not a lower figure.
func TestDriveRefusesWrongAnswers(t *testing.T) {
	small := "HTTP/1.1 200 OK\r\nContent-Length: 1024\r\n\r\n" + strings.Repeat("x", answerSize)
	for name, test := range map[string]struct {
		answer string
		kind   driveKind
		want   string
	}{
		"refused":        {"HTTP/1.1 403 Forbidden\r\n\r\n", driveNew, "403 Forbidden"},
		"cut":            {small[:500], driveNew, "the answer is"},
		"no header":      {"HTTP/1.1 2", driveNew, "the connection ended"},
		"another":        {strings.Replace(small, "xxx", "xyx", 1), driveKept, "the answer is"},
		"too much":       {small + "x", driveKept, "the answer is"},
		"no length":      {strings.Replace(small, "1024", "1023", 1), driveDirect, "the answer is"},
		"no tunnel":      {"HTTP/1.1 503 no\r\n\r\n", driveTunnel, "503 no"},
		"nothing":        {"", driveDirect, "the connection ended"},
		"an end":         {"HTTP/1.1 200 OK\r\n\r\nxx", driveDirectPour, "the bytes ended"},
		"none when idle": {"HTTP/1.1 502 no\r\n\r\n", driveIdle, "502 no"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					_, _ = conn.Read(make([]byte, 4096))
					fmt.Fprint(conn, test.answer)
					conn.Close()
				}
			}()
			at := netip.MustParseAddrPort(l.Addr().String())
			g, err := newGenerator(drive{Kind: test.kind, Clients: 1, For: time.Second, To: at, Server: at})
			if err != nil {
				t.Fatal(err)
			}
			defer g.close()
			if _, err := g.run(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
		})
	}
	g, err := newGenerator(drive{Kind: driveNew, Clients: 1, For: time.Second, To: netip.MustParseAddrPort("127.0.0.1:9")})
	if err != nil {
		t.Fatal(err)
	}
	defer g.close()
	if _, err := g.run(); err == nil || !strings.Contains(err.Error(), "connecting: connection refused") {
		t.Errorf("error %v, want a refusal", err)
	}
}

// A drive with a rate has that many requests a second, and no more.
func TestDriveKeepsRate(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var requests atomic.Int64
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if requests.Add(1)%8 == 0 {
			time.Sleep(200 * time.Millisecond) // some clients wait for long, others rest
		}
		w.Header().Set("Content-Length", strconv.Itoa(answerSize))
		_, _ = w.Write(smallBody)
	})}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	at := netip.MustParseAddrPort(l.Addr().String())
	for patience := time.Now().Add(lab.Patience); ; {
		g, err := newGenerator(drive{Kind: driveKept, Clients: 16, Rate: 200, For: 500 * time.Millisecond, To: at, Server: at})
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		result, err := g.run()
		took := time.Since(begin)
		g.close()
		if most := int(200*took.Seconds()) + 16 + 1; err != nil || result.Answers > most {
			t.Fatalf("%d answers in %v, error %v; want at most %d", result.Answers, took, err, most)
		}
		if result.Answers > 16 {
			return
		}
		if time.Now().After(patience) { // this process may stand still for one run
			t.Fatalf("%d answers in %v, want more than 16", result.Answers, took)
		}
	}
}

func TestPeersRefuseInvalidArguments(t *testing.T) {
	for _, args := range [][]string{{"origin"}, {"origin", "here"}, {"drive", "{"}, {"drive", `{"Kind":"http-new","Clients":1,"To":"127.0.0.1:9"}`}} {
		code, stdout, stderr := finish(t, labCommand(t, args...))
		if code != exitError || stdout != "" || !strings.HasPrefix(stderr, args[0]+": ") {
			t.Errorf("%q: exit code %d, stdout %q, stderr %q", args, code, stdout, stderr)
		}
	}
}

func TestProcessor(t *testing.T) {
	p := contender{process: &os.Process{Pid: os.Getpid()}}
	begin, err := p.processor()
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(lab.Patience); ; {
		now, err := p.processor()
		if err != nil || now > begin {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("processor time: no increase within %s", lab.Patience)
		}
	}
}

func TestMissingPeer(t *testing.T) {
	if _, err := findPeer("no-such-proxy", "x"); !errors.Is(err, os.ErrNotExist) || hint(err) != "install the package x" {
		t.Errorf("error %v, hint %q", err, hint(err))
	}
}

// A measurement leaves no process behind.
func TestProxiesLeaveNothing(t *testing.T) {
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := startOrigin(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	if n := children(t); n == 0 {
		t.Error("no origin process")
	}
	l.Close()
	for end := time.Now().Add(lab.Patience); children(t) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the origin process runs %s after the lab's end", lab.Patience)
		}
	}
}

// children counts the running child processes of this process.
func children(t *testing.T) (n int) {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		list, _ := os.ReadFile("/proc/self/task/" + task.Name() + "/children")
		for pid := range strings.FieldsSeq(string(list)) {
			stat, _ := os.ReadFile("/proc/" + pid + "/stat")
			if _, state, _ := strings.Cut(string(stat), ") "); state != "" && !slices.Contains([]byte("ZX"), state[0]) {
				n++
			}
		}
	}
	return n
}
