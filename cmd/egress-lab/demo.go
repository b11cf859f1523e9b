package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// A question is a request of the client to a port of the pod.
type question struct {
	proto string
	port  uint16
	want  netip.AddrPort // server that has to answer
}

// questions has one entry for each line of the example, and two for the last line, the
// fallback for all ports of all protocols.
var questions = []question{
	{"tcp", 80, netip.MustParseAddrPort("203.0.113.25:80")},
	{"tcp", 8080, netip.MustParseAddrPort("203.0.113.26:80")},
	{"tcp", 8443, netip.MustParseAddrPort("203.0.113.26:443")},
	{"tcp", 9000, netip.MustParseAddrPort("203.0.113.27:9000")},
	{"udp", 53, netip.MustParseAddrPort("203.0.113.27:53")},
}

// questions6 are those of the pod with a source of each family.
var questions6 = []question{
	{"tcp", 80, netip.MustParseAddrPort("203.0.113.25:80")},
	{"tcp", 80, netip.MustParseAddrPort("[2001:db8::25]:80")},
	{"tcp", 8080, netip.MustParseAddrPort("[2001:db8::26]:80")},
	{"udp", 53, netip.MustParseAddrPort("[2001:db8::27]:53")},
}

// destinations6 are the lines for them.
const destinations6 = `80 tcp 203.0.113.25
80 tcp 2001:db8::25
8080 tcp 2001:db8::26 80
2001:db8::27`

const demoPlace = `A client, the pod of a router, their node and the outside, each a network
namespace on this machine, which ends with this program:

  client               pod                             outside
  10.128.0.71 -- eth0  10.128.0.98 | macvlan0 -------- 192.168.12.1   gateway
                                                       203.0.113.25   servers
                                                       203.0.113.26
                                                       203.0.113.27

`

const demoTable = `
The client connects to the pod again. Each line of EGRESS_DESTINATION names the
server for one port, the last line the server for all other ports, and every
server has to see the reserved address of the pod, 192.168.12.99:

`

const demoAgain = `
The router starts a second time, as after a restart of its container, and must
change nothing. It logs:

`

const demoIPv6 = `
The same with IPv6, in a new pod, whose cluster address is also fd00:10:128::98. The
router waits until the kernel knows that no other host has the IPv6 address, while
IPv4 works already. It starts with this environment:

`

// demo returns the command that shows the main job of the router: a client that connects to the
// pod reaches servers outside, which see the reserved address. The router has the backend of
// args, or chooses one itself. The error lists wrong answers.
func demo(args []string) func(ctx context.Context, program string, stdout io.Writer) error {
	var env []string
	for _, backend := range args {
		env = append(env, "EGRESS_ROUTER_BACKEND="+backend)
	}
	return func(ctx context.Context, program string, stdout io.Writer) error {
		return showDemo(ctx, program, env, stdout)
	}
}

// showDemo is the demo with more variables of the router.
func showDemo(ctx context.Context, program string, more []string, stdout io.Writer) error {
	l, err := lab.New(lab.Options{})
	if err != nil {
		return err
	}
	defer l.Close()
	for _, q := range questions {
		if _, err := l.Serve(l.Outside, q.proto, q.want); err != nil {
			return err
		}
	}
	fmt.Fprint(stdout, demoPlace)

	var wrong []string
	before, refused := askBefore(ctx, l)
	fmt.Fprintf(stdout, "Before the router starts, the client connects to tcp port 80 of the pod: %s.\n", before)
	if !refused {
		wrong = append(wrong, "the client was not refused before the router started")
	}

	env := environment("init", append(more, "EGRESS_DESTINATION="+exampleDestination)...)
	fmt.Fprint(stdout, "\nThe router starts in the pod with this environment:\n\n")
	printVariables(stdout, env)
	fmt.Fprint(stdout, "\nIt logs:\n\n")
	if _, err := startRouter(ctx, l, program, env, stdout); err != nil {
		return err
	}

	fmt.Fprint(stdout, demoTable)
	if bad := askAll(ctx, l, questions, stdout); bad > 0 {
		wrong = append(wrong, fmt.Sprintf("%d of %d answers are wrong", bad, len(questions)))
	}

	fmt.Fprint(stdout, demoAgain)
	log, err := startRouter(ctx, l, program, env, stdout)
	if err != nil {
		return err
	}
	if found := changes(log); found != "" {
		fmt.Fprintf(stdout, "\nWRONG: %s.\n", found)
		wrong = append(wrong, found)
	} else {
		fmt.Fprint(stdout, "\nok: no change.\n")
	}
	if len(wrong) > 0 {
		return errors.New(strings.Join(wrong, "; "))
	}
	answers := len(questions)
	if _, err := os.Stat("/proc/net/if_inet6"); err == nil { // proc_pid_net(5): the kernel has IPv6
		if err := dualStack(ctx, program, more, stdout); err != nil {
			return err
		}
		answers += len(questions6)
	}
	fmt.Fprintf(stdout, "\ndemo: all %d answers as expected\n", answers)
	return nil
}

