package cli

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/follow"
)

// output is a log that can be read while it is written to.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// patience is how long a test waits for an event, which a busy machine may delay.
const patience = 10 * time.Minute

// await waits until the log contains a text the given number of times.
func (o *output) await(t *testing.T, text string, times int) {
	t.Helper()
	for end := time.Now().Add(patience); strings.Count(o.String(), text) < times; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the log has %q %d times after %s, want %d:\n%s", text, strings.Count(o.String(), text), patience, times, o)
		}
	}
}

// wantCount checks the number of occurrences of a text in the log.
func (o *output) wantCount(t *testing.T, text string, times int) {
	t.Helper()
	if n := strings.Count(o.String(), text); n != times {
		t.Errorf("the log has %q %d times, want %d:\n%s", text, n, times, o)
	}
}

// A failure is logged once while it stays the same, and the reload is repeated
// until it succeeds.
func TestReloaderComplains(t *testing.T) {
	bad := &config.Error{Sentence: "Bad destination 'x'", Hint: "list:1: \"x\"\nhint: write a name"}
	taken := errors.New("listening on port 80: address in use")
	results := []error{bad, bad, bad, taken, taken, nil}
	tried := make(chan struct{})
	var log output
	var reported []string
	file := filepath.Join(t.TempDir(), "list")
	r := reloader{
		file: file, every: 10 * time.Millisecond, log: slog.New(slog.NewTextHandler(&log, nil)),
		result: func(trouble string) { reported = append(reported, trouble) }, reload: func() (err error) {
			err, results = results[0], results[1:]
			if err == nil {
				close(tried)
			}
			return err
		},
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { r.run(ctx); close(done) }() // without Since, a change is sent at the start
	select {
	case <-tried:
	case <-time.After(patience):
		t.Errorf("the reload was not repeated until it succeeded")
	}
	stop()
	<-done
	log.wantCount(t, "\n", 2)
	log.wantCount(t, `invalid destination file, keeping previous destinations" file=`+file+` error="Bad destination 'x'" hint="list:1: \"x\": write a name"`, 1)
	if reported[0] != `Bad destination 'x' (list:1: "x": write a name)` {
		t.Errorf("reported %q", reported)
	}
	log.wantCount(t, "address in use", 1)
}

// swap replaces the file "list" in a directory as the kubelet does (AtomicWriter).
func swap(t *testing.T, dir, content string) {
	t.Helper()
	const name = "list"
	data, err := os.MkdirTemp(dir, "..2026_")
	before, _ := os.Readlink(filepath.Join(dir, "..data"))
	for _, err := range []error{
		err,
		os.WriteFile(filepath.Join(data, name), []byte(content), 0o600),
		os.Symlink(filepath.Base(data), filepath.Join(dir, "..data_tmp")),
		os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if before == "" {
		err = os.Symlink("..data/"+name, filepath.Join(dir, name))
	} else {
		err = os.RemoveAll(filepath.Join(dir, before))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Both proxies reload their file when it changes, and after SIGHUP.
func TestProxiesReload(t *testing.T) {
	for command, test := range map[string]struct {
		prefix, old, new, changed, bad, sentence string
	}{
		"http-proxy": {"EGRESS_HTTP_PROXY", "*", "a.example\n*", `msg="rules changed" rules=2`, "*.", "Bad destination '*.'"},
		"dns-proxy":  {"EGRESS_DNS_PROXY", "#", "# other\n$PORT 127.0.0.1 9", `msg="destinations changed" destinations=1`, "x", "Bad destination 'x'"},
	} {
		t.Run(command, func(t *testing.T) {
			port := freePort(t)
			dir := t.TempDir()
			swap(t, dir, test.old)
			file := filepath.Join(dir, "list")
			t.Setenv(test.prefix+"_DESTINATION_FILE", file)
			t.Setenv("EGRESS_HTTP_PROXY_LISTEN", "127.0.0.1:"+port)
			var log output
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			code := make(chan int)
			go func() { code <- Run(ctx, Process{Args: []string{command}, Stdout: &log, Stderr: &log}) }()
			log.await(t, "msg=ready", 1)

			swap(t, dir, strings.ReplaceAll(test.new, "$PORT", port))
			log.await(t, test.changed, 1)
			swap(t, dir, test.bad)
			log.await(t, test.sentence, 1)
			swap(t, dir, "\n"+test.bad) // on another line: another hint
			log.await(t, test.sentence, 2)
			log.await(t, file+":2:", 1)
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			log.await(t, "cannot be read: no such file or directory", 1)

			hangUp(t)
			log.await(t, "SIGHUP received, reloading destinations", 1)
			log.await(t, "cannot be read: no such file or directory", 2) // SIGHUP is answered
			if err := os.Symlink("..data/list", file); err != nil {
				t.Fatal(err)
			}
			log.await(t, test.sentence, 3)
			stop()
			if c := <-code; c != 0 {
				t.Errorf("exit code %d\n%s", c, &log)
			}
			log.wantCount(t, test.changed, 1)
		})
	}
}

// Without a file, SIGHUP only logs a line.
func TestHangUpWithoutFile(t *testing.T) {
	t.Setenv("EGRESS_DNS_PROXY_DESTINATION", "#")
	t.Setenv("EGRESS_HTTP_PROXY_DESTINATION", "*")
	t.Setenv("EGRESS_HTTP_PROXY_LISTEN", "127.0.0.1:"+freePort(t))
	for _, command := range []string{"http-proxy", "dns-proxy"} {
		t.Run(command, func(t *testing.T) {
			var log output
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			code := make(chan int)
			go func() { code <- Run(ctx, Process{Args: []string{command}, Stdout: &log, Stderr: &log}) }()
			log.await(t, "msg=ready", 1)
			hangUp(t)
			log.await(t, "no destination file", 1)
			stop()
			if c := <-code; c != 0 {
				t.Errorf("exit code %d\n%s", c, &log)
			}
		})
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func hangUp(t *testing.T) {
	t.Helper()
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
}

// A proxy whose file changes during its start reloads it.
func TestSinceIsBeforeReading(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	since := follow.At(file)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	var once sync.Once
	r := reloader{file: file, since: since, log: slog.New(slog.DiscardHandler), result: func(string) {}, reload: func() error {
		once.Do(func() { close(read) })
		return nil
	}}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	go r.run(ctx)
	select {
	case <-read:
	case <-time.After(patience):
		t.Error("a change before the first read is not noticed")
	}
}
