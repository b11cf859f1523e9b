package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

// A contender is a proxy that is measured.
type contender struct {
	name    string
	at      netip.AddrPort // address for clients
	process *os.Process
	log     string // file
	user    bool   // ours as an ordinary user, which is compared with ours as root
}

// The ports of the proxies in the pod.
const (
	portOurs    = 8080
	portUser    = 8081
	portTheirs  = 3128
	portSpliced = 3129
)

// startHTTP starts the HTTP proxy and squid.
func startHTTP(ctx context.Context, l *lab.Lab, program, directory string) ([]contender, error) {
	ours, err := startContender(ctx, l, "ours", directory, []string{"EGRESS_HTTP_PROXY_DESTINATION=*"}, program, "http-proxy")
	if err != nil {
		return nil, err
	}
	// Debian's squid would also cache answers and log each request, which ours does only if
	// configured.
	const config = `http_port %d
http_access allow all
cache deny all
access_log none
cache_log stdio:%s
pid_filename none
netdb_filename none
pinger_enable off
shutdown_lifetime 0
coredump_dir %s
max_filedescriptors %d
`
	path, err := findPeer("squid", "squid")
	if err != nil {
		return nil, err
	}
	log := filepath.Join(directory, "cache.log")
	file := filepath.Join(directory, "squid.conf")
	if err := os.WriteFile(file, fmt.Appendf(nil, config, portTheirs, log, directory, mostIdle()*2+spareFiles), 0o644); err != nil { //nolint:gosec // squid runs as another user
		return nil, fmt.Errorf("writing the configuration of squid: %w", err)
	}
	if err := os.Chmod(directory, 0o777); err != nil { //nolint:gosec // squid runs as another user
		return nil, fmt.Errorf("making the directory of squid: %w", err)
	}
	theirs, err := startContender(ctx, l, "squid", directory, nil, path, "-N", "-f", file)
	if err != nil {
		return nil, err
	}
	user, err := startUser(ctx, l, program, directory)
	ours.at, theirs.at = netip.AddrPortFrom(lab.RouterAddr, portOurs), netip.AddrPortFrom(lab.RouterAddr, portTheirs)
	return []contender{ours, theirs, user}, err
}

// startUser starts the HTTP proxy as an ordinary user, whose pipes the kernel limits
// (pipe-user-pages-soft in proc(5)).
func startUser(ctx context.Context, l *lab.Lab, program, directory string) (contender, error) {
	// The user may not reach the program's own directory.
	content, err := os.ReadFile(program)
	if err != nil {
		return contender{}, fmt.Errorf("reading the program: %w", err)
	}
	program = filepath.Join(directory, "egress-router")
	if err := os.WriteFile(program, content, 0o755); err != nil { //nolint:gosec // another user runs it
		return contender{}, fmt.Errorf("copying the program: %w", err)
	}
	const nobody = "65534"
	env := []string{"EGRESS_HTTP_PROXY_DESTINATION=*", fmt.Sprint("EGRESS_HTTP_PROXY_LISTEN=:", portUser)}
	p, err := startContender(ctx, l, "ours as a user", directory, env, "setpriv", "--reuid", nobody, "--regid", nobody, "--clear-groups", program, "http-proxy")
	p.at, p.user = netip.AddrPortFrom(lab.RouterAddr, portUser), true
	return p, err
}

// startDNS starts the DNS proxy, and haproxy with a port for each way of copying.
func startDNS(ctx context.Context, l *lab.Lab, program, directory string) ([]contender, error) {
	line := fmt.Sprintf("EGRESS_DNS_PROXY_DESTINATION=%d %s %d", portOurs, originAt.Addr(), originAt.Port())
	ours, err := startContender(ctx, l, "ours", directory, []string{line}, program, "dns-proxy")
	if err != nil {
		return nil, err
	}
	const config = `global
	nbthread %d
	maxconn %d
	maxpipes 100
defaults
	mode tcp
	timeout connect 10s
	timeout client 60s
	timeout server 60s
listen plain
	bind :%d
	server origin %s
listen spliced
	bind :%d
	option splice-auto
	server origin %[4]s
`
	path, err := findPeer("haproxy", "haproxy")
	if err != nil {
		return nil, err
	}
	file := filepath.Join(directory, "haproxy.cfg")
	if err := os.WriteFile(file, fmt.Appendf(nil, config, runtime.NumCPU(), mostIdle()+spareFiles/4, portTheirs, originAt, portSpliced), 0o600); err != nil {
		return nil, fmt.Errorf("writing the configuration of haproxy: %w", err)
	}
	theirs, err := startContender(ctx, l, "haproxy", directory, nil, path, "-db", "-f", file)
	ours.at, theirs.at = netip.AddrPortFrom(lab.RouterAddr, portOurs), netip.AddrPortFrom(lab.RouterAddr, portTheirs)
	spliced := theirs
	spliced.name, spliced.at = "haproxy spliced", netip.AddrPortFrom(lab.RouterAddr, portSpliced)
	return []contender{ours, theirs, spliced}, err
}

// findPeer finds the program of another proxy. The PATH of some users has no /usr/sbin.
func findPeer(name, pkg string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	path = filepath.Join("/usr/sbin", name)
	if _, err := os.Stat(path); err != nil {
		return "", &hintedError{fmt.Errorf("finding %s: %w", name, err), "install the package " + pkg}
	}
	return path, nil
}

// startContender starts a proxy in the pod. It ends with the lab.
func startContender(ctx context.Context, l *lab.Lab, name, directory string, env []string, program ...string) (contender, error) {
	p := contender{name: name, log: filepath.Join(directory, name+".log")}
	log, err := os.Create(p.log)
	if err != nil {
		return p, fmt.Errorf("making a log: %w", err)
	}
	defer log.Close()
	cmd := prepare(ctx, env, program...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := l.Start(l.Router, cmd); err != nil {
		return p, err
	}
	p.process = cmd.Process
	go func() { _ = cmd.Wait() }() // it ends with the lab, by a signal
	return p, nil
}

// logTail returns the end of a proxy's log, for errors.
func (p contender) logTail() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-1000):])
}

// await waits until a proxy answers.
func (p contender) await(ctx context.Context, l *lab.Lab) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		conn, err := l.Dial(ctx, l.Client, "tcp", p.at)
		if err == nil {
			return conn.Close()
		}
		if ctx.Err() != nil {
			return fmt.Errorf("waiting for %s: %w: %s", p.name, err, p.logTail())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// resident returns the memory of a proxy, in MB. Each proxy is one process.
func (p contender) resident() (float64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.process.Pid))
	if err != nil {
		return 0, fmt.Errorf("reading the status of %s: %w", p.name, err)
	}
	size, err := memory(string(status), "VmRSS")
	return size / 1e6, err
}

// processor returns the processor time of a proxy's process.
func (p contender) processor() (time.Duration, error) {
	// The clock of a process, in nanoseconds (clock_getcpuclockid(3),
	// CPUCLOCK_SCHED in include/linux/posix-timers.h). The figures in
	// /proc/PID/stat have ticks of 10 ms: a short load would take none.
	const sched = 2
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^p.process.Pid<<3|sched), &t); err != nil {
		return 0, fmt.Errorf("reading the processor time of %s: %w", p.name, err)
	}
	return time.Duration(t.Nano()), nil
}
