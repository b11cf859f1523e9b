package iptables_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// A spelling is another form of the output of iptables-save: the arguments of
// sed(1) that rewrite it.
type spelling struct{ name, sed string }

// The forms. Those with $$, the number of the process, change with every call.
var spellings = func() []spelling {
	const (
		order   = ` -e 's/ -i eth0 -p (tcp|udp) / -p \1 -i eth0 /' -e 's/ -m conntrack --ctstate ([A-Z,]+) --ctdir ([A-Z]+)/ -m conntrack --ctdir \2 --ctstate \1/'`
		names   = ` -e 's/ --ctstate INVALID,UNTRACKED/ --ctstate UNTRACKED,INVALID/' -e 's/ --dport / --destination-port /' -e 's,/32 , ,' -e 's/0x1000.0x1000/0X1000/' -e 's/--icmp-type 8/--icmp-type echo-request/' -e 's/reject-with tcp-reset/reject-with tcp-rst/'`
		jumps   = ` -e 's/ -j / --jump /' -e 's/ -g / --goto /' -e 's/^-A ([A-Z-]+) (--jump|-j) EGRESS-/-A \1 -p all \2 EGRESS-/'`
		less    = ` -e 's/ -m (tcp|udp|icmp)//' -e 's/ --ctdir ORIGINAL//'`
		remark  = ` -e "s/^-A .*/& # handle $$/"`
		counter = ` -e "s/^-A /[$$:1$$] -A /"`
	)
	return []spelling{
		{"counters", counter}, {"matches in another order", order}, {"other names of options", names}, {"other names of targets", jumps},
		{"a match that is not printed", less}, {"a remark behind each rule", remark}, {"all of it", order + names + jumps + less + remark + counter},
	}
}()

// iptablesPrograms are the programs that a router or a damage runs.
var iptablesPrograms = []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"}

// spelled returns a PATH in which iptables-save prints the given form. The second
// result returns the number of calls of a program by the router so far.
func spelled(p *labtest.Pod, s spelling) (path string, calls func(program string) int) {
	p.Helper()
	programs, _, _ := strings.Cut(p.Path, ":")
	dir, log := p.TempDir(), filepath.Join(p.TempDir(), "calls")
	for _, name := range iptablesPrograms {
		run := `exec "$real" "$@"`
		if strings.HasSuffix(name, "-save") && s.sed != "" {
			run = `saved=$("$real" "$@") || exit; printf '%s\n' "$saved" | sed -E` + s.sed
		}
		text := fmt.Sprintf("#!/bin/sh\nreal=%s\necho ${0##*/} $* >>%s\n%s\n", filepath.Join(programs, name), log, run)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil { //nolint:gosec // it has to run
			p.Fatal(err)
		}
	}
	return dir + ":" + p.Path, func(program string) (n int) {
		b, err := os.ReadFile(log)
		if err != nil {
			p.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			name, arguments, _ := strings.Cut(strings.TrimSpace(line), " ")
			if name == program && arguments != "--version" {
				n++
			}
		}
		return n
	}
}

// by runs do with another PATH for the router. Damages and comparisons of the test
// run the programs themselves.
func by(p *labtest.Pod, path string, do func()) {
	real := p.Path
	p.Path = path
	defer func() { p.Path = real }()
	do()
}

// A list that is a tree of chains, for both protocols.
func tree() string {
	var list strings.Builder
	for port := range 40 {
		fmt.Fprintf(&list, "%d tcp 203.0.113.26 443\n%d udp 203.0.113.25 53\n", 20000+port*700, 20001+port*700)
	}
	return list.String() + labtest.Example()["EGRESS_DESTINATION"]
}

// fewSpellings are the forms of the tests that take seconds, in the short variant:
// the first alone, and all of them at once.
func fewSpellings() []spelling {
	if nstest.Long() {
		return spellings
	}
	return []spelling{spellings[0], spellings[len(spellings)-1]}
}

// eachSpellingInTurn runs a test in a fresh pod with each form, in the short variant with one
// kind of iptables, another for the next form; the last form, with all differences, has both.
func eachSpellingInTurn(t *testing.T, spellings []spelling, test func(p *labtest.Pod, path string, calls func(string) int)) {
	if nstest.Long() {
		eachSpelling(t, spellings, test)
		return
	}
	last := len(spellings) - 1
	for i, s := range spellings[:last] {
		t.Run(s.name, func(t *testing.T) {
			p := labtest.New(t, lab.Options{}, []labtest.Backend{labtest.IptablesNFT, labtest.IptablesLegacy}[i%2])
			path, calls := spelled(p, s)
			test(p, path, calls)
		})
	}
	eachSpelling(t, spellings[last:], test)
}

