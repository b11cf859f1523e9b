// Package labtest runs the program in a pod of a lab, with clients, damages and
// captures. Each package of the program has its suite on the kernel beside it, as
// external tests (package router_test) whose TestMain calls [Main].
package labtest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/cli"
	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/netns"
	"github.com/egress-router/egress-router/internal/netns/nstest"
)

// Main runs the tests in namespaces of their own, and makes the test binary the
// program under each of its names. A TestMain calls it.
func Main(m *testing.M) { MainOf(m, Program) }

// MainOf is Main with the main function of the program itself.
func MainOf(m *testing.M, program func()) {
	// Tests in labs wait more than they compute. The argument -parallel is parsed
	// later and overrides this.
	if err := flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0))); err != nil {
		fmt.Fprintf(os.Stderr, "labtest: %v\n", err)
		os.Exit(1)
	}
	testscript.Main(nstest.M{Tests: m}, map[string]func(){
		"egress-router":        program,
		"egress-http-proxy":    program,
		"egress-dns-proxy":     program,
		"without-privilege":    func() { become(nobody) },
		"with-read-only-proc":  func() { become(readOnlyProc) },
		"with-read-only-run":   func() { become(readOnlyRun) },
		"without-name-servers": func() { become(noNameServers) },
		"with-termination-log": func() { become(terminationLog) },
		"with-empty-dev":       func() { become(emptyDev) },
		"as-another-user":      func() { become(anotherUser) },
		"without-iptables":     func() { become(noIptables) },
		"without-sys-admin":    func() { become(noSysAdmin) },
		"without-net-raw":      func() { become(noNetRaw) },
		"without-net-admin":    func() { become(noNetAdmin) },
		"as-first-process":     func() { become(ownProc) },
		"as-host-process":      hostProcess,
		"in-pod":               inPod,
		"load-rules":           loadRules,
	})
}

// Program is the main function of cmd/egress-router, which cannot be imported.
func Program() {
	os.Exit(cli.Run(context.Background(), cli.Process{
		Name: os.Args[0], Args: os.Args[1:], Environment: config.Read, Stdout: os.Stdout, Stderr: os.Stderr,
		TerminationLog: cli.TerminationLog,
	}))
}

// become changes this process and executes egress-router in it. Its commands show
// the program in a container with a fault.
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

// noNameServers is a container without --privileged in a pod that looks nothing up:
// dnsPolicy None, with the loopback address as its name server.
func noNameServers() error {
	if err := readOnlyProc(); err != nil {
		return err
	}
	file, err := os.CreateTemp("", "resolv.conf")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(file.Name()) }() // the mount holds the file
	if _, err := file.WriteString("nameserver 127.0.0.1\n"); err != nil {
		return err
	}
	const resolvConf = "/etc/resolv.conf"
	// The tests' own is a deleted file, over which the kernel does not mount another one.
	if err := unix.Unmount(resolvConf, unix.MNT_DETACH); err != nil {
		return err
	}
	return unix.Mount(file.Name(), resolvConf, "", unix.MS_BIND, "")
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

// noSysAdmin gives up only CAP_SYS_ADMIN, which entering a namespace needs.
func noSysAdmin() error {
	return unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_ADMIN, 0, 0, 0)
}

// noNetRaw gives up CAP_NET_RAW, which packet sockets need.
func noNetRaw() error { return unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_RAW, 0, 0, 0) }

// noNetAdmin is a container with the default privileges of docker: without
// CAP_NET_ADMIN, and with a read-only /proc/sys.
func noNetAdmin() error {
	if err := readOnlyProc(); err != nil {
		return err
	}
	return unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_ADMIN, 0, 0, 0)
}

// ownProc shows the first process of a container its own process numbers.
func ownProc() error {
	if os.Getpid() != 1 {
		return errors.New("it is to be started as the first process")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return unix.Mount("proc", "/proc", "proc", 0, "")
}

// hostProcess stands for the first process of a host, in whose network it is
// started: it runs in-pod with the host's process numbers.
func hostProcess() {
	code, err := func() (int, error) {
		if err := ownProc(); err != nil {
			return 0, err
		}
		path, err := exec.LookPath("in-pod")
		if err != nil {
			return 0, err
		}
		cmd := exec.Command(path, os.Args[1:]...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.ExtraFiles = []*os.File{os.NewFile(3, "pod")}
		err = cmd.Run()
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			return exit.ExitCode(), nil
		}
		return 0, err
	}()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		code = 99
	}
	os.Exit(code)
}

// inPod runs the program in the network namespace of descriptor 3.
func inPod() {
	pod, err := netns.Open("/proc/self/fd/3")
	if err == nil {
		err = pod.Do(func() error {
			become(func() error { return nil })
			return nil
		})
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
	os.Exit(99)
}
