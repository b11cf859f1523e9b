package page

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
)

// start starts a router with a page, and waits until it is ready.
func start(t *testing.T, variables map[string]string) (*labtest.Running, string) {
	t.Helper()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.Env["EGRESS_HEALTH_LISTEN"] = ":9465"
	maps.Copy(p.Env, variables)
	r := p.Start("legacy")
	p.Until("the router is ready", func() bool { code, _ := p.Health(); return code == 0 })
	r.AwaitLog(1, "gateway answers ARP")
	return r, forward(p)
}

// A healthy router: all parts are there, and the page follows without a reload.
func TestHealthyRouter(t *testing.T) {
	t.Parallel()
	r, url := start(t, nil)
	for range 3 {
		r.WantAnswer("tcp", 80, "203.0.113.25:80")
	}
	held := r.Dial(r.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
	defer held.Close()
	b := open(t, url, true)
	b.want("Ready", "10.128.0.98", "192.168.12.99", "gateway", "203.0.113.26:80", "tcp 8080", "ESTABLISHED", "Destinations", "Sources and ports", "Events", "Pause")
	b.look("healthy")

	// The focus stays where it is while the page changes.
	eval[bool](b, `document.querySelector("nav a[href='#events']").focus(), true`)
	r.WantAnswer("tcp", 9000, "203.0.113.27:9000")
	b.await(`document.querySelector("#destinations").innerText.includes("203.0.113.27") && [...document.querySelectorAll("#destinations-rows tr")].some((r) => r.cells[1].innerText === "203.0.113.27" && r.cells[4].innerText === "1")`)
	if on := eval[string](b, "document.activeElement.getAttribute('href')"); on != "#events" {
		t.Errorf("the focus is on %q", on)
	}

	// A pause.
	b.run(chromedp.Click(chromedp.CSS("#pause")))
	b.await(`document.querySelector("#age").textContent === "paused"`)
	b.wantQuiet()
}

// A router that loses its interface: the page says so at once, and what to do. If the
// router ends, the page says that it is old.
func TestDamagedRouter(t *testing.T) {
	t.Parallel()
	r, url := start(t, map[string]string{"EGRESS_PROBE": "tcp", "EGRESS_PROBE_INTERVAL": "1s", "EGRESS_DESTINATION": "80 tcp 203.0.113.25\n81 tcp 203.0.113.25 81\n"})
	r.Until("the probe fails", func() bool { _, out := r.Health(); return strings.Contains(out, "1 of 2 unreachable") })
	b := open(t, url, true)
	b.await(`document.querySelector("#headline").textContent === "Ready, with 1 warning"`)
	b.want("203.0.113.25:81", "connection refused", "egress-router diagnose")
	b.look("impaired")

	r.FlushSourceRule()
	b.await(`document.querySelector("#events").innerText.includes("repaired")`)

	h := r.Handle(r.Lab.Router)
	if err := h.LinkDel(r.Link(h, "macvlan0")); err != nil {
		t.Fatal(err)
	}
	b.await(`document.title.startsWith("Not ready")`)
	b.await(`document.querySelector("#path li.failed") !== null`)
	b.want(`interface "macvlan0" not found`, "Check what creates it")
	b.look("damaged")
	b.wantQuiet()

	r.Terminate()
	b.await(`!document.querySelector("#stale").hidden && document.querySelector("#stale").textContent.startsWith("No answer since")`)
	b.look("gone")
}

// A gateway that does not answer.
func TestSilentGateway(t *testing.T) {
	t.Parallel()
	r, url := start(t, nil)
	if err := r.Lab.Run(r.Lab.Outside, exec.Command("nft", "add table arp fault; add chain arp fault input { type filter hook input priority 0; policy drop; }")); err != nil {
		t.Fatal(err)
	}
	b := open(t, url, true)
	b.await(`document.querySelector("#headline").textContent === "Not ready"`)
	b.want("gateway 192.168.12.1 does not answer ARP", "Wrong NIC or VLAN")
	b.look("silent")
	b.wantQuiet()
}

// many is the number of destinations of a loaded router.
const many = 10000

// A loaded router: 10,000 destinations and some hundred connections, of which some have no
// answer. Pages and the search find each destination, also without script.
func TestLoadedRouter(t *testing.T) {
	t.Parallel()
	var list strings.Builder
	for i := range many {
		fmt.Fprintf(&list, "%d tcp 203.0.113.%d 80\n", 10000+i, 25+i%2)
	}
	list.WriteString("9999 tcp 203.0.113.25 9999\n")
	file := filepath.Join(t.TempDir(), "destinations")
	if err := os.WriteFile(file, []byte(list.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	r, url := start(t, map[string]string{"EGRESS_DESTINATION": "", "EGRESS_DESTINATION_FILE": file})
	for i := range 300 {
		defer r.Dial(r.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, uint16(10000+i%150))).Close()
	}
	if err := r.Lab.Run(r.Lab.Outside, exec.Command("nft", "add table ip fault; add chain ip fault input { type filter hook input priority 0; }; add rule ip fault input tcp dport 9999 drop")); err != nil {
		t.Fatal(err)
	}
	var waiting sync.WaitGroup
	t.Cleanup(waiting.Wait)
	for range 5 {
		waiting.Go(func() {
			if conn, err := r.Lab.Dial(t.Context(), r.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 9999)); err == nil {
				_ = conn.Close()
			}
		})
	}
	b := open(t, url, true)
	b.await(`document.querySelector("#destinations-rows").innerText.includes("5 of 5 open connections without an answer")`)
	b.want("10,001 destinations, 1 with a failure", "305 connections of clients, 5 of them without an answer", "SYN_SENT unreplied", "1 to 50 of 10,001", "tcp 10000")
	b.await(`[...document.querySelectorAll("#destinations-rows tr")].some((r) => r.cells[8].innerText.endsWith("/s"))`) // after two looks
	b.look("loaded")
	b.run(chromedp.SendKeys(chromedp.CSS("input[name=q]"), "tcp 19999"+kb.Enter))
	b.await(`document.querySelectorAll("#destinations-rows tbody tr").length === 1`)
	b.want("tcp 19999", "203.0.113.26:80")
	b.wantQuiet()

	plain := open(t, url, false)
	plain.run(chromedp.Click(chromedp.CSS("#destinations .pager a")))
	plain.await(`document.querySelector(".pager span").textContent === "51 to 100 of 10,001"`)
	if n := eval[int](plain, `document.querySelectorAll("#destinations-rows tbody tr").length`); n != 50 {
		t.Errorf("%d rows on the second page", n)
	}
	if eval[bool](plain, `document.querySelector("#pause:not([hidden]), #age:not([hidden])") !== null`) {
		t.Error("without script, a control of the script is shown")
	}
	plain.wantQuiet()
}

// The keyboard alone: the first stop leads to the state, and every stop can be seen.
func TestKeyboard(t *testing.T) {
	t.Parallel()
	_, url := start(t, nil)
	b := open(t, url, true)
	b.run(chromedp.KeyEvent(kb.Tab))
	if at := eval[string](b, "document.activeElement.textContent"); at != "Skip to the state" {
		t.Errorf("the first stop is %q", at)
	}
	b.run(chromedp.KeyEvent(kb.Enter))
	b.await(`document.activeElement.id === "main"`)
	b.run(chromedp.KeyEvent(kb.Tab))
	b.await(`document.activeElement.name === "q"`) // the first control behind the state
	b.run(chromedp.KeyEvent("8443"), chromedp.KeyEvent(kb.Enter))
	b.await(`document.querySelectorAll("#destinations-rows tbody tr").length === 1`)
	b.want("203.0.113.26:443")
	b.wantQuiet()
}
