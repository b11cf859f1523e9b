package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// TestMain makes the test binary the program itself, under the names that it
// goes by, and runs the tests in namespaces of their own.
func TestMain(m *testing.M) {
	testscript.Main(nstest.M{Tests: m}, map[string]func(){
		"egress-router":        main,
		"egress-http-proxy":    main,
		"egress-dns-proxy":     main,
		"without-privilege":    func() { become(nobody) },
		"with-read-only-proc":  func() { become(readOnlyProc) },
		"with-read-only-run":   func() { become(readOnlyRun) },
		"with-termination-log": func() { become(terminationLog) },
		"with-empty-dev":       func() { become(emptyDev) },
		"as-another-user":      func() { become(anotherUser) },
		"without-iptables":     func() { become(noIptables) },
		"without-sys-admin":    func() { become(noSysAdmin) },
		"as-first-process":     func() { become(ownProc) },
		"as-host-process":      hostProcess,
		"in-pod":               inPod,
	})
}

// become changes this process, then turns it into egress-router: the commands
// that are made with it show the program in a container that is not as it
// should be.
func become(change func() error) {
	// Namespaces and capabilities belong to threads.
	runtime.LockOSThread()
	err := change()
	if err == nil {
		var path string
		if path, err = exec.LookPath("egress-router"); err == nil {
			err = unix.Exec(path, append([]string{"egress-router"}, os.Args[1:]...), os.Environ())
		}
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
	os.Exit(99)
}

// nobody gives up every privilege, as a container without securityContext does.
func nobody() error {
	if err := unix.Setgroups(nil); err != nil && os.Getuid() == 0 {
		return err
	}
	for c := range uintptr(unix.CAP_LAST_CAP + 1) {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && err != unix.EINVAL {
			return err
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}

// readOnlyProc mounts /proc/sys as container engines do without --privileged.
func readOnlyProc() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
}

// readOnlyRun makes /run read-only, as the root file system of a container can be.
func readOnlyRun() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	return unix.Mount("", "/run", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "")
}

// emptyDev mounts the directory dev of this one at /dev.
func emptyDev() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	return unix.Mount("dev", "/dev", "", unix.MS_BIND, "")
}

// terminationLog mounts the file message of this directory at
// /dev/termination-log, as the kubelet has a container engine do.
func terminationLog() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/dev", "tmpfs", 0, ""); err != nil {
		return err
	}
	if err := os.WriteFile("/dev/termination-log", nil, 0o600); err != nil {
		return err
	}
	return unix.Mount("message", "/dev/termination-log", "", unix.MS_BIND, "")
}

// anotherUser becomes the user of the images that is not root. Where the tests'
// user namespace has no other user, as for those who are not root themselves, it
// gives up the rights of root over files instead.
func anotherUser() error {
	const nonroot = 65532
	err := unix.Setgroups(nil)
	if err == nil {
		err = unix.Setresgid(nonroot, nonroot, nonroot)
	}
	if err == nil {
		err = unix.Setresuid(nonroot, nonroot, nonroot)
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
		return nobody()
	}
	if err != nil {
		return err
	}
	// It cannot reach the program by its path, which is this very file.
	return unix.Exec("/proc/self/exe", append([]string{"egress-router"}, os.Args[1:]...), os.Environ())
}

// noIptables hides the directories in which iptables is.
func noIptables() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	for _, d := range []string{"/usr/sbin", "/usr/local/sbin"} {
		if err := unix.Mount("tmpfs", d, "tmpfs", 0, ""); err != nil {
			return err
		}
	}
	return os.Setenv("PATH", pathWithout("iptables"))
}

// pathWithout returns PATH without the directories that hold program.
func pathWithout(program string) string {
	var keep []string
	for d := range strings.SplitSeq(os.Getenv("PATH"), ":") {
		if _, err := os.Stat(d + "/" + program); err != nil {
			keep = append(keep, d)
		}
	}
	return strings.Join(keep, ":")
}
