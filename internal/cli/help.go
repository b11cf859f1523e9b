package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/egress-router/egress-router/internal/config"
)

const usage = `usage:
  egress-router              run the mode of EGRESS_ROUTER_MODE
  egress-router plan         print the steps of the mode, and change nothing; --kernel:
                             those that a run would take now
  egress-router remove       undo what runs of the mode have done to the network
  egress-router wait         wait for SIGTERM: a pod's second container
  egress-router http-proxy   run the pod's HTTP proxy until SIGTERM
  egress-router dns-proxy    run the pod's DNS proxy until SIGTERM
  egress-router health       print the health of the running program; -o json for JSON
  egress-router diagnose     find out why traffic does not arrive, and change nothing
  egress-router connections  print the connections with the reserved address
  egress-router help         print every variable; with a command, its help
  egress-router version      print the version
`

// commandHelp is the help of each command, without its variables.
var commandHelp = map[string]string{
	"plan": `usage: egress-router plan [--kernel]

Prints the steps of the mode of EGRESS_ROUTER_MODE, in order, and its rules. It reads the
variables that the mode reads and the destination file, does not look at the machine, and
changes nothing. egress-router help prints the variables.

With --kernel it looks at the network namespace that it runs in, prints the steps that a run
would take there now, and changes nothing either. It needs the privilege of a run.

exit codes: 0 done; 1 a variable is invalid, or the namespace cannot be read
`,
	"remove": `usage: egress-router remove

Removes what runs of EGRESS_ROUTER_MODE have done to the network namespace that it runs in:
the reserved address, routes, routing rules and rules; the cluster side's default route is
back. It reads the same variables but for the destinations. An egress interface that the
router has created is deleted. Sysctls of the two interfaces get the values of
net.*.conf.default, the times of connection tracking those of the kernel, and the namespace
does not forward. Stop a router that stays before: it would repair all of it.

exit codes: 0 removed, or nothing was there; 1 error: run it again after its cause is gone
`,
	"wait": `usage: egress-router wait

Does nothing until SIGTERM or SIGINT, without privilege: the second container of a pod
whose first one is an init container, which configures the network and ends.

exit codes: 0 stopped by a signal
`,
	"http-proxy": `usage: egress-router http-proxy

Runs the pod's HTTP proxy until SIGTERM or SIGINT, without privilege. The network is
configured before, by EGRESS_ROUTER_MODE=http-proxy in an init container.

exit codes: 0 stopped by a signal; 1 error
`,
	"dns-proxy": `usage: egress-router dns-proxy

Runs the pod's DNS proxy until SIGTERM or SIGINT, without privilege. The network is
configured before, by EGRESS_ROUTER_MODE=dns-proxy in an init container.

exit codes: 0 stopped by a signal; 1 error
`,
	"health": `usage: egress-router health [-o json]

Prints the health of the programs that run in this container or network namespace: the
router in the modes legacy and monitor, the HTTP proxy and the DNS proxy. Each check has
its state (ok, warning or failed) and its age in that state. It needs no privilege, and
can be an exec probe. With -o json it prints a list in JSON.

exit codes: 0 every program is ready; 1 one is not ready or does not answer, or none runs
`,
	"diagnose": `usage: egress-router diagnose [DESTINATION|PORT] [--pid PID | --netns FILE] [-o json]

Checks everything that a client's packet meets, in its order: the egress interface, the
reserved address, the gateway, routes, rules, forwarding, connection tracking, names, and
then each destination, or the one that is named by its address, its address and port, its
name, or the port of the pod. It prints what it found, what to do, one sentence for the
operator of the server, and the tcpdump command that shows the packets. It changes nothing.

It reads the router's variables. In a container without them it checks what the network
namespace shows. On a node, --pid names a process of the router, whose variables it takes,
and --netns the file of its network namespace. Without NET_ADMIN and NET_RAW it says which
checks need them, and uses what a running router reports.

Its probes leave by the egress interface with the reserved address: ARP or NDP requests to
the gateway and for other holders, and to each destination one TCP connection without data,
one empty UDP datagram, and echo requests of up to eight sizes. Of more than 64 servers it
probes a sample. -o json prints JSON.

exit codes: 0 no check failed; 1 one did, or error; 2 invalid arguments
`,
	"connections": `usage: egress-router connections [--follow] [--pid PID | --netns FILE] [-o json]

Prints the connections with a reserved address that the kernel tracks: those of clients
that were redirected, and the pod's own. Bytes are known if the kernel counts them, as for a
router that stays with EGRESS_HEALTH_LISTEN or EGRESS_AUDIT_LOG, and ages if it keeps
times, as with EGRESS_AUDIT_LOG. Below the table are the counters of dropped frames and
errors of the egress interface and of the NIC below it, as far as this process may look
there, if they are not 0. With --follow it then prints the begin and the end of each
redirected one until SIGTERM or SIGINT. It changes nothing, and needs NET_ADMIN. Variables,
--pid and --netns are as for diagnose. -o json prints a list in JSON, with --follow one
object a line.

exit codes: 0 done or stopped by a signal; 1 error; 2 invalid arguments
`,
	"version": `usage: egress-router version

Prints the version of the program and of Go.
`,
}

