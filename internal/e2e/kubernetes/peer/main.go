// Peer is the program of the tests' own pods, in an image that holds nothing
// else. Its arguments:
//
//	wait                 do nothing until SIGTERM
//	ask tcp HOST:PORT    ask a server of package who and print its answer; or udp
//	get URL              fetch it, by the proxy that http_proxy and https_proxy name, and print status and body
//	watch HOST:PORT      ask every 20 ms by a new connection, and print when and what came of it
//	hold HOST:PORT       ask every 20 ms by one and the same connection; end with an error when that breaks
//	set SYSCTL VALUE     set one, such as net/ipv4/ip_forward
//	kill POD             end all processes of a pod, which is given by its UID
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
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/e2e/who"
)

// The time between two questions, and how long an answer may take. The latter is
// below the second after which the kernel sends a lost SYN again (RFC 6298): what
// is asked while nothing gets through fails, and is not answered late.
const (
	pace     = 20 * time.Millisecond
	patience = 500 * time.Millisecond
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "peer: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case slices.Equal(args, []string{"wait"}):
		<-ctx.Done()
		return nil
	case len(args) == 3 && args[0] == "ask":
		return ask(args[1], args[2])
	case len(args) == 2 && args[0] == "get":
		return get(args[1])
	case len(args) == 2 && args[0] == "watch":
		return watch(ctx, args[1])
	case len(args) == 2 && args[0] == "hold":
		return hold(ctx, args[1])
	case len(args) == 3 && args[0] == "set":
		return os.WriteFile("/proc/sys/"+args[1], []byte(args[2]), 0)
	case len(args) == 2 && args[0] == "kill":
		return kill(args[1])
	}
	return fmt.Errorf("arguments not understood: %q", args)
}

// ask waits longer than watch: the first packet to a pod that is new may get lost.
func ask(protocol, address string) error {
	const patience = 3 * time.Second
	a, err := question(protocol, address, patience)
	if err == nil {
		fmt.Println(a)
	}
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

func get(url string) error {
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		// The servers have a certificate for tests.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil {
		fmt.Printf("%d %s\n", response.StatusCode, strings.TrimSpace(string(body)))
	}
	return err
}

// watch prints a line for each question: the time at which it was asked, in
// nanoseconds of Unix time, and the answer, or a dash and the error. The host's
// name is looked up once.
func watch(ctx context.Context, address string) error {
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
			fmt.Println(line)
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

// hold prints the first answer, and then only what differs from it.
func hold(ctx context.Context, address string) error {
	conn, err := net.Dial("tcp4", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	replies := bufio.NewReader(conn)
	var before who.Answer
	for {
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		a, err := who.Ask(conn, replies)
		if err != nil {
			return err
		}
		if a != before {
			fmt.Println(a)
			before = a
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pace):
		}
	}
}

// kill takes every process whose control groups have the pod's UID in their names,
// as the kubelet gives them: with dashes, or with underscores under systemd.
func kill(uid string) error {
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return err
	}
	killed := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil || !strings.Contains(strings.ReplaceAll(string(text), "_", "-"), "pod"+uid) {
			continue // of another pod, or it has just ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return err
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("killing process %d of pod %s: %w", pid, uid, err)
		}
		killed++
	}
	if killed == 0 {
		return fmt.Errorf("killing pod %s: it has no process", uid)
	}
	fmt.Println(killed)
	return nil
}