// eachSpelling runs a test in a fresh pod with each form and each kind of iptables.
func eachSpelling(t *testing.T, spellings []spelling, test func(p *labtest.Pod, path string, calls func(string) int)) {
	for _, s := range spellings {
		t.Run(s.name, func(t *testing.T) {
			labtest.EachFlavour(t, lab.Options{}, func(p *labtest.Pod) {
				path, calls := spelled(p, s)
				test(p, path, calls)
			})
		})
	}
}

// A second run recognises the rules of the first in any printed form, and so do runs
// with a changed list.
func TestSecondRunInOtherFormChangesNothing(t *testing.T) {
	eachSpellingInTurn(t, spellings, func(p *labtest.Pod, path string, calls func(string) int) {
		for _, list := range []string{labtest.Example()["EGRESS_DESTINATION"], tree(), "80 tcp 203.0.113.26 443\n"} {
			p.Env["EGRESS_DESTINATION"] = list
			by(p, path, func() { p.OK() })
			want := p.State()
			by(p, path, func() {
				before := calls("iptables-restore")
				p.WantUnchanged(p.OK())
				if n := calls("iptables-restore") - before; n > 2 {
					p.Errorf("%d calls of iptables-restore to recognise the rules, want 2: scratch chains loaded, and removed", n)
				}
			})
			p.WantState(want)
			if strings.Contains(want, "EGRESS-TMP") {
				p.Errorf("scratch chains remain:\n%s", want)
			}
		}
		p.WantAnswer("tcp", 80, "203.0.113.26:443")
	})
}

// A router that stays finds nothing to repair, learns the form once, and starts no
// program while nothing changes the rules.
func TestRouterWithOtherFormRepairsNothing(t *testing.T) {
	eachSpellingInTurn(t, fewSpellings(), func(p *labtest.Pod, path string, calls func(string) int) {
		p.Env["EGRESS_DESTINATION"] = tree()
		p.Env["EGRESS_HEALTH_LISTEN"] = ":9465"
		p.Env["EGRESS_HEALTH_INTERVAL"] = "10ms"
		var r *labtest.Running
		by(p, path, func() { r = p.Start("legacy") })
		r.AwaitLog(1, "msg=ready")
		comparisons := 10
		if nstest.Long() {
			comparisons = 100
		}
		r.AwaitComparisons(comparisons)
		wantQuiet(r)
		for _, family := range []string{"iptables", "ip6tables"} {
			// One load, and the canary's two.
			if n := calls(family + "-restore"); n > 3 {
				p.Errorf("%d calls of %s-restore, want at most 3", n, family)
			}
			if saves := calls(family + "-save"); saves < comparisons {
				p.Errorf("%d calls of %s-save in %d comparisons of everything", saves, family, comparisons)
			}
		}
		p.WantExample()

		// Other runs beside the router learn the form themselves, and change no rules.
		for range 3 {
			done := make(chan labtest.Result)
			p.Env["EGRESS_ROUTER_MODE"] = "init"
			for range 2 {
				cmd := p.Command("egress-router")
				cmd.Env = append(cmd.Env, "PATH="+path)
				go func() {
					var stderr strings.Builder
					cmd.Stderr = &stderr
					_ = p.Lab.Run(p.Lab.Router, cmd)
					done <- labtest.Result{Code: cmd.ProcessState.ExitCode(), Stderr: stderr.String()}
				}()
			}
			for range 2 {
				if other := <-done; other.Code != 0 {
					p.Errorf("exit code %d:\n%s", other.Code, other.Stderr)
				} else {
					p.WantUnchanged(other)
				}
			}
		}
		r.AwaitComparisons(5)
		wantQuiet(r)
	})
}

// A canary's own notifications do not keep the router comparing: once it has
// found the rules as planned, changes of the network start no program.
func TestCanaryCausesNoEndlessComparison(t *testing.T) {
	for _, s := range fewSpellings() {
		t.Run(s.name, func(t *testing.T) {
			p := labtest.New(t, lab.Options{}, labtest.IptablesNFT)
			path, calls := spelled(p, s)
			p.Env["EGRESS_HEALTH_LISTEN"] = ":9465"
			p.Env["EGRESS_HEALTH_INTERVAL"] = "0" // events alone
			var r *labtest.Running
			by(p, path, func() { r = p.Start("legacy") })
			r.AwaitLog(1, "msg=ready")
			h := p.Handle(p.Lab.Router)
			loopback := p.Link(h, "lo")
			quiet := 0
			for round := 0; quiet < 5; round++ {
				if round == 50 {
					t.Fatalf("after %d changes of the network it still runs iptables-save", round)
				}
				before, saves := p.Comparisons(), calls("iptables-save")
				var err error
				if round%2 == 0 {
					err = h.LinkSetDown(loopback)
				} else {
					err = h.LinkSetUp(loopback)
				}
				if err != nil {
					t.Fatal(err)
				}
				r.Until("the change of the network is compared", func() bool { return p.Comparisons() > before })
				if quiet++; calls("iptables-save") > saves {
					quiet = 0
				}
			}
			wantQuiet(r)
			if n := calls("iptables-restore"); n > 3 {
				t.Errorf("%d calls of iptables-restore, want at most 3", n)
			}
		})
	}
}

