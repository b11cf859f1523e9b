package httpproxy

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// squidZone has the names of TestSquidDecides. The reverse name of 203.0.113.23 is
// a.example, which does not resolve to it.
var squidZone = zone{
	"a.example": {"203.0.113.21"}, "b.a.example": {"203.0.113.22"}, "ba.example": {"203.0.113.23"},
	"two.example": {"203.0.113.21", "203.0.113.24"}, "six.example": {"2001:db8::1"}, "both.example": {"203.0.113.24", "2001:db8::1"}, "intranet": {"203.0.113.25"},
	// Names below the search list, which does not complete a name that exists.
	"search": {"sub.test", "corp.test"}, "api.corp.test": {"203.0.113.26"}, "deep.er.corp.test": {"203.0.113.27"}, "a.example.corp.test": {"203.0.113.28"},
	"203.0.113.21": {"a.example"}, "203.0.113.22": {"b.a.example"}, "203.0.113.23": {"a.example"}, "203.0.113.24": {"two.example"},
}

// TestSquidDecides compares the decisions of the proxy and of squid, with the rules in
// the original's notation. Only the differences of the contract are allowed.
func TestSquidDecides(t *testing.T) {
	requests := []string{
		"a.example", "A.Example", "a.example.", "b.a.example", "ba.example", "two.example", "six.example", "both.example", "intranet", "none.example",
		"203.0.113.21", "203.0.113.22", "203.0.113.23", "203.0.113.24", "203.0.113.25", "[2001:db8::1]",
		"api", "api.", "API.corp.test", "deep.er", "deep.er.", "none",
	}
	// Squid knows no search list: it has to decide on the full name.
	full := map[string]string{"api": "api.corp.test", "deep.er": "deep.er.corp.test"}
	parts := []string{
		"a.example", "*.a.example", "*.example", "two.example", "intranet", "none.example", "203.0.113.21", "203.0.113.24", "203.0.113.20/30",
		"203.0.113.22/24", "*.test", "api.corp.test", "*.er.corp.test", "203.0.113.26/31", "2001:db8::/32", "2001:db8::1",
	}
	random := rand.New(rand.NewPCG(1, 2))
	var lists []Rules
	for len(lists) < 100 { // squid has room for 128 ports
		var lines []string
		for range 1 + random.IntN(4) {
			line := parts[random.IntN(len(parts))]
			if random.IntN(2) == 0 {
				line = "!" + line
			}
			lines = append(lines, line)
		}
		if random.IntN(3) > 0 {
			lines = append(lines, "*")
		}
		list, err := Parse(strings.Join(lines, "\n"))
		check(t, err)
		lists = append(lists, list)
	}

	server := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	l, err := net.Listen("tcp", ":8021")
	check(t, err)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
	serveNames(t, "127.0.0.1:53", squidZone)
	port := startSquid(t, lists)
	p := start(t, "*", squidZone, nil)

	seen := map[string]int{}
	for i, list := range lists {
		p.rules.Store(newRuleSet(list, nil))
		for _, host := range requests {
			for _, method := range []string{"GET", "CONNECT"} {
				ours, squids := ask(t, p.addr, method, host), ask(t, fmt.Sprintf("127.0.0.1:%d", port+i), method, cmp.Or(full[host], host))
				seen[ours]++
				if ours == squids {
					continue
				}
				// The contract's differences.
				var why string
				switch host {
				case "203.0.113.23":
					why = "squid trusts the name that an address has"
				case "two.example", "both.example":
					why = "of a name that an address rule allows, squid may dial another address"
				}
				if why == "" || squids != asSquid(list, host) {
					t.Errorf("%s %s by %q: %s, squid returns %s", method, host, list, ours, squids)
				}
				seen[why]++
			}
		}
	}
	t.Logf("%v", seen)
	for _, want := range []string{"allowed", "denied", "failed", "squid trusts the name that an address has"} {
		if seen[want] == 0 {
			t.Errorf("no request is for: %s", want)
		}
	}
}

// asSquid returns the decision of squid on a request where the proxy differs.
func asSquid(list Rules, host string) string {
	name, addrs := host, squidZone[host]
	if _, err := netip.ParseAddr(host); err == nil {
		name, addrs = squidZone[host][0], []string{host}
	}
	for _, r := range list {
		matches := r.Any || r.Name != "" && r.matchesName(name) || r.Network.IsValid() &&
			slices.ContainsFunc(addrs, func(a string) bool { return r.Network.Contains(ip(a)) })
		if matches {
			return map[bool]string{true: "denied", false: "allowed"}[r.Deny]
		}
	}
	return "denied"
}

// ask sends one request to a proxy and returns the outcome.
func ask(t *testing.T, proxy, method, host string) string {
	t.Helper()
	conn, err := net.DialTimeout("tcp", proxy, patience)
	check(t, err)
	defer conn.Close()
	check(t, conn.SetDeadline(time.Now().Add(patience)))
	url := "http://" + host + ":8021/"
	if method == "CONNECT" {
		url = host + ":8021"
	}
	send(t, conn, method+" "+url+" HTTP/1.1\r\nHost: "+host+":8021\r\n\r\n")
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return "unanswered"
	}
	switch fields := strings.Fields(line + " -"); fields[1] {
	case "200":
		return "allowed"
	case "403":
		return "denied"
	case "500", "502", "503", "504": // the first is squid's for a name that does not exist
		return "failed"
	}
	return line
}

