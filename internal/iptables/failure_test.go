package iptables_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// Each call of an iptables program fails once, before or after it has done its
// work, in a fresh pod and in a damaged one. Each time the run restores the
// former rules, and the next run succeeds. A restore that fails after it has changed the
// rules is no failure: the run reads the rules again.
func TestFailingIptablesRollsBack(t *testing.T) {
	t.Parallel()
	for n, test := range []struct {
		name, does string
		restores   int // least number of restores of one family that can fail
	}{
		{"at once", "", 1},
		{"having done its work", `"$real" "$@";`, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			labtest.EachFlavour(t, lab.Options{}, func(p *labtest.Pod) {
				// In the short variant, each kind of iptables starts fresh with one failure
				// and damaged with the other.
				damaged := n == 1
				if p.Backend == labtest.IptablesLegacy {
					damaged = !damaged
				}
				testIptablesFails(p, test.does, test.restores, func(start bool) bool { return nstest.Long() || start == damaged })
			})
		})
	}
}

func testIptablesFails(p *labtest.Pod, does string, restores int, chosen func(damaged bool) bool) {
	// With auto, nftables would replace the failing iptables.
	p.Env["EGRESS_ROUTER_BACKEND"] = "iptables"
	// Each program counts its calls, since those of the two families run at the
	// same time. The call in turn fails.
	calls, turn := p.TempDir(), filepath.Join(p.TempDir(), "turn")
	real, broken := p.Path, p.Programs(fmt.Sprintf("name=${0##*/}; echo call >>%[1]s/$name; n=0; while read -r _; do n=$((n+1)); done <%[1]s/$name\n"+
		"read -r turn <%[2]s; if [ $name.$n = $turn ]; then %[3]s echo 'injected failure' >&2; exit 4; fi\n"+
		"exec $real \"$@\"\n", calls, turn, does))
	failing := func(program string, call int) labtest.Result {
		if err := os.WriteFile(turn, fmt.Appendf(nil, "%s.%d\n", program, call), 0o600); err != nil {
			p.Fatal(err)
		}
		if err := os.RemoveAll(calls); err != nil {
			p.Fatal(err)
		}
		if err := os.Mkdir(calls, 0o700); err != nil {
			p.Fatal(err)
		}
		p.Path = broken
		defer func() { p.Path = real }()
		return p.Exec()
	}
	for _, start := range []struct {
		name string
		make func()
	}{
		{"fresh", func() {}},
		{"damaged", func() {
			p.Iptables("-t", "nat", "-D", "EGRESS-PREROUTING", "1")
			p.Iptables("-t", "nat", "-D", "PREROUTING", "-j", "EGRESS-PREROUTING")
			p.Iptables("-t", "nat", "-A", "POSTROUTING", "-j", "EGRESS-POSTROUTING")
			p.Iptables("-t", "nat", "-N", "EGRESS-INPUT")
			p.Iptables("-t", "nat", "-A", "EGRESS-INPUT", "-p", "tcp", "-m", "tcp", "--dport", "7", "-j", "ACCEPT")
			p.Iptables("-t", "nat", "-A", "INPUT", "-j", "EGRESS-INPUT")
			p.Iptables("-t", "nat", "-I", "POSTROUTING", "-o", "lo", "-j", "ACCEPT")
			p.Tool(p.Program("ip6tables"), "-F", "EGRESS-INPUT")
			p.Env["EGRESS_DESTINATION"] = "8080 tcp 203.0.113.26 80\n"
		}},
	} {
		if !chosen(start.name == "damaged") {
			continue
		}
		for _, program := range []string{"iptables-save", "ip6tables-save", "iptables-restore", "ip6tables-restore"} {
			if start.name == "damaged" {
				p.Env["EGRESS_DESTINATION"] = labtest.Example()["EGRESS_DESTINATION"]
				p.OK()
			}
			start.make()
			before := p.State()
			call := 1
			for ; ; call++ {
				r := failing(program, call)
				if r.Code == 0 {
					break
				}
				if call > 50 {
					p.Fatalf("%s, %s: run %d fails, want success by now:\n%s", start.name, program, call, labtest.Tail(r.Stderr))
				}
				if r.Code != 1 || !strings.Contains(r.Last(), "injected failure") {
					p.Errorf("%s, %s %d: exit code %d:\n%s", start.name, program, call, r.Code, r.Stderr)
				}
				if p.WantState(before); p.Failed() {
					p.Fatalf("%s, %s %d: not rolled back:\n%s", start.name, program, call, labtest.Tail(r.Stderr))
				}
			}
			want := 1
			if strings.HasSuffix(program, "restore") {
				want = restores
			}
			if call-1 < want {
				p.Errorf("%s: %d calls of %s could fail, want %d", start.name, call-1, program, want)
			}
			p.WantAnswer("tcp", 8080, "203.0.113.26:80")
			if start.name == "fresh" {
				p.Clear()
			}
		}
	}
}