// dualStack shows a router with sources of both families.
func dualStack(ctx context.Context, program string, more []string, stdout io.Writer) error {
	l, err := lab.New(lab.Options{IPv6: true})
	if err != nil {
		return err
	}
	defer l.Close()
	for _, q := range questions6 {
		if _, err := l.Serve(l.Outside, q.proto, q.want); err != nil {
			return err
		}
	}
	fmt.Fprint(stdout, demoIPv6)
	env := []string{
		"EGRESS_ROUTER_MODE=init", "EGRESS_GRAMMAR=extended", "EGRESS_SOURCE=" + exampleSource + ", " + lab.Source6.String() + "/64",
		"EGRESS_GATEWAY=" + exampleGateway + ", " + lab.GatewayLinkLocal.String(),
	}
	env = append(append(env, more...), "EGRESS_DESTINATION="+destinations6)
	printVariables(stdout, env)
	fmt.Fprint(stdout, "\nIt logs:\n\n")
	if _, err := startRouter(ctx, l, program, env, stdout); err != nil {
		return err
	}
	fmt.Fprintln(stdout)
	if bad := askAll(ctx, l, questions6, stdout); bad > 0 {
		return fmt.Errorf("%d of %d answers are wrong with both families", bad, len(questions6))
	}
	return nil
}

// printVariables prints an environment.
func printVariables(stdout io.Writer, env []string) {
	for _, variable := range env {
		if name, value, _ := strings.Cut(variable, "="); strings.Contains(value, "\n") {
			variable = name + "=\n  " + strings.ReplaceAll(value, "\n", "\n  ")
		}
		printIndented(stdout, variable)
	}
}

// askBefore asks the pod before a router has run in it. The pod has to refuse: a timeout
// would mean that the lab is broken.
func askBefore(ctx context.Context, l *lab.Lab) (got string, refused bool) {
	answer, err := ask(ctx, l, questions[0])
	if err == nil {
		return fmt.Sprintf("answered by %s", answer.Server), false
	}
	return reason(err), errors.Is(err, syscall.ECONNREFUSED)
}

// startRouter runs the router to its end, prints its log and returns it.
func startRouter(ctx context.Context, l *lab.Lab, program string, env []string, stdout io.Writer) (string, error) {
	o, err := execute(ctx, l, l.Router, env, nil, program)
	for line := range strings.Lines(o.stderr) {
		if rest, ok := strings.CutPrefix(line, "time="); ok {
			_, line, _ = strings.Cut(rest, " ") // without the time
		}
		printIndented(stdout, line)
	}
	if o.stderr == "" {
		printIndented(stdout, "(nothing)")
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		err = fmt.Errorf("the router failed with exit code %d; its log is above", exit.ExitCode())
	}
	return o.stderr, err
}

// printIndented prints the lines of a text that is not the demo's own.
func printIndented(w io.Writer, text string) {
	for line := range strings.Lines(text) {
		fmt.Fprintf(w, "  %s\n", strings.TrimSuffix(line, "\n"))
	}
}

// demoPatience is how long the demo waits for one answer. It is far above the time of an
// answer on a busy machine; a router that drops requests takes all of it.
const demoPatience = 20 * time.Second

// ask asks the pod from the client, by the family of the server.
func ask(ctx context.Context, l *lab.Lab, q question) (lab.Answer, error) {
	pod := lab.RouterAddr
	if q.want.Addr().Is6() {
		pod = lab.RouterAddr6
	}
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	return l.Ask(ctx, l.Client, q.proto, netip.AddrPortFrom(pod, q.port))
}

// askAll asks questions, prints a table of the answers, and returns how
// many are wrong.
func askAll(ctx context.Context, l *lab.Lab, questions []question, stdout io.Writer) (bad int) {
	table := tabwriter.NewWriter(stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "  PORT\tEXPECTED SERVER\tANSWERED BY\tSERVER SAW\tRESULT")
	for _, q := range questions {
		by, saw, verdict := "", "-", "ok"
		answer, err := ask(ctx, l, q)
		source := lab.Source
		if q.want.Addr().Is6() {
			source = lab.Source6
		}
		if err == nil {
			by, saw = answer.Server.String(), answer.Peer.Addr().String()
		} else {
			by = "nobody: " + reason(err)
		}
		if err != nil || answer.Server != q.want || answer.Peer.Addr() != source {
			verdict = "WRONG"
			bad++
		}
		fmt.Fprintf(table, "  %s %d\t%s\t%s\t%s\t%s\n", q.proto, q.port, q.want, by, saw, verdict)
	}
	table.Flush()
	return bad
}

// reason returns the cause of a missing answer in a few words.
func reason(err error) string {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Sprintf("no answer within %s", demoPatience)
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno.Error()
	}
	return err.Error()
}

// changes returns the fault in the log of a second run: a line that shows a change, or no
// line "ready". It is empty if there is none.
func changes(log string) string {
	for _, word := range []string{"network changed", "rules loaded"} {
		if strings.Contains(log, word) {
			return fmt.Sprintf("the second run logged %q", word)
		}
	}
	if !strings.Contains(log, "msg=ready") {
		return `the second run did not log "ready"`
	}
	return ""
}