// startSquid runs one squid with a port for each list and returns the first.
func startSquid(t *testing.T, lists []Rules) int {
	t.Helper()
	const first = 20000
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	var b strings.Builder
	fmt.Fprintf(&b, "pid_filename none\ncache deny all\naccess_log none\ncache_log %s\ncoredump_dir %s\nshutdown_lifetime 0\n"+
		"dns_nameservers 127.0.0.1\nhosts_file none\ndns_timeout 60 seconds\nnetdb_filename none\npinger_enable off\nmax_filedescriptors 1024\n", log, dir)
	for i, list := range lists {
		fmt.Fprintf(&b, "http_port 127.0.0.1:%d name=port%d\nacl at%[2]d myportname port%[2]d\n", first+i, i)
		b.WriteString(strings.NewReplacer(
			"acl dest", fmt.Sprintf("acl at%d-dest", i),
			" dest", fmt.Sprintf(" at%d at%[1]d-dest", i),
			" all\n", fmt.Sprintf(" at%d\n", i),
		).Replace(list.Squid()))
	}
	config := filepath.Join(dir, "squid.conf")
	check(t, os.WriteFile(config, []byte(b.String()), 0o644))
	check(t, os.WriteFile(log, nil, 0o666))
	check(t, os.Chmod(dir, 0o777)) // squid drops its root privilege
	check(t, os.Chmod(log, 0o666))

	path, err := exec.LookPath("squid")
	if err != nil {
		path = "/usr/sbin/squid" // not in the PATH of every user
	}
	squid := exec.Command(path, "-N", "-f", config)
	var output bytes.Buffer
	squid.Stdout, squid.Stderr = &output, &output
	squid.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := squid.Start(); err != nil {
		t.Fatalf("starting squid: %v (.ci/install squid)", err)
	}
	t.Cleanup(func() {
		_ = squid.Process.Kill()
		_ = squid.Wait()
		if text, err := os.ReadFile(log); err == nil && t.Failed() {
			t.Logf("squid's output and log:\n%s\n%s", &output, text)
		}
	})
	if !await(func() bool {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", first+len(lists)-1))
		if err == nil {
			conn.Close()
		}
		return err == nil
	}) {
		t.Fatalf("squid does not listen within %s", patience)
	}
	return first
}

// serveNames serves a zone by DNS (RFC 1035).
func serveNames(t *testing.T, addr string, z zone) {
	t.Helper()
	conn, err := net.ListenPacket("udp", addr)
	check(t, err)
	t.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			n, peer, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if reply := z.reply(buf[:n]); reply != nil {
				_, _ = conn.WriteTo(reply, peer)
			}
		}
	}()
}

// The supported record types.
const (
	typeA    = 1
	typePTR  = 12
	typeAAAA = 28
)

func (z zone) reply(question []byte) []byte {
	if len(question) < 17 {
		return nil
	}
	var labels []string
	i := 12
	for i < len(question) && question[i] > 0 {
		end := i + 1 + int(question[i])
		if end >= len(question) {
			return nil
		}
		labels = append(labels, strings.ToLower(string(question[i+1:end])))
		i = end
	}
	if i+5 > len(question) {
		return nil
	}
	kind := binary.BigEndian.Uint16(question[i+1:])
	values, known := z.records(strings.Join(labels, "."), kind)
	reply := append([]byte(nil), question[:i+5]...)
	binary.BigEndian.PutUint16(reply[2:], 0x8580) // an authoritative answer
	if !known {
		reply[3] |= 3 // NXDOMAIN
	}
	binary.BigEndian.PutUint16(reply[4:], 1)
	binary.BigEndian.PutUint16(reply[6:], uint16(len(values)))
	binary.BigEndian.PutUint32(reply[8:], 0)
	for _, v := range values {
		reply = append(reply, 0xc0, 12) // pointer to the question's name
		reply = binary.BigEndian.AppendUint16(reply, kind)
		reply = append(reply, 0, 1, 0, 0, 0, 60)
		reply = binary.BigEndian.AppendUint16(reply, uint16(len(v)))
		reply = append(reply, v...)
	}
	return reply
}

func (z zone) records(name string, kind uint16) (values [][]byte, known bool) {
	if reversed, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		parts := strings.Split(reversed, ".")
		slices.Reverse(parts)
		name = strings.Join(parts, ".")
	}
	for _, v := range z[name] {
		a, err := netip.ParseAddr(v)
		switch {
		case err != nil && kind == typePTR:
			var b []byte
			for label := range strings.SplitSeq(v, ".") {
				b = append(append(b, byte(len(label))), label...)
			}
			values = append(values, append(b, 0))
		case err == nil && (a.Is4() && kind == typeA || a.Is6() && kind == typeAAAA):
			values = append(values, a.AsSlice())
		}
	}
	return values, z[name] != nil
}
