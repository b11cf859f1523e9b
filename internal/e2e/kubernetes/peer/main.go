// Peer is the program of the pods of the tests, the only file of its image. Its
// arguments:
//
//	wait                 do nothing until SIGTERM
//	ask tcp HOST:PORT    send a request to a server of package who and print the answer; or udp
//	get URL              fetch URL through the proxy of http_proxy and https_proxy, print status and body
//	watch HOST:PORT      send a request every 20 ms on a new connection, print its time and the answer or error
//	hold HOST:PORT       send a request every 20 ms on one connection, print time and answer every second;
//	                     end with an error if the connection breaks or an answer is late
//	keep N HOST:PORT     hold N connections, each with a request every 500 ms; print every second the
//	                     number of answers of the slowest one; end with an error if one breaks
//	renew N LIFE HOST:PORT  hold N connections likewise, each of which is closed after LIFE and replaced; print
//	                     every second how often each was, at least, and the number of attempts that failed
//	receive :PORT        print the datagrams that arrive at the port, with their senders
//	send HOST:PORT TEXT  send a datagram
//	set SYSCTL VALUE     set a sysctl, such as net/ipv4/ip_forward
//	kill POD             kill all processes of the pod with that UID
//	status POD           print user and capabilities of those processes (proc_pid_status(5)), a line each
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/e2e/who"
)

// The time between two requests, and the limit for an answer. The limit is below the
// second after which the kernel retransmits a lost SYN (RFC 6298): a request during an
// interruption fails, and is not answered late.
const (
	pace     = 20 * time.Millisecond
	patience = 900 * time.Millisecond
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "peer: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	switch {
	case slices.Equal(args, []string{"wait"}):
		<-ctx.Done()
		return nil
	case len(args) == 3 && args[0] == "ask":
		return ask(stdout, args[1], args[2])
	case len(args) == 2 && args[0] == "get":
		return get(stdout, args[1])
	case len(args) == 2 && args[0] == "watch":
		return watch(ctx, stdout, args[1])
	case len(args) == 2 && args[0] == "hold":
		return hold(ctx, stdout, args[1])
	case len(args) == 3 && args[0] == "keep":
		return keep(ctx, stdout, args[1], args[2])
	case len(args) == 4 && args[0] == "renew":
		return renew(ctx, stdout, args[1], args[2], args[3])
	case len(args) == 2 && args[0] == "receive":
		return receive(ctx, stdout, args[1])
	case len(args) == 3 && args[0] == "send":
		return send(args[1], args[2])
	case len(args) == 2 && args[0] == "status":
		return status(stdout, args[1])
	case len(args) == 3 && args[0] == "set":
		return os.WriteFile("/proc/sys/"+args[1], []byte(args[2]), 0)
	case len(args) == 2 && args[0] == "kill":
		return kill(stdout, args[1])
	}
	return fmt.Errorf("unknown arguments: %q", args)
}

// ask waits longer than watch: the first packet to a new pod may get lost.
func ask(stdout io.Writer, protocol, address string) error {
	const patience = 3 * time.Second
	a, err := question(protocol, address, patience)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, a)
	return err
}

func question(protocol, address string, patience time.Duration) (who.Answer, error) {
	conn, err := net.DialTimeout(protocol, address, patience)
	if err != nil {
		return who.Answer{}, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return who.Answer{}, err
	}
	return who.Ask(conn, bufio.NewReader(conn))
}

func get(stdout io.Writer, url string) error {
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		// The servers have a test certificate.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%d %s\n", response.StatusCode, strings.TrimSpace(string(body)))
	return err
}

// watch prints a line for each request: the time at which it was sent, in nanoseconds of
// Unix time, and the answer, or a dash and the error. It looks up the host's name once.
func watch(ctx context.Context, stdout io.Writer, address string) error {
	to, err := net.ResolveTCPAddr("tcp4", address)
	if err != nil {
		return err
	}
	lines := make(chan string)
	ticker := time.NewTicker(pace)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case line := <-lines:
			if _, err := fmt.Fprintln(stdout, line); err != nil {
				return err
			}
		case asked := <-ticker.C:
			go func() {
				a, err := question("tcp4", to.String(), patience)
				line := fmt.Sprintf("%d %v", asked.UnixNano(), a)
				if err != nil {
					line = fmt.Sprintf("%d - %v", asked.UnixNano(), err)
				}
				select {
				case lines <- line:
				case <-ctx.Done():
				}
			}()
		}
	}
}

