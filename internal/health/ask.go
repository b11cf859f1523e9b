package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/egress-router/egress-router/internal/wording"
)

// maxReport is the size limit of a report, in bytes. The report of a DNS proxy with
// all ports has some 10 MB.
const maxReport = 32 << 20

// A NoProgramError is returned if no program runs in the container or network namespace.
type NoProgramError struct{}

// Error returns the message.
func (*NoProgramError) Error() string { return "querying health: no running egress-router found" }

// Hint lists the programs that serve health.
func (*NoProgramError) Hint(wording.Names) string {
	return "the modes legacy and monitor and the HTTP and DNS proxies serve health while they run:\n" +
		"run this command in the same container or network namespace"
}

// Ask returns the reports of all programs of this container, sorted by the names of
// the programs. It connects to the sockets in the file system, or, if there is none,
// to the abstract ones, which are those of the pod. For a program that runs and does
// not answer it returns an *AskError beside the reports of the others, and if no
// program runs a *NoProgramError.
func Ask(ctx context.Context) ([]Report, error) { return here.askAll(ctx) }

func (p place) askAll(ctx context.Context) ([]Report, error) {
	var files []string
	if number, err := p.number(); err == nil {
		if files, err = filepath.Glob(filepath.Join(p.dir, fmt.Sprintf("*-%d.sock", number))); err != nil {
			return nil, fmt.Errorf("listing sockets in %q: %w", p.dir, err)
		}
	}
	reports, err := p.askEach(ctx, files)
	if len(reports) == 0 && err == nil {
		var names []string
		for _, program := range programs {
			names = append(names, p.abstract+program)
		}
		reports, err = p.askEach(ctx, names)
	}
	if len(reports) == 0 && err == nil {
		err = &NoProgramError{}
	}
	return reports, err
}

// askEach reads from all sockets concurrently, so that one that hangs delays no
// other.
func (p place) askEach(ctx context.Context, sockets []string) ([]Report, error) {
	ctx, cancel := context.WithTimeout(ctx, p.ask)
	defer cancel()
	answers := make([]*Report, len(sockets))
	failed := make([]error, len(sockets))
	var all sync.WaitGroup
	for i, socket := range sockets {
		all.Go(func() { answers[i], failed[i] = p.askOne(ctx, socket) })
	}
	all.Wait()
	var reports []Report
	for _, a := range answers {
		if a != nil {
			reports = append(reports, *a)
		}
	}
	slices.SortStableFunc(reports, func(a, b Report) int { return strings.Compare(a.Program, b.Program) })
	return reports, errors.Join(failed...)
}

// askOne reads one report. It returns neither a report nor an error if no program
// listens: a process that was killed leaves its socket behind.
func (p place) askOne(ctx context.Context, socket string) (*Report, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) {
		return nil, nil
	}
	r := new(Report)
	if err == nil {
		defer conn.Close()
		deadline, _ := ctx.Deadline()
		_ = conn.SetDeadline(deadline)
		err = json.NewDecoder(io.LimitReader(conn, maxReport)).Decode(r)
	}
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		err = fmt.Errorf("no answer in %s", p.ask)
	}
	if err != nil {
		return nil, &AskError{socket, err}
	}
	return r, nil
}

// An AskError is returned for a program that runs and does not answer.
type AskError struct {
	Socket string
	Err    error
}

// Error names the socket, whose name contains that of the program.
func (e *AskError) Error() string {
	return fmt.Sprintf("querying health socket %q: %v", e.Socket, e.Err)
}

// Unwrap returns the cause.
func (e *AskError) Unwrap() error { return e.Err }

// Hint returns what to do.
func (e *AskError) Hint(wording.Names) string {
	if errors.Is(e.Err, os.ErrPermission) {
		return "the socket is open to every user: another program changed its mode or that of its directory"
	}
	return "the program hangs or gets no CPU time: see its log"
}
