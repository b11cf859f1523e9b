// Package nstest runs a test binary in namespaces of its own, so that tests use the real
// kernel without changing the machine and, if the kernel allows user namespaces, without
// root:
//
//	func TestMain(m *testing.M) { nstest.Main(m) }
//
// The binary starts itself a second time in a new network namespace with only a loopback
// link, and a new mount namespace with an empty /run: the lock of iptables is
// /run/xtables.lock, and the tests of other packages would wait for it. For a user other
// than root there is also a user namespace that maps the user to root.
//
// A process with several threads cannot enter a user namespace (unshare(2)), and a Go
// program has several threads before main: only a new process can. No cgo is needed.
//
// A missing precondition fails the tests and is named. No test is skipped: a skipped test
// looks like one that passed.
package nstest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// marker is the environment variable of the second process. A test that starts a first
// process again must remove it from the environment.
const marker = "EGRESS_ROUTER_NSTEST"

// Main runs the tests in namespaces of their own and ends the process with their exit
// code. Arguments, standard streams and signals are passed on unchanged.
func Main(m *testing.M) { os.Exit(M{m}.Run()) }

// M runs tests in namespaces of their own. It is for a TestMain that passes m to another
// function, such as testscript.Main, whose commands must not be started in further
// namespaces.
type M struct {
	Tests interface{ Run() int } // a *testing.M
}

// Run starts the second process and returns its exit code; in the second process it
// prepares the namespaces and runs the tests.
func (m M) Run() int {
	if os.Getenv(marker) == "" {
		return again(os.Stderr)
	}
	if err := prepare(); err != nil {
		fmt.Fprintf(os.Stderr, "nstest: %v\n", err)
		return 1
	}
	return m.Tests.Run()
}

// again runs this binary a second time in new namespaces and returns its exit code, or 1
// with a message on stderr if it cannot be started.
func again(stderr io.Writer) int {
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintf(stderr, "nstest: finding the test binary: %v\n", err)
		return 1
	}
	cmd := exec.Command(self)
	cmd.Args = os.Args
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	spaces := "network and mount namespaces"
	if os.Geteuid() != 0 {
		spaces = "user, network and mount namespaces"
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}

	// The kernel sends Pdeathsig when the thread that started the child ends,
	// not when the process does (prctl(2)).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(stderr, "nstest: creating %s: %v\n%s", spaces, err, hint(err))
		return 1
	}

	// go test sends SIGQUIT to a test that hangs: the child prints the stacks of its
	// goroutines.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM)
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // an error means that it has ended
		}
	}()
	err = cmd.Wait()
	signal.Stop(signals)
	close(signals)

	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode()
	}
	fmt.Fprintf(stderr, "nstest: running the tests: %v\n", err)
	return 1
}

// hint returns a remedy for the kernel's refusal of new namespaces.
func hint(err error) string {
	switch {
	case errors.Is(err, syscall.EPERM) && os.Geteuid() == 0:
		return "nstest: root without CAP_SYS_ADMIN, or a seccomp filter that forbids clone(CLONE_NEWNET): run the tests outside the container or with --privileged\n"
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		return "nstest: users may not create user namespaces here: see the sysctls kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns, or run the tests as root\n"
	case errors.Is(err, syscall.ENOSPC):
		return "nstest: no more namespaces allowed: see the sysctls user.max_user_namespaces, user.max_net_namespaces and user.max_mnt_namespaces\n"
	case errors.Is(err, syscall.EINVAL):
		return "nstest: the kernel lacks CONFIG_USER_NS or CONFIG_NET_NS\n"
	}
	return ""
}

// resolvConf is the file of the resolver's name servers (resolv.conf(5)).
const resolvConf = "/etc/resolv.conf"

// nameServer replaces the machine's resolv.conf: a router under test adds routes for its
// name servers.
func nameServer() error {
	const text = "nameserver 10.96.0.10\n"
	if err := os.WriteFile("/run/resolv.conf", []byte(text), 0o644); err != nil { //nolint:gosec // every user reads it
		return fmt.Errorf("writing a resolv.conf: %w", err)
	}
	defer func() { _ = os.Remove("/run/resolv.conf") }() // the mount holds the file
	err := unix.Mount("/run/resolv.conf", resolvConf, "", unix.MS_BIND, "")
	if err != nil && !errors.Is(err, unix.ENOENT) { // a machine may have none
		return fmt.Errorf("mounting a file on %q: %w", resolvConf, err)
	}
	return nil
}

// prepare sets up the new namespaces for tests.
func prepare() error {
	// If / is shared, as with systemd, the mounts below would propagate to the machine
	// (mount_namespaces(7)).
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mounting tmpfs on %q: %w", "/run", err)
	}
	if err := nameServer(); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding link %q: %w", "lo", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("setting link %q up: %w", "lo", err)
	}
	return nil
}
