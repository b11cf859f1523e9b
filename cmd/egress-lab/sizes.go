package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
)

// settled is the time after which a process is regarded as idle.
const settled = 100 * time.Millisecond

// A router in mode legacy reconciles every ten seconds, sixty times in ten minutes. The
// benchmark lets it do so faster, half as many times.
const (
	idleInterval    = 200 * time.Millisecond
	idleComparisons = 30
	tenMinutes      = 60 // reconciles
)

const sizeFormat = "%-42s %-15s %14s %7s %s\n"

// printSizes prints the sizes of the program's file and of its memory. The memory is that
// of a router in mode legacy, which does the work of init and then stays, so that its
// status can be read: VmHWM is the peak of that work. ru_maxrss of an ended init (wait4(2))
// would be at least the size of this program: a process inherits the peak of the process
// that starts it (setmax_mm_hiwater_rss in fs/exec.c).
func printSizes(ctx context.Context, program string, found []variant, loads []load, stdout io.Writer) error {
	info, err := os.Stat(program)
	if err != nil {
		return fmt.Errorf("reading the size of the router: %w", err)
	}
	const mega = 1e6
	size := float64(info.Size()) / mega
	fmt.Fprintln(stdout)
	fmt.Fprintf(stdout, sizeFormat, "what", "variant", "MB", "goal", "ok")
	fmt.Fprintf(stdout, sizeFormat, "program file", "", fmt.Sprintf("%.2f", size), goalBinary, goalBinary.judge(size))
	for _, v := range found {
		for _, l := range loads {
			peak, idle, processor, err := measureIdle(ctx, program, v, l, idleComparisons)
			if err != nil {
				return fmt.Errorf("measuring a router at rest with %s and %s: %w", v.name, l.name, err)
			}
			fmt.Fprintf(stdout, sizeFormat, "resident memory, init, peak, "+l.name, v.name, fmt.Sprintf("%.2f", peak/mega), "", "")
			fmt.Fprintf(stdout, sizeFormat, "resident memory, legacy, idle, "+l.name, v.name, fmt.Sprintf("%.2f", idle/mega), goalIdle, goalIdle.judge(idle/mega))
			ten := processor * tenMinutes / idleComparisons
			fmt.Fprintf(stdout, sizeFormat, "processor time in 10 minutes, "+l.name, v.name, fmt.Sprintf("%.2f s", ten.Seconds()), "", "")
		}
	}
	return nil
}

// measureIdle returns the peak memory of a router until then and its memory after a number
// of comparisons, in bytes, and the processor time of these comparisons, including that of
// the programs that it starts.
func measureIdle(ctx context.Context, program string, v variant, load load, comparisons int) (peak, idle float64, processor time.Duration, err error) {
	l, err := lab.New(lab.Options{})
	if err != nil {
		return 0, 0, 0, err
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := prepare(ctx, environment("legacy", append(append(slices.Clip(load.env), v.env...), "EGRESS_HEALTH_INTERVAL="+idleInterval.String())...), program)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return 0, 0, 0, fmt.Errorf("making a pipe: %w", err)
	}
	if err := l.Start(l.Router, cmd); err != nil {
		return 0, 0, 0, err
	}
	if err := awaitReady(stderr); err != nil {
		cancel()
		_ = cmd.Wait() // err contains its log
		return 0, 0, 0, err
	}
	before, err := processorTime(cmd.Process.Pid)
	if err != nil {
		return 0, 0, 0, err
	}
	time.Sleep(time.Duration(comparisons)*idleInterval + idleInterval/2) // between two of them
	after, err := processorTime(cmd.Process.Pid)
	if err != nil {
		return 0, 0, 0, err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		return 0, 0, 0, fmt.Errorf("reading the router's status: %w", err)
	}
	if peak, err = memory(string(status), "VmHWM"); err != nil {
		return 0, 0, 0, err
	}
	if idle, err = memory(string(status), "VmRSS"); err != nil {
		return 0, 0, 0, err
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return 0, 0, 0, fmt.Errorf("ending the router: %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return 0, 0, 0, fmt.Errorf("ending the router: %w", err)
	}
	return peak, idle, after - before, nil
}

// processorTime returns the processor time of a process and its ended children
// (proc_pid_stat(5), fields 14 to 17, in hundredths of a second).
func processorTime(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("reading the router's processor time: %w", err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ") // the name before may contain any character
	fields := strings.Fields(rest)
	const first, count = 14 - 3, 4
	if len(fields) < first+count {
		return 0, fmt.Errorf("reading the router's processor time: %q", stat)
	}
	var sum time.Duration
	for _, f := range fields[first : first+count] {
		ticks, err := strconv.Atoi(f)
		if err != nil {
			return 0, fmt.Errorf("reading the router's processor time: %w", err)
		}
		sum += time.Duration(ticks) * 10 * time.Millisecond
	}
	return sum, nil
}

// awaitReady reads a router's log until the line "ready".
func awaitReady(log io.Reader) error {
	var read []string
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "msg=ready") {
			return nil
		}
		read = append(read, lines.Text())
	}
	return fmt.Errorf("waiting for the router to be ready: no such log line until its end or the time limit: %s", strings.Join(read, "; "))
}

// memory returns a figure of /proc/PID/status in bytes (proc_pid_status(5)).
func memory(status, name string) (float64, error) {
	_, after, _ := strings.Cut(status, "\n"+name+":")
	line, _, _ := strings.Cut(after, "\n")
	kib, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(line, " kB"))) // KiB
	if err != nil {
		return 0, fmt.Errorf("reading %s from a process's status: %w", name, err)
	}
	return float64(kib) * 1024, nil
}
