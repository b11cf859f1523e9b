package page

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// The variables of make e2e-page: the file of axe-core, and the directory of the
// screenshots, without which they are artifacts of the test.
const (
	axeFile     = "EGRESS_TEST_AXE"
	screenshots = "EGRESS_TEST_SCREENSHOTS"
)

func TestMain(m *testing.M) { labtest.Main(m) }

// A browser is a tab of a browser with a page.
type browser struct {
	*testing.T
	ctx context.Context

	mu       sync.Mutex
	messages []string // errors of the console, such as a violated Content-Security-Policy
}

// open starts a browser with an address, with or without scripts.
func open(t *testing.T, url string, script bool) *browser {
	t.Helper()
	program, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("find chromium (make e2e-page installs it): %v", err)
	}
	options := append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]),
		chromedp.ExecPath(program),
		chromedp.NoSandbox, // it needs namespaces, which the test's are in
		chromedp.Flag("disable-dev-shm-usage", true),
		chromedp.Flag("no-proxy-server", true),
		chromedp.UserDataDir(t.TempDir()),
		chromedp.WSURLReadTimeout(labtest.Patience),
		chromedp.CombinedOutput(io.Discard),
	)
	allocated, free := chromedp.NewExecAllocator(t.Context(), options...)
	ctx, end := chromedp.NewContext(allocated)
	t.Cleanup(func() { end(); free() })
	b := &browser{T: t, ctx: ctx}
	if err := chromedp.Listen(ctx, b.hear); err != nil {
		t.Fatal(err)
	}
	call(b, log.Enable, cdp.Empty{})
	call(b, runtime.Enable, cdp.Empty{})
	if !script {
		call(b, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
	}
	for begin := time.Now(); ; {
		err := b.try(chromedp.Navigate(url))
		if err == nil {
			return b
		}
		// On a busy machine, the router may close a connection before the browser has
		// sent its request.
		if time.Since(begin) > labtest.Patience {
			t.Fatal(err)
		}
	}
}

// hear keeps what the browser complains about.
func (b *browser) hear(event any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch e := event.(type) {
	case *log.EventEntryAdded:
		if e.Entry.Source == log.EntrySourceNetwork {
			return // a request that failed, after which the page asks again
		}
		b.messages = append(b.messages, e.Entry.Text)
	case *runtime.EventExceptionThrown:
		b.messages = append(b.messages, e.ExceptionDetails.Text)
	}
}

// call sends a command of the DevTools protocol.
func call[P, R any](b *browser, command cdp.Command[P, R], params P) {
	b.Helper()
	if _, err := chromedp.Call(b.ctx, command, params); err != nil {
		b.Fatal(err)
	}
}

func (b *browser) run(actions ...chromedp.Action[chromedp.Void]) {
	b.Helper()
	if err := b.try(actions...); err != nil {
		b.Fatal(err)
	}
}

func (b *browser) try(actions ...chromedp.Action[chromedp.Void]) error {
	ctx, cancel := context.WithTimeout(b.ctx, labtest.Patience)
	defer cancel()
	return chromedp.Do(ctx, actions...)
}

// wantQuiet fails if the browser has complained.
func (b *browser) wantQuiet() {
	b.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.messages) > 0 {
		b.Errorf("the console has\n%s", strings.Join(b.messages, "\n"))
	}
}

// eval returns the value of an expression.
func eval[T any](b *browser, expression string) T {
	b.Helper()
	value, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		b.Fatalf("%s: %v", expression, err)
	}
	return value
}

// await waits until an expression is true. While another page loads there is none.
func (b *browser) await(expression string) {
	b.Helper()
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		is, err := chromedp.Run(b.ctx, chromedp.Evaluate[bool](expression))
		if err == nil && is {
			return
		}
		if failed, err := chromedp.Run(b.ctx, chromedp.Evaluate[bool](`location.protocol === "chrome-error:"`)); err == nil && failed {
			_ = b.try(chromedp.Reload()) // as in open
		}
		if time.Since(begin) > labtest.Patience {
			b.Fatalf("%s is not true, %v; the page has\n%s", expression, err, b.text())
		}
	}
}

// text returns the text of the page.
func (b *browser) text() string { b.Helper(); return eval[string](b, "document.body.innerText") }

// want fails if the page lacks a text.
func (b *browser) want(texts ...string) {
	b.Helper()
	shown := b.text()
	for _, text := range texts {
		if !strings.Contains(shown, text) {
			b.Errorf("the page lacks %q:\n%s", text, shown)
		}
	}
}

// The sizes and colours in which a page is looked at.
var looks = []struct {
	name          string
	width, height int64
	scheme        string
}{
	{"light", 1280, 900, "light"}, {"dark", 1280, 900, "dark"}, {"phone", 360, 740, "light"},
}

// look takes a screenshot in each size and colour, and checks that the page is accessible
// and has no scroll bar to the side.
func (b *browser) look(name string) {
	b.Helper()
	source, err := os.ReadFile(os.Getenv(axeFile))
	if err != nil {
		b.Fatalf("read axe-core (make e2e-page installs it, %s names it): %v", axeFile, err)
	}
	for _, l := range looks {
		call(b, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: l.scheme}}})
		b.run(chromedp.EmulateViewport(l.width, l.height))
		picture, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
		if err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(cmp.Or(os.Getenv(screenshots), b.ArtifactDir()), name+"-"+l.name+".png"), picture, 0o644); err != nil {
			b.Fatal(err)
		}
		if wide := eval[int](b, "document.documentElement.scrollWidth - innerWidth"); wide > 0 {
			b.Errorf("%s, %s: %d pixels too wide", name, l.name, wide)
		}
		eval[bool](b, string(source)+"; true")
		found := eval[string](b, `axe.run(document, {resultTypes: ["violations"]}).then((r) => JSON.stringify(r.violations.map((v) => [v.id, v.help, v.nodes.slice(0, 5).map((n) => n.html)])))`)
		var violations []any
		if err := json.Unmarshal([]byte(found), &violations); err != nil {
			b.Fatal(err)
		}
		for _, v := range violations {
			b.Errorf("%s, %s: axe finds %v", name, l.name, v)
		}
	}
}

// forward returns an address on the loopback link that leads to the health port of a
// pod, from the clients' side.
func forward(p *labtest.Pod) (url string) {
	p.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			go relay(p.Lab, near)
		}
	}()
	return fmt.Sprintf("http://%s/", l.Addr())
}

func relay(l *lab.Lab, near net.Conn) {
	defer near.Close()
	far, err := l.Dial(context.Background(), l.Client, "tcp", labtest.HealthAddr)
	if err != nil {
		return // as from a port that nothing listens on
	}
	defer far.Close()
	go func() { _, _ = io.Copy(far, near) }()
	_, _ = io.Copy(near, far) // the router ends the connection after its answer
}