// hold prints the time of the request, in nanoseconds of Unix time, and the answer.
func hold(ctx context.Context, stdout io.Writer, address string) error {
	conn, err := net.Dial("tcp4", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	replies := bufio.NewReader(conn)
	var printed time.Time
	for {
		asked := time.Now()
		if err := conn.SetDeadline(asked.Add(time.Second)); err != nil {
			return err
		}
		a, err := who.Ask(conn, replies)
		if err != nil {
			return err
		}
		if asked.Sub(printed) >= time.Second {
			printed = asked
			if _, err := fmt.Fprintf(stdout, "%d %v\n", asked.UnixNano(), a); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pace):
		}
	}
}

// keepPace is the time between two requests on a connection of keep or renew.
const keepPace = 500 * time.Millisecond

// keep waits for each answer as long as it takes: a busy machine is late, and the kernel
// repeats what is lost.
func keep(ctx context.Context, stdout io.Writer, number, address string) error {
	n, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	answers, broken := make([]atomic.Int64, n), make(chan error, n)
	for i := range n {
		conn, err := net.Dial("tcp4", address)
		if err != nil {
			return err
		}
		go func() {
			for replies := bufio.NewReader(conn); ; time.Sleep(keepPace) {
				if _, err := who.Ask(conn, replies); err != nil {
					broken <- err
					return
				}
				answers[i].Add(1)
			}
		}()
	}
	return progress(ctx, broken, func() error {
		_, err := fmt.Fprintln(stdout, least(answers))
		return err
	})
}

// progress calls show every second until ctx ends or a connection breaks.
func progress(ctx context.Context, broken <-chan error, show func() error) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-broken:
			return err
		case <-time.After(time.Second):
		}
		if err := show(); err != nil {
			return err
		}
	}
}

func least(all []atomic.Int64) int64 {
	n := all[0].Load()
	for i := range all {
		n = min(n, all[i].Load())
	}
	return n
}

// renew tries again if a new connection fails, which an open one must not.
func renew(ctx context.Context, stdout io.Writer, number, life, address string) error {
	n, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	lives, err := time.ParseDuration(life)
	if err != nil {
		return err
	}
	renewed, broken := make([]atomic.Int64, n), make(chan error, n)
	var failed atomic.Int64
	for i := range n {
		go func() {
			// The ends are spread over one life.
			for wait := lives * time.Duration(i+1) / time.Duration(n); ; wait = lives {
				err := live(address, wait, &failed)
				if err != nil {
					broken <- err
					return
				}
				renewed[i].Add(1)
			}
		}()
	}
	return progress(ctx, broken, func() error {
		_, err := fmt.Fprintln(stdout, least(renewed), failed.Load())
		return err
	})
}

// live opens one connection, and closes it after its life.
func live(address string, life time.Duration, failed *atomic.Int64) error {
	conn, err := net.DialTimeout("tcp4", address, patience)
	for ; err != nil; conn, err = net.DialTimeout("tcp4", address, patience) {
		failed.Add(1)
		time.Sleep(pace)
	}
	defer conn.Close()
	replies, begin := bufio.NewReader(conn), time.Now()
	for ; time.Since(begin) < life; time.Sleep(keepPace) {
		if _, err := who.Ask(conn, replies); err != nil {
			return err
		}
	}
	return nil
}

func receive(ctx context.Context, stdout io.Writer, address string) error {
	conn, err := net.ListenPacket("udp4", address)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	buf := make([]byte, 2048)
	for {
		n, from, err := conn.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(stdout, "%s from %s\n", buf[:n], from); err != nil {
			return err
		}
	}
}

func send(address, text string) error {
	conn, err := net.Dial("udp4", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = io.WriteString(conn, text)
	return err
}

// processes returns the processes of a pod. The kubelet puts the pod's UID into the names
// of their control groups, with dashes, or with underscores under systemd.
func processes(uid string) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return nil, err
	}
	var found []int
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil || !strings.Contains(strings.ReplaceAll(string(text), "_", "-"), "pod"+uid) {
			continue // another pod's process, or one that has ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		found = append(found, pid)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("pod %s has no process", uid)
	}
	return found, nil
}

func kill(stdout io.Writer, uid string) error {
	pids, err := processes(uid)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill process %d of pod %s: %w", pid, uid, err)
		}
	}
	_, err = fmt.Fprintln(stdout, len(pids))
	return err
}

func status(stdout io.Writer, uid string) error {
	pids, err := processes(uid)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue // the process has ended
		}
		var line []string
		for field := range strings.Lines(string(text)) {
			switch name, values, _ := strings.Cut(field, ":"); name {
			case "Name", "Uid", "CapPrm", "CapEff", "CapBnd", "NoNewPrivs":
				line = append(line, name+"="+strings.Fields(values)[0])
			}
		}
		if _, err := fmt.Fprintln(stdout, strings.Join(line, " ")); err != nil {
			return err
		}
	}
	return nil
}
