package probe_test

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// A connection is one as the command prints it.
type connection struct {
	Event, Protocol, State, Outcome string
	Replied, Own                    bool
	Client, Server, Source          netip.AddrPort
	Port                            int
	SentBytes                       *uint64
}

// The connections of clients are listed with their state, from inside the pod and from the
// node, and nothing changes.
func TestConnections(t *testing.T) {
	t.Parallel()
	labtest.EachBackendInTurn(t, 2, lab.Options{}, func(p *labtest.Pod) {
		p.OK()
		conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
		filter(p, p.Lab.Outside, atServer("udp dport 53 drop"))
		silent := p.Dial(p.Lab.Client, "udp", netip.AddrPortFrom(lab.RouterAddr, 53))
		if _, err := silent.Write([]byte("?")); err != nil {
			p.Fatal(err)
		}
		before := p.State()
		for _, r := range []labtest.Result{
			p.Exec("egress-router", "connections", "-o", "json"),
			run(p, p.Lab.Node, "egress-router", "connections", "-o", "json", "--netns", labtest.File(p.Lab.Router)),
		} {
			var list []connection
			if err := json.Unmarshal([]byte(r.Stdout), &list); err != nil || r.Code != 0 || r.Stderr != "" || len(list) != 2 {
				p.Fatalf("%v, %+v", err, r)
			}
			if c := list[0]; c.Protocol != "udp" || c.Replied || c.Port != 53 || c.Server.String() != "203.0.113.27:53" || c.Client.String() != silent.LocalAddr().String() {
				p.Errorf("without an answer: %+v", c)
			}
			if c := list[1]; c.State != "ESTABLISHED" || !c.Replied || c.Own || c.Port != 8080 || c.Server.String() != "203.0.113.26:80" || c.Source.Addr() != lab.Source || c.Client.String() != conn.LocalAddr().String() {
				p.Errorf("open: %+v", c)
			}
		}
		r := p.Exec("egress-router", "connections")
		if lines := strings.Split(r.Stdout, "\n"); r.Code != 0 || len(lines) < 4 || !strings.HasPrefix(lines[0], "PROTOCOL  STATE") || !strings.HasPrefix(lines[1], "udp       unreplied    10.128.0.71:") || !strings.HasPrefix(lines[2], "tcp       ESTABLISHED  10.128.0.71:") {
			p.Errorf("table: %+v", r)
		}
		p.WantState(before)
		if r := p.Exec("without-privilege", "connections"); r.Code != 1 || !strings.Contains(r.Stderr, "NET_ADMIN") {
			p.Errorf("without privilege: %+v", r)
		}
	})
}

// Frames that the egress interface, or the NIC below it, has dropped are in no connection: the
// counters name them, after the table and in a diagnosis.
func TestConnectionsNameDroppedFrames(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	p.OK()
	// After the start, so that a run would add the routes to the host: the only fault.
	p.Env["EGRESS_MACVLAN_PARENT"], p.Env["EGRESS_HOST_NETNS"] = lab.NIC, labtest.File(p.Lab.Node)
	for _, at := range []struct {
		ns   *netns.Namespace
		name string
	}{{p.Lab.Router, "macvlan0"}, {p.Lab.Node, lab.NIC}} {
		p.SendUnknown(p.Link(p.Handle(at.ns), at.name).Attrs().HardwareAddr)
		counter := regexp.MustCompile(at.name + ` rx_dropped [1-9]`)
		for _, command := range []string{"connections", "diagnose"} {
			p.Until(command+" names the frame to "+at.name, func() bool {
				r := p.Exec("egress-router", command)
				return r.Stderr == "" && counter.MatchString(r.Stdout)
			})
		}
	}
}

// A lines collects output.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// The begin and the end of each connection are followed, also on the node by the router's
// process, until the command is stopped.
func TestConnectionsAreFollowed(t *testing.T) {
	t.Parallel()
	p := labtest.New(t, lab.Options{}, labtest.Nftables)
	r := p.Start("legacy")
	r.AwaitLog(1, "msg=ready")
	p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 80))
	p.Env = nil
	before := p.State()
	var out lines
	cmd := p.Command("egress-router", "connections", "--follow", "-o", "json", "--pid", strconv.Itoa(r.Cmd.Process.Pid))
	cmd.Stdout = &out
	if err := p.Lab.Start(p.Lab.Node, cmd); err != nil {
		t.Fatal(err)
	}
	p.Until("the open connection is printed", func() bool {
		return strings.Contains(out.String(), `"event":"open"`) && strings.Contains(out.String(), "203.0.113.25:80")
	})
	conn := p.Dial(p.Lab.Client, "tcp", netip.AddrPortFrom(lab.RouterAddr, 8080))
	p.Until("the begin of another one is printed", func() bool { return strings.Contains(out.String(), `"event":"began"`) })
	p.WantState(before)
	if err := p.Lab.ForgetConnections(p.Lab.Router); err != nil {
		t.Fatal(err)
	}
	p.Until("its end is printed", func() bool {
		for line := range strings.Lines(out.String()) {
			var c connection
			if strings.HasSuffix(line, "\n") && json.Unmarshal([]byte(line), &c) == nil && c.Event == "ended" && c.Client.String() == conn.LocalAddr().String() {
				return c.Outcome == "removed" && c.Server.String() == "203.0.113.26:80"
			}
		}
		return false
	})
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}