// Each kind of failure ends the run with a hint and without a change, if the backend
// is iptables: nothing replaces it.
func TestFailureHasHint(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		backend labtest.Backend
		command string
		prepare func(*labtest.Pod)
		last    string
		hint    string
	}{
		{
			name: "missing modules", backend: labtest.IptablesLegacy,
			prepare: func(p *labtest.Pod) {
				p.Path = p.Programs("case $0 in *-restore) echo \"iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'nat'\" >&2; exit 3; esac\nexec $real \"$@\"\n")
			},
			last: "unable to initialize table 'nat'", hint: "lacks a module of iptables",
		},
		{name: "no privilege", backend: labtest.IptablesNFT, command: "without-privilege", last: "operation not permitted", hint: "NET_ADMIN"},
		{
			name: "broken program", backend: labtest.IptablesNFT,
			prepare: func(p *labtest.Pod) {
				p.Path = p.Programs("exec $real \"$@\"\n")
				if err := os.WriteFile(p.Program("iptables-restore"), []byte("\x7fELF"), 0o700); err != nil { //nolint:gosec // a program
					p.Fatal(err)
				}
			},
			last: "running iptables-restore: ", hint: "of another architecture",
		},
		{
			name: "program that is killed", backend: labtest.IptablesNFT,
			prepare: func(p *labtest.Pod) { p.Path = p.Programs("case $0 in *-save) kill -KILL $$; esac\n") },
			last:    "running iptables-save: signal: killed", hint: "ended without a message",
		},
		{
			name: "lock", backend: labtest.IptablesLegacy,
			prepare: func(p *labtest.Pod) {
				p.Path = p.Programs("case $0 in *-restore) echo 'Another app is currently holding the xtables lock. Stopped waiting after 5s.' >&2; exit 4; esac\nexec $real \"$@\"\n")
			},
			last: "holding the xtables lock", hint: "find the process",
		},
		{
			name: "missing extension", backend: labtest.IptablesNFT,
			prepare: func(p *labtest.Pod) { p.Env["XTABLES_LIBDIR"] = p.TempDir() },
			last:    "Couldn't load ", hint: "lacks an extension",
		},
		{
			name: "missing extension, legacy", backend: labtest.IptablesLegacy,
			prepare: func(p *labtest.Pod) { p.Env["XTABLES_LIBDIR"] = p.TempDir() },
			last:    "Couldn't load ", hint: "lacks an extension",
		},
		{
			name: "table of nft", backend: labtest.IptablesNFT,
			prepare: func(p *labtest.Pod) {
				p.NFT("add table ip filter")
				p.NFT("add chain ip filter FORWARD { type filter hook forward priority 10; }")
			},
			last: "CHAIN_ADD failed", hint: "another program made a table",
		},
		{
			name: "old version", backend: labtest.IptablesNFT,
			prepare: func(p *labtest.Pod) {
				p.Path = p.Programs("")
				text := "#!/bin/sh\necho iptables v1.4.21\n"
				if err := os.WriteFile(p.Program("iptables"), []byte(text), 0o700); err != nil { //nolint:gosec // a program
					p.Fatal(err)
				}
			},
			last: "is too old", hint: "use the router's container image",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := labtest.New(t, lab.Options{}, test.backend)
			p.Env["EGRESS_ROUTER_BACKEND"] = "iptables"
			whole, before := p.Path, p.State()
			if test.prepare != nil {
				test.prepare(p)
			}
			p.WantRefusal(test.command, test.last, "hint: ")
			p.WantRefusal(test.command, test.last, test.hint)
			if rules := p.NFT("list ruleset"); strings.Contains(rules, "EGRESS-") {
				t.Errorf("rules of the router remain:\n%s", rules)
			}
			p.Path = whole
			if test.name != "table of nft" { // which iptables-save cannot print
				p.WantState(before)
			}
		})
	}
}

// The next router waits for an iptables program that outlives the router which started
// it, so that the program does not undo changes of the next router.
func TestNextRunWaitsForOrphanedIptables(t *testing.T) {
	t.Parallel()
	labtest.EachFlavour(t, lab.Options{}, func(p *labtest.Pod) {
		dir, real := p.TempDir(), p.Path
		file := func(name string) string { return filepath.Join(dir, name) }
		there := func(name string) bool {
			_, err := os.Stat(file(name))
			return err == nil
		}
		// The program of the first router waits for a file. That of the next one
		// makes another file if it runs before.
		p.Path = p.Programs("case $0 in *-restore)\n" +
			"touch " + file("begun") + "; until [ -e " + file("go") + " ]; do sleep 0.01; done\n" +
			"\"$real\" \"$@\"; code=$?; touch " + file("done") + "; exit $code;; esac\nexec $real \"$@\"\n")
		first := p.Command("egress-router")
		p.Path = real
		p.Path = p.Programs("case $0 in *-restore) [ -e " + file("done") + " ] || touch " + file("early") + ";; esac\nexec $real \"$@\"\n")
		if err := p.Lab.Start(p.Lab.Router, first); err != nil {
			p.Fatal(err)
		}
		p.Until("the rules are being loaded", func() bool { return there("begun") })
		if err := first.Process.Kill(); err != nil {
			p.Fatal(err)
		}
		_ = first.Wait()
		time.AfterFunc(labtest.Silence, func() { _ = os.WriteFile(file("go"), nil, 0o600) })
		p.OK()
		if there("early") || !there("done") {
			p.Error("the next router loads rules before the program of the first has ended")
		}
		p.WantUnchanged(p.OK())
		p.WantExample()
	})
}
