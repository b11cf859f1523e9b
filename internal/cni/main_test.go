package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/egress-router/egress-router/internal/cni"
	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// The test binary is the plugin under its name.
func TestMain(m *testing.M) {
	if err := buildCnitool(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	labtest.MainOf(m, program)
}

// program is the main function of cmd/egress-router-cni, which cannot be imported. Without a
// call or an argument, and to ask for its health, it is that of a router in a container.
func program() {
	if os.Getenv("CNI_COMMAND") == "" && (len(os.Args) == 1 || os.Args[1] == "health") {
		labtest.Program()
	}
	// A binary that counts its coverage writes it as it exits: until then a signal ends nothing.
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	os.Exit(cni.Run(ctx, cni.Process{
		Args: os.Args[1:], Getenv: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Namespaces: os.Getenv("CNI_TEST_NAMESPACES"),
	}))
}

// A pod is a pod of a lab without an egress interface, and the configuration of its
// attachment.
type pod struct {
	*labtest.Pod
	log  string         // file
	Conf map[string]any // on stdin
	// Variables of a call. CNI_IFNAME is the name that the damages of labtest have.
	Vars map[string]string
}

// newPod returns a pod with the example of labtest as its configuration.
func newPod(t *testing.T, o lab.Options) *pod {
	t.Helper()
	return newPodWith(t, o, labtest.Nftables)
}

// newPodWith returns one whose container's router has a backend.
func newPodWith(t *testing.T, o lab.Options, b labtest.Backend) *pod {
	t.Helper()
	o.NoMacvlan = true
	p := &pod{Pod: labtest.New(t, o, b), log: filepath.Join(t.TempDir(), "log")}
	p.Conf = map[string]any{
		"cniVersion": "0.4.0", "type": "egress-router", "name": "egress-router-cni-nad", "log_file": p.log, "log_level": "debug",
		"ip": map[string]any{
			"addresses":    []string{"192.168.12.99/24"},
			"destinations": []string{"80 TCP 203.0.113.25", "8080 TCP 203.0.113.26 80", "8443 TCP 203.0.113.26 443"},
			"fallbackIP":   "203.0.113.27", "gateway": "192.168.12.1",
		},
	}
	p.Vars = map[string]string{"CNI_CONTAINERID": "c1", "CNI_NETNS": labtest.File(p.Lab.Router), "CNI_IFNAME": "macvlan0", "CNI_TEST_NAMESPACES": t.TempDir()}
	if o.IPv6 {
		p.ip()["addresses"] = []string{"192.168.12.99/24", "2001:db8:12::99/64"}
		p.ip()["gateway"] = []string{"192.168.12.1", "2001:db8:12::1"}
	}
	return p
}

// ip returns the addresses of the configuration.
func (p *pod) ip() map[string]any { return p.Conf["ip"].(map[string]any) }

// stdin returns the configuration as a runtime writes it.
func (p *pod) stdin() string {
	text, err := json.Marshal(p.Conf)
	if err != nil {
		p.Fatal(err)
	}
	return string(text)
}

// command returns the plugin, or another name of the test binary, ready to start on the node.
func (p *pod) command(verb, stdin string) *exec.Cmd {
	cmd := p.Command("egress-router")
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = append(cmd.Env, "CNI_COMMAND="+verb, "CNI_PATH=/opt/cni/bin", "TMPDIR="+os.TempDir())
	for name, value := range p.Vars {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	return cmd
}

// A reply is the answer of the plugin.
type reply struct {
	labtest.Result
	CNIVersion string
	Code       uint
	Msg        string
	Details    string
}

// call calls the plugin on the node.
func (p *pod) call(verb string) reply { return p.run(p.Lab.Node, p.command(verb, p.stdin())) }

func (p *pod) run(ns *netns.Namespace, cmd *exec.Cmd) reply {
	p.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := p.Lab.Run(ns, cmd); err != nil {
		if _, exited := errors.AsType[*exec.ExitError](err); !exited {
			p.Fatal(err)
		}
	}
	r := reply{Result: labtest.Result{Code: cmd.ProcessState.ExitCode(), Stdout: stdout.String(), Stderr: stderr.String()}}
	if r.Result.Code != 0 {
		if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
			p.Fatalf("exit code %d, stdout %q is no JSON: %v; stderr:\n%s", r.Result.Code, &stdout, err, &stderr)
		}
	}
	return r
}

// ok calls the plugin and expects it to succeed.
func (p *pod) ok(verb string) reply {
	p.Helper()
	r := p.call(verb)
	if r.Result.Code != 0 {
		p.Fatalf("%s: code %d, %s; %s; stderr:\n%s", verb, r.Code, r.Msg, r.Details, r.Stderr)
	}
	return r
}

// wantFault calls the plugin and expects an error.
func (p *pod) wantFault(verb string, code uint, msg string) reply {
	p.Helper()
	r := p.call(verb)
	if r.Result.Code != 1 || r.Code != code || !strings.Contains(r.Msg, msg) {
		p.Errorf("%s: exit code %d, error %d\n %s (%s)\nwant 1, %d\n %s", verb, r.Result.Code, r.Code, r.Msg, r.Details, code, msg)
	}
	return r
}

// add calls ADD, and keeps its result for CHECK.
func (p *pod) add() reply {
	p.Helper()
	r := p.ok("ADD")
	p.keep(r)
	return r
}

// keep keeps the result of ADD for CHECK.
func (p *pod) keep(r reply) {
	p.Helper()
	var result map[string]any
	if err := json.Unmarshal([]byte(r.Stdout), &result); err != nil {
		p.Fatal(err)
	}
	p.Conf["prevResult"] = result
}

// del calls DEL as a runtime does after ADD.
func (p *pod) del() {
	p.Helper()
	if r := p.ok("DEL"); r.Stdout != "" {
		p.Errorf("DEL prints %q", r.Stdout)
	}
	delete(p.Conf, "prevResult")
}

// logged returns the lines of the log on the node without their time.
func (p *pod) logged() string {
	p.Helper()
	text, err := os.ReadFile(p.log)
	if err != nil {
		p.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(text)) {
		_, rest, _ := strings.Cut(line, " ")
		lines = append(lines, rest)
	}
	return strings.Join(lines, "")
}

// before is the state of a pod without a router.
func (p *pod) before() string {
	p.Helper()
	return p.Inventory(p.Lab.Router) + p.State()
}

// wantBefore checks that the pod has nothing of a router.
func (p *pod) wantBefore(what, want string) {
	p.Helper()
	if got := p.before(); got != want {
		p.Errorf("%s (-want +got):\n%s", what, diff(want, got))
	}
}

// diff returns the lines of one text that the other lacks.
func diff(want, got string) string {
	var b strings.Builder
	wanted, found := strings.Split(want, "\n"), strings.Split(got, "\n")
	for _, line := range wanted {
		if !slices.Contains(found, line) {
			fmt.Fprintf(&b, "-%s\n", line)
		}
	}
	for _, line := range found {
		if !slices.Contains(wanted, line) {
			fmt.Fprintf(&b, "+%s\n", line)
		}
	}
	return b.String()
}

// namespaces returns a directory with the namespace of the pod by a name, as a runtime makes
// it, and files that are no namespaces.
func (p *pod) namespaces() string {
	p.Helper()
	dir := p.TempDir()
	if err := os.Symlink(labtest.File(p.Lab.Router), filepath.Join(dir, "cni-1")); err != nil {
		p.Fatal(err)
	}
	if err := os.Symlink("/gone", filepath.Join(dir, "cni-2")); err != nil {
		p.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cni-3"), nil, 0o600); err != nil {
		p.Fatal(err)
	}
	return dir
}