// asksHelp reports whether a command's arguments ask for its help: help COMMAND,
// COMMAND -h or COMMAND --help.
func asksHelp(args []string) (name string, asks bool) {
	switch {
	case len(args) != 2:
	case args[0] == "help":
		name = args[1]
	case args[1] == "-h", args[1] == "--help":
		name = args[0]
	}
	_, asks = commands[name]
	return name, asks
}

// helpOf returns the command that prints the help of a command.
func helpOf(name string) command {
	text, ok := commandHelp[name]
	if !ok { // help itself, and its other names
		return command{run: runHelp}
	}
	return command{run: func(_ context.Context, p Process) error {
		var b strings.Builder
		b.WriteString(text)
		for _, part := range variables {
			if part.command == name {
				b.WriteString("\nvariables:\n")
				part.write(&b)
				b.WriteString(inParentheses)
			}
		}
		_, err := io.WriteString(p.Stdout, b.String())
		return err
	}}
}

const inParentheses = "  In parentheses: the default, if the variable is unset or empty.\n"

// A variableList is the variables of one command.
type variableList struct {
	command string // empty: the router
	list    []config.Variable
}

var variables = []variableList{
	{"", config.Variables()}, {"http-proxy", config.HTTPProxyVariables()}, {"dns-proxy", config.DNSProxyVariables()},
}

func (v variableList) write(w io.Writer) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, v := range v.list {
		fmt.Fprintf(table, "  %s\t(%s)\t%s\n", v.Name, v.Unset, v.Doc)
	}
	table.Flush()
}

// modeDocs describes each mode in one line.
var modeDocs = map[config.Mode]string{
	config.Init:      "configure the network and the redirects, then exit",
	config.Legacy:    "configure the network and the redirects, then repair drift until SIGTERM",
	config.Monitor:   "repair drift of what an init run configured, until SIGTERM",
	config.HTTPProxy: "configure the network for a proxy in another container, then exit",
	config.DNSProxy:  "configure the network for a proxy in another container, then exit",
	config.UnitTest:  "print the NAT rules in iptables notation, change nothing",
}

func runHelp(_ context.Context, p Process) error {
	var b strings.Builder
	b.WriteString("egress-router gives a pod a reserved source address on the physical network and\n" +
		"redirects the connections that reach it to external servers.\n\n" + usage)
	for _, part := range variables {
		heading := "\nvariables:\n"
		if part.command != "" {
			heading = "\nvariables of " + part.command + ":\n"
		}
		b.WriteString(heading)
		part.write(&b)
	}
	b.WriteString(inParentheses + "\nmodes (EGRESS_ROUTER_MODE):\n")
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, m := range config.Modes {
		fmt.Fprintf(table, "  %s\t%s\n", m, modeDocs[m])
	}
	table.Flush()
	b.WriteString("\nexit codes: 0 done or stopped by a signal; 1 error, changes rolled back, or health: not ready; 2 invalid arguments\n")
	_, err := io.WriteString(p.Stdout, b.String())
	return err
}

// argumentError returns the output for invalid arguments: for a mode instead of a
// command, how to set it, otherwise the usage. As for every error, the last
// line is the error.
func argumentError(args []string) string {
	text := fmt.Sprintf("egress-router: invalid arguments: %q\n", args)
	mode := args[len(args)-1]
	if _, both := commands[mode]; !both && slices.Contains(config.Modes, config.Mode(mode)) {
		return fmt.Sprintf("hint: %s is a mode, not a command: set the variable EGRESS_ROUTER_MODE=%[1]s, and run without arguments\n", mode) + text
	}
	return usage + text
}