// Damage is found, and repaired, in any form, by a router that stays and by a run;
// nothing else changes.
func TestDamageInOtherFormIsRepaired(t *testing.T) {
	labtest.EachFlavour(t, lab.Options{}, func(p *labtest.Pod) {
		path, _ := spelled(p, spellings[len(spellings)-1])
		p.Strict()
		by(p, path, func() { p.OK() })
		want := p.State()
		// In the short variant each damage comes once: repaired by a run or by a router that
		// stays, with one kind of iptables.
		chosen := func(i, turn int) bool { return nstest.Long() || i%4 == turn }
		first := 0
		if p.Backend == labtest.IptablesLegacy {
			first = 2
		}
		for i, d := range p.Damages() {
			if !chosen(i, first) {
				continue
			}
			if err := p.Damage(d); err != nil {
				p.Fatalf("%s: %v", d.Name, err)
			}
			by(p, path, func() { p.OK() })
			if p.WantState(want); p.Failed() {
				p.Fatalf("not repaired: %s", d.Name)
			}
		}
		p.Env["EGRESS_HEALTH_INTERVAL"] = "50ms"
		var r *labtest.Running
		by(p, path, func() { r = p.Start("legacy") })
		r.AwaitLog(1, "msg=ready")
		for i, d := range p.Damages() {
			if !chosen(i, first+1) {
				continue
			}
			before := r.Repaired()
			// A repair may come between two steps of a damage.
			if err := p.Damage(d); err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ESRCH) {
				p.Fatalf("%s: %v", d.Name, err)
			}
			r.Until("repaired: "+d.Name, func() bool { return r.Repaired() > before })
			if r.Settle(want); p.Failed() {
				p.Fatalf("not repaired: %s", d.Name)
			}
		}
		p.WantExample()
	})
}

// A failed run restores the rules of an earlier list, of which it has only the printed
// form.
func TestRollbackLoadsPrintedForm(t *testing.T) {
	eachSpellingInTurn(t, fewSpellings(), func(p *labtest.Pod, path string, _ func(string) int) {
		p.Env["EGRESS_ROUTER_BACKEND"] = "iptables"
		p.Env["EGRESS_DESTINATION"] = tree()
		p.OK()
		p.Iptables("-t", "nat", "-D", "EGRESS-PREROUTING", "1")
		p.Tool(p.Program("ip6tables"), "-F", "EGRESS-INPUT")
		before := p.State()
		// The canary's restore works, and that of the rules fails.
		spelled, _, _ := strings.Cut(path, ":")
		broken := filepath.Join(p.TempDir(), "ip6tables-restore")
		script := fmt.Sprintf("#!/bin/sh\nin=$(cat)\ncase $in in *EGRESS-TMP*) ;; *) echo injected failure >&2; exit 4; esac\n"+
			"printf '%%s\\n' \"$in\" | %s \"$@\"\n", filepath.Join(spelled, "ip6tables-restore"))
		if err := os.WriteFile(broken, []byte(script), 0o755); err != nil { //nolint:gosec // it has to run
			p.Fatal(err)
		}
		for _, name := range iptablesPrograms {
			if name != "ip6tables-restore" {
				if err := os.Symlink(filepath.Join(spelled, name), filepath.Join(filepath.Dir(broken), name)); err != nil {
					p.Fatal(err)
				}
			}
		}
		p.Env["EGRESS_DESTINATION"] = labtest.Example()["EGRESS_DESTINATION"]
		by(p, filepath.Dir(broken)+":"+path, func() {
			r := p.Exec()
			if r.Code != 1 || !strings.Contains(r.Last(), "injected failure") || strings.Contains(r.Stderr, "roll back") {
				p.Errorf("exit code %d:\n%s", r.Code, r.Stderr)
			}
		})
		p.WantState(before)
	})
}

