// Package sysctl reads and writes sysctls of the network namespace of the calling thread
// (sysctl(8), proc_sys_net(5)).
package sysctl

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Path returns the file of a sysctl. As with sysctl(8), a name with slashes may have dots
// in its parts, as interface names have.
func Path(name string) string {
	if !strings.Contains(name, "/") {
		name = strings.ReplaceAll(name, ".", "/")
	}
	return "/proc/sys/" + name
}

// longest is the length of a value that Read returns as a whole, more than that of any
// sysctl below net with a few numbers.
const longest = 64

// Read returns the value of a sysctl, without the space around it. It reads the file by
// three system calls, since each comparison reads some thirty: package os also registers
// it with the poller, which the kernel refuses. The error of a sysctl that the kernel
// lacks is an fs.ErrNotExist.
func Read(name string) (string, error) {
	fd, err := unix.Open(Path(name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("read sysctl %s: %w", name, err)
	}
	defer func() { _ = unix.Close(fd) }() // nothing was written
	var b [longest]byte
	n, err := unix.Read(fd, b[:])
	if err != nil {
		return "", fmt.Errorf("read sysctl %s: %w", name, err)
	}
	return strings.TrimSpace(string(b[:n])), nil
}

// ReadInt is Read of a number.
func ReadInt(name string) (int, error) {
	text, err := Read(name)
	if err != nil {
		return 0, err
	}
	value, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("read sysctl %s: %w", name, err)
	}
	return value, nil
}

// Write sets a sysctl. Its error names the file.
func Write(name, value string) error {
	// Without O_CREATE and O_TRUNC, since a missing file is a missing sysctl.
	f, err := os.OpenFile(Path(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(value); err != nil {
		_ = f.Close() // the first error is the cause
		return err
	}
	return f.Close()
}
