package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A readme is a file with the tables of a benchmark. Each stands between two comments, of which
// the first is the command that writes it. The zero value is no file.
type readme struct {
	file, command string
	parts         []string
	from          string // machine, kernel, load and date of the start
	tables        map[string]*bytes.Buffer
}

// openReadme checks that the file has a section for each part, before minutes of measuring.
func openReadme(file, command string, parts []string) (*readme, error) {
	r := &readme{file: file, command: command, parts: parts, tables: map[string]*bytes.Buffer{}}
	if file == "" {
		return r, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("opening the README: %w", err)
	}
	for _, p := range parts {
		if _, _, err := r.section(string(text), p); err != nil {
			return nil, err
		}
	}
	if r.from, err = circumstances(); err != nil {
		return nil, err
	}
	return r, nil
}

// tee returns a writer of the output of a part, which is also written to stdout.
func (r *readme) tee(part string, stdout io.Writer) io.Writer {
	r.tables[part] = new(bytes.Buffer)
	return io.MultiWriter(stdout, r.tables[part])
}

// write replaces the sections of all parts.
func (r *readme) write() error {
	if r.file == "" {
		return nil
	}
	text, err := os.ReadFile(r.file)
	if err != nil {
		return fmt.Errorf("writing the README: %w", err)
	}
	for _, p := range r.parts {
		begin, end, err := r.section(string(text), p)
		if err != nil {
			return err
		}
		section := fmt.Sprintf("\n%s:\n\n```\n%s\n```\n\n", r.from, strings.TrimSpace(r.tables[p].String()))
		text = []byte(string(text[:begin]) + section + string(text[end:]))
	}
	if err := os.WriteFile(r.file, text, 0o644); err != nil { //nolint:gosec // everyone may read it
		return fmt.Errorf("writing the README: %w", err)
	}
	return nil
}

// section returns the begin and the end of what stands between the comments of a part.
func (r *readme) section(text, part string) (begin, end int, err error) {
	open, closing := fmt.Sprintf("<!-- make %s PART=%s README=1 -->\n", r.command, part), "<!-- end -->\n"
	begin = strings.Index(text, open)
	if begin >= 0 {
		begin += len(open)
		end = strings.Index(text[begin:], closing)
	}
	if begin < 0 || end < 0 {
		return 0, 0, fmt.Errorf("looking for the table of %s in %q: expected the lines %q and, behind it, %q", part, r.file, strings.TrimSpace(open), strings.TrimSpace(closing))
	}
	return begin, begin + end, nil
}

// circumstances describes the machine, its kernel and its load now. The load average is that of
// the last minute (proc_loadavg(5)).
func circumstances() (string, error) {
	var kernel unix.Utsname
	if err := unix.Uname(&kernel); err != nil {
		return "", fmt.Errorf("reading the kernel's version: %w", err)
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	average, _, ok := strings.Cut(string(load), " ")
	if !ok {
		return "", errors.New("reading /proc/loadavg: expected several figures, found one")
	}
	processor := "processors"
	for line := range strings.Lines(string(info)) {
		if name, value, is := strings.Cut(line, ":"); is && strings.TrimSpace(name) == "model name" {
			processor = "processors of type " + strings.TrimSpace(value)
			break
		}
	}
	return fmt.Sprintf("%s, %d %s, Linux %s, load average %s before the run", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), processor,
		unix.ByteSliceToString(kernel.Release[:]), average), nil
}