// A run that is killed while its scratch chains are loaded, and one that cannot
// remove them, leave no trouble: the next removes them.
func TestRemainingScratchChainsAreRemoved(t *testing.T) {
	labtest.EachFlavour(t, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_DESTINATION"] = tree()
		p.OK()
		want := p.State()
		path, _ := spelled(p, spellings[len(spellings)-1])
		spelled, _, _ := strings.Cut(path, ":")
		save := filepath.Join(spelled, "iptables-save")
		text, err := os.ReadFile(save)
		if err != nil {
			p.Fatal(err)
		}
		killing := strings.Replace(string(text), "printf", `case $saved in *EGRESS-TMP*) kill -9 $PPID; esac; printf`, 1)
		if err := os.WriteFile(save, []byte(killing), 0o755); err != nil { //nolint:gosec // it has to run
			p.Fatal(err)
		}
		cmd := p.Command("egress-router")
		cmd.Env = append(cmd.Env, "PATH="+path)
		if err := p.Lab.Run(p.Lab.Router, cmd); err == nil || cmd.ProcessState.ExitCode() >= 0 {
			p.Fatalf("the run was not killed: %v", err)
		}
		left := p.State()
		for _, chain := range []string{":EGRESS-TMP-JUMPS -\n", ":EGRESS-TMP-PREROUTING -\n", ":EGRESS-TMP-TCP -\n"} {
			if !strings.Contains(left, chain) {
				p.Errorf("the killed run has left no scratch chain %s:\n%s", chain, left)
			}
		}
		p.WantExample()
		if r := p.OK(); !strings.Contains(r.Stderr, "scratch chains EGRESS-TMP-… of table nat remain") {
			p.Errorf("the log has no scratch chains:\n%s", r.Stderr)
		}
		p.WantState(want)

		// Other backends remove them too.
		if err := os.WriteFile(save, text, 0o755); err != nil { //nolint:gosec // it has to run
			p.Fatal(err)
		}
		restore := filepath.Join(spelled, "iptables-restore")
		if text, err = os.ReadFile(restore); err != nil {
			p.Fatal(err)
		}
		failing := strings.Replace(string(text), "exec", `in=$(cat); case $in in *"-X EGRESS-TMP"*) echo injected failure >&2; exit 4; esac; printf '%s\n' "$in" |`, 1)
		if err := os.WriteFile(restore, []byte(failing), 0o755); err != nil { //nolint:gosec // it has to run
			p.Fatal(err)
		}
		p.Env["EGRESS_ROUTER_BACKEND"] = "iptables"
		by(p, path, func() { p.WantRefusal("", "injected failure", "") })
		if left := p.State(); !strings.Contains(left, ":EGRESS-TMP-TCP -\n") {
			p.Errorf("scratch chains are removed:\n%s", left)
		}
		p.WantExample()
		flavour := p.Backend
		p.Use(labtest.Nftables)
		p.Env["EGRESS_ROUTER_BACKEND"] = "nftables"
		p.OK()
		p.WantExample()
		p.Use(flavour)
		if rules := p.Rules(); strings.Contains(rules, "EGRESS-") {
			p.Errorf("chains of iptables remain:\n%s", rules)
		}
	})
}

// With the form that a plan is rendered in no canary runs: one iptables-save and
// one iptables-restore start, one iptables-save in every later run, one
// iptables-restore repairs.
func TestRenderedFormNeedsNoCanary(t *testing.T) {
	labtest.EachFlavourInTurn(t, 0, lab.Options{}, func(p *labtest.Pod) {
		p.Env["EGRESS_HEALTH_LISTEN"] = ":9465" // a rule of the plan, in every mode
		path, calls := spelled(p, spelling{})
		// want checks the calls since the last one, the same in both families.
		before := make(map[string]int)
		want := func(when string, saves, restores int) {
			for _, family := range []string{"iptables", "ip6tables"} {
				for program, n := range map[string]int{family + "-save": saves, family + "-restore": restores} {
					got := calls(program)
					if got-before[program] != n {
						p.Errorf("%s: %d calls of %s, want %d", when, got-before[program], program, n)
					}
					before[program] = got
				}
			}
		}
		by(p, path, func() { p.OK() })
		want("a fresh pod", 1, 1)
		by(p, path, func() { p.WantUnchanged(p.OK()) })
		want("a second run", 1, 0)

		p.Env["EGRESS_HEALTH_INTERVAL"] = "20ms"
		var r *labtest.Running
		by(p, path, func() { r = p.Start("legacy") })
		r.AwaitLog(1, "msg=ready")
		r.AwaitComparisons(2)
		before["iptables-restore"] = calls("iptables-restore")
		for i, args := range [][]string{{"-I", "EGRESS-PREROUTING", "-p", "tcp", "-j", "ACCEPT"}, {"-F", "EGRESS-PREROUTING"}, {"-D", "PREROUTING", "-j", "EGRESS-PREROUTING"}} {
			p.Iptables(append([]string{"-t", "nat"}, args...)...)
			r.AwaitLog(i+1, labtest.RepairLogged)
			r.AwaitComparisons(2)
		}
		if n := calls("iptables-restore") - before["iptables-restore"]; n != 3 {
			p.Errorf("%d calls of iptables-restore for three repairs", n)
		}
	})
}

