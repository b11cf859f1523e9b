package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary runs as three processes, which this variable distinguishes. The
// first, from go test, prepares images and starts the second. The second is process 1
// of the new namespaces and starts the third. The third runs the tests.
const stage = "EGRESS_ROUTER_E2E"

// Files of the first process for the others, in its temporary directory.
const (
	directory     = "EGRESS_ROUTER_E2E_DIR"
	nativeImages  = "native.tar"  // images of the machine's platform, to run
	foreignImages = "foreign.tar" // images of the other platform, to inspect
)

func TestMain(m *testing.M) {
	code, err := 1, error(nil)
	switch os.Getenv(stage) {
	case "":
		code, err = prepare()
	case "init":
		code, err = initProcess()
	case "tests":
		if theNode, err = newNode(); err == nil {
			code = m.Run()
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
	}
	os.Exit(code)
}

// programs are the programs that the tests run, and their packages.
var programs = []struct{ program, pkg string }{
	{"podman", "podman"}, {"runc", "runc"}, {"catatonit", "catatonit"},
	{"/usr/lib/podman/netavark", "netavark"}, {"ip", "iproute2"}, {"nsenter", "util-linux"},
	{"iptables", "iptables"}, {"nft", "nftables:nft"}, {"curl", "curl"}, {"ping", "iputils-ping"}, {"arping", "iputils-arping"},
	{"tcpdump", "tcpdump"}, {"unshare", "util-linux"}, {"/usr/sbin/dockerd", "docker.io"},
}

// prepare installs programs and builds images on the machine itself. It then starts
// the second process and returns its exit code.
func prepare() (int, error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("not root: podman creates macvlans in the tests")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		return 1, err
	}
	run := func(env []string, name string, args ...string) error {
		cmd := exec.Command(name, args...)
		cmd.Dir, cmd.Env = root, append(os.Environ(), env...)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("running %q: %w", strings.Join(cmd.Args, " "), err)
		}
		return nil
	}
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		return 1, err
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p.program); err == nil {
			continue
		}
		if err := run(nil, ".ci/install", p.pkg); err != nil {
			return 1, err
		}
		if _, err := exec.LookPath(p.program); err != nil {
			return 1, fmt.Errorf("find %q after the installation of package %q: %w", p.program, p.pkg, err)
		}
	}

	dir, err := os.MkdirTemp("", "egress-router-e2e")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	foreign := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
	for _, build := range []struct{ file, arch, tag string }{
		{nativeImages, runtime.GOARCH, "latest"},
		{foreignImages, foreign, foreign},
	} {
		if err := run([]string{"PLATFORM=linux/" + build.arch}, ".ci/image"); err != nil {
			return 1, err
		}
		args := []string{"save", "--quiet", "--multi-image-archive", "--output", filepath.Join(dir, build.file)}
		for _, image := range images {
			args = append(args, "localhost/"+image+":"+build.tag)
		}
		if err := run(nil, "podman", args...); err != nil {
			return 1, err
		}
	}

	self, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cmd := exec.Command(self)
	cmd.Args = os.Args
	cmd.Env = append(os.Environ(), stage+"=init", directory+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
	}
	// The kernel sends Pdeathsig when the thread that started the child ends
	// (prctl(2)).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 1, fmt.Errorf("creating network, mount, PID and IPC namespaces: %w", err)
	}
	defer removeCgroups(cgroups())
	defer forward(func(s syscall.Signal) { _ = cmd.Process.Signal(s) })()
	err = cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return exit.ExitCode(), nil
	} else if err != nil {
		return 1, fmt.Errorf("running the tests: %w", err)
	}
	return 0, nil
}

// cgroups returns the control groups of podman and docker, the outer ones first.
// Control groups of version 1 have no namespace of their own.
func cgroups() []string {
	var found []string
	for _, pattern := range []string{
		"/sys/fs/cgroup/libpod_parent", "/sys/fs/cgroup/*/libpod_parent", "/sys/fs/cgroup/docker", "/sys/fs/cgroup/*/docker",
	} {
		parents, _ := filepath.Glob(pattern) // the patterns are well-formed
		for _, parent := range parents {
			_ = filepath.WalkDir(parent, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					found = append(found, path)
				}
				return nil // removed meanwhile
			})
		}
	}
	return found
}

// removeCgroups removes new control groups, which remain if containers were killed
// instead of removed. A control group in use, by another user's containers, stays.
func removeCgroups(before []string) {
	for _, path := range slices.Backward(cgroups()) {
		if !slices.Contains(before, path) {
			_ = unix.Rmdir(path)
		}
	}
}

// forward passes signals that end a test run to send, until stop is called.
func forward(send func(syscall.Signal)) (stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM)
	go func() {
		for s := range signals {
			send(s.(syscall.Signal))
		}
	}()
	return func() { signal.Stop(signals); close(signals) }
}

// initProcess is process 1 of the new PID namespace. It mounts file systems, runs the
// tests, and waits for orphans such as podman's conmon. At its end the kernel kills all
// processes of the namespace.
func initProcess() (int, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 1, fmt.Errorf("making mounts private: %w", err)
	}
	for _, m := range []struct{ kind, on string }{
		{"proc", "/proc"},
		{"tmpfs", "/run"},                // podman's state, network namespaces, locks
		{"tmpfs", "/dev/shm"},            // podman's locks
		{"tmpfs", "/var/lib/containers"}, // images and containers
		{"tmpfs", "/var/tmp"},            // podman's unpacked layers
	} {
		if err := os.MkdirAll(m.on, 0o755); err != nil { // podman has never run
			return 1, err
		}
		if err := unix.Mount(m.kind, m.on, m.kind, 0, ""); err != nil {
			return 1, fmt.Errorf("mounting %s on %q: %w", m.kind, m.on, err)
		}
	}
	// Temporary directories vanish with the namespaces, however the tests end.
	if err := os.Mkdir("/run/tmp", 0o700); err != nil {
		return 1, err
	}
	if err := os.Setenv("TMPDIR", "/run/tmp"); err != nil {
		return 1, err
	}
	if err := nameServer(); err != nil {
		return 1, fmt.Errorf("naming a name server: %w", err)
	}
	if err := os.Setenv(stage, "tests"); err != nil {
		return 1, err
	}
	child, err := syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2},
	})
	if err != nil {
		return 1, fmt.Errorf("starting the tests: %w", err)
	}
	defer forward(func(s syscall.Signal) { _ = syscall.Kill(child, s) })()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 1, fmt.Errorf("waiting for the tests: %w", err)
		case pid == child && status.Exited():
			return status.ExitStatus(), nil
		case pid == child:
			return 1, fmt.Errorf("running the tests: %v", status.Signal())
		}
	}
}

// nameServer mounts a resolv.conf, which podman copies to containers. On many machines
// the file is a link into /run, which is empty now.
func nameServer() error {
	const file, own = "/etc/resolv.conf", "/run/e2e/resolv.conf"
	if err := os.Mkdir(filepath.Dir(own), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(own, []byte("nameserver "+nameServerAddr+"\n"), 0o644); err != nil {
		return err
	}
	if target, err := os.Readlink(file); err == nil {
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(file), target)
		}
		if strings.HasPrefix(target, "/run/") {
			if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
				return err
			}
			return os.Symlink(own, target)
		}
	}
	return unix.Mount(own, file, "", unix.MS_BIND, "")
}