// versionsVariable names a directory of other versions of iptables, as
// .ci/iptables-versions makes it (make test-iptables).
const versionsVariable = "EGRESS_TEST_IPTABLES"

// versions returns PATHs by the name of a version and flavour: the machine's own
// version, and those of versionsVariable.
func versions(t *testing.T) map[string]func(p *labtest.Pod) string {
	t.Helper()
	found := map[string]func(p *labtest.Pod) string{"own": func(p *labtest.Pod) string { return p.Path }}
	dir := os.Getenv(versionsVariable)
	if dir == "" {
		return found
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) < 2 {
		t.Fatalf("%s: %d versions of iptables, want two: %v", versionsVariable, len(entries), err)
	}
	for _, e := range entries {
		found[e.Name()] = func(p *labtest.Pod) string {
			flavour := "nft"
			if p.Backend == labtest.IptablesLegacy {
				flavour = "legacy"
			}
			return filepath.Join(dir, e.Name(), flavour) + ":" + p.Path
		}
	}
	return found
}

// Each version recognises its own rules, repairs damage, and is quiet in a router
// that stays; after another version it loads the rules at most once.
func TestEachVersionRecognisesItsRules(t *testing.T) {
	for name, path := range versions(t) {
		t.Run(name, func(t *testing.T) {
			labtest.EachFlavour(t, lab.Options{}, func(p *labtest.Pod) {
				own := p.Path
				p.Env["EGRESS_HEALTH_LISTEN"] = ":9465" // a rule of the plan, in every mode
				p.Strict()
				p.OK()
				p.Path = path(p)
				version := strings.TrimSpace(p.Tool(p.Program("iptables"), "--version"))
				if r := p.OK(); !strings.Contains(r.Stderr, version) {
					p.Errorf("the router does not use %s:\n%s", version, r.Stderr)
				} else if loads := strings.Count(r.Stderr, "rules loaded"); loads > 1 {
					p.Errorf("%s, after another version: rules loaded %d times:\n%s", version, loads, r.Stderr)
				} else {
					p.Logf("%s, after another version: rules loaded %d times", version, loads)
				}
				for _, list := range []string{tree(), labtest.Example()["EGRESS_DESTINATION"]} {
					p.Env["EGRESS_DESTINATION"] = list
					p.OK()
					want := p.State()
					p.WantUnchanged(p.OK())
					p.WantState(want)
				}
				want := p.State()
				damages := p.Damages()
				if name == "own" {
					damages = nil // the suite of the router does them
				}
				for _, d := range damages {
					if err := p.Damage(d); err != nil {
						p.Fatalf("%s: %v", d.Name, err)
					}
					p.OK()
					if p.WantState(want); p.Failed() {
						p.Fatalf("not repaired: %s", d.Name)
					}
				}
				// Back to the machine's own, and to the version again.
				for _, next := range []string{own, p.Path} {
					p.Path = next
					p.OK()
					p.WantUnchanged(p.OK())
					p.WantExample()
				}
				p.Env["EGRESS_HEALTH_INTERVAL"] = "10ms"
				r := p.Start("legacy")
				r.AwaitLog(1, "msg=ready")
				r.AwaitComparisons(10)
				wantQuiet(r)
			})
		})
	}
}

// wantQuiet checks that the router has repaired nothing, and loaded rules at most
// once.
func wantQuiet(r *labtest.Running) {
	r.Helper()
	log := r.Logged()
	for _, word := range []string{"msg=repaired", "reconcile failed", "contested"} {
		if strings.Contains(log, word) {
			r.Errorf("the router has logged %s:\n%s", word, log)
		}
	}
	if n := strings.Count(log, "rules loaded"); n > 1 {
		r.Errorf("rules loaded %d times:\n%s", n, log)
	}
	for _, name := range []string{`egress_router_repairs_total{kind="rules"}`, "egress_router_repair_failures_total"} {
		if n := r.Metric(name); n != 0 {
			r.Errorf("%s is %d:\n%s", name, n, log)
		}
	}
}
