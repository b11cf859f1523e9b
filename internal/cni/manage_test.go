package cni_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/cni"
	"github.com/egress-router/egress-router/internal/lab"
)

// manage runs a command for an administrator.
func manage(t *testing.T, namespaces string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	ctx := t.Context()
	code = cni.Run(ctx, cni.Process{
		Args: args, Getenv: func(string) string { return "" }, Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Namespaces: namespaces,
	})
	return code, out.String(), errs.String()
}

// wantManaged runs a command and checks what it prints.
func wantManaged(t *testing.T, code int, text string, args ...string) {
	t.Helper()
	got, stdout, stderr := manage(t, t.TempDir(), args...)
	if got != code || !strings.Contains(stdout+stderr, text) || (code == 0) != (stderr == "") {
		t.Errorf("%v: exit code %d, stdout %q, stderr %q; want %d, %q", args, got, stdout, stderr, code, text)
	}
}

// The plugin is installed beside others, replaces its former version, and is removed.
func TestInstall(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "egress-router")
	for range 2 { // the second time in place of itself
		wantManaged(t, 0, "installed "+file, "install", "--dir", dir)
		info, err := os.Stat(file)
		if err != nil || info.Mode() != 0o755 {
			t.Errorf("mode %v, error %v", info.Mode(), err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the file differs (%v)", err)
	}
	if list, _ := os.ReadDir(dir); len(list) != 1 {
		t.Errorf("%d files, want one", len(list))
	}
	wantManaged(t, 0, "removed "+file, "uninstall", "--dir", dir)
	wantManaged(t, 0, "nothing to remove", "uninstall", "--dir", dir)
}

// Another plugin of the name stays, unless it is to be replaced, and comes back.
func TestReplaceOtherPlugin(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "egress-router")
	const other = "#!/bin/sh\n"
	if err := os.WriteFile(file, []byte(other), 0o755); err != nil { //nolint:gosec // it is a program
		t.Fatal(err)
	}
	wantOther := func() {
		t.Helper()
		if got, err := os.ReadFile(file); err != nil || string(got) != other {
			t.Errorf("the other plugin has changed (%v)", err)
		}
	}
	wantManaged(t, 1, file+" is another plugin: add --replace to replace it, which uninstall reverts", "install", "--dir", dir)
	wantManaged(t, 1, file+" is another plugin: it stays", "uninstall", "--dir", dir)
	wantOther()
	wantManaged(t, 0, "installed "+file, "install", "--dir", dir, "--replace")
	wantManaged(t, 0, "installed "+file, "install", "--dir", dir, "--replace") // an update
	wantManaged(t, 0, "brought back the plugin that "+file+" was before", "uninstall", "--dir", dir)
	wantOther()
	if list, _ := os.ReadDir(dir); len(list) != 1 {
		t.Errorf("%d files, want one", len(list))
	}
}

// With --stay the program waits for the end of its context, as in the DaemonSet.
func TestInstallStays(t *testing.T) {
	t.Parallel()
	ctx, stop := context.WithCancel(t.Context())
	dir, ended := t.TempDir(), make(chan int)
	out, in := io.Pipe()
	go func() {
		ended <- cni.Run(ctx, cni.Process{Args: []string{"install", "--dir", dir, "--stay"}, Getenv: func(string) string { return "" }, Stdout: in, Stderr: io.Discard})
	}()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.HasPrefix(line, "installed ") {
		t.Errorf("stdout %q, error %v", line, err)
	}
	select {
	case code := <-ended:
		t.Errorf("exit code %d before the end", code)
	default:
	}
	stop()
	if code := <-ended; code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// A command that is not there, or lacks an argument, changes nothing.
func TestManageFaults(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, test := range []struct {
		text string
		args []string
	}{
		{`unknown command "remove": expected install, uninstall, version or help`, []string{"remove"}},
		{"install: --dir is missing: expected the directory of the node's CNI plugins, for example /opt/cni/bin", []string{"install"}},
		{"uninstall: --dir is missing", []string{"uninstall"}},
		{`install: unexpected argument "now"`, []string{"install", "--dir", dir, "now"}},
		{"uninstall: flag provided but not defined: -replace", []string{"uninstall", "--dir", dir, "--replace"}},
		{"create a temporary file: ", []string{"install", "--dir", filepath.Join(dir, "none")}},
	} {
		wantManaged(t, 1, "egress-router-cni: "+test.text, test.args...)
	}
	wantManaged(t, 0, "egress-router-cni ", "version")
	wantManaged(t, 0, "egress-router-cni install --dir DIR", "help")
	wantManaged(t, 0, "egress-router-cni install --dir DIR", "install", "-h")
	if list, _ := os.ReadDir(dir); len(list) != 0 {
		t.Errorf("%d files, want none", len(list))
	}
}

// While a pod has a router, the plugin that deletes it stays.
func TestUninstallWithRouter(t *testing.T) {
	t.Parallel()
	p := newPod(t, lab.Options{})
	dir := t.TempDir()
	wantManaged(t, 0, "installed ", "install", "--dir", dir)
	p.add()
	namespaces := p.namespaces()
	if code, _, stderr := manage(t, namespaces, "uninstall", "--dir", dir); code != 1 || !strings.Contains(stderr, "routers left on the node: 1; delete their pods first, or move them to another node") {
		t.Errorf("exit code %d, stderr %q", code, stderr)
	}
	p.del()
	if code, stdout, stderr := manage(t, namespaces, "uninstall", "--dir", dir); code != 0 || !strings.Contains(stdout, "removed ") {
		t.Errorf("exit code %d, stderr %q", code, stderr)
	}
}

// A killed installation leaves parts, which the next one removes or goes on from.
func TestInstallAfterKilledOne(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "egress-router")
	err := os.WriteFile(file, []byte("#!/bin/sh\n"), 0o755) //nolint:gosec // it is a program
	if err == nil {
		err = os.Link(file, file+".replaced")
	}
	for _, name := range []string{".egress-router-1", ".egress-router-2"} {
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), nil, 0o600)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	wantManaged(t, 0, "installed "+file, "install", "--dir", dir, "--replace")
	if list, _ := os.ReadDir(dir); len(list) != 2 {
		t.Errorf("%d files, want two", len(list))
	}
	wantManaged(t, 0, "brought back", "uninstall", "--dir", dir)
	if list, _ := os.ReadDir(dir); len(list) != 1 {
		t.Errorf("%d files, want one", len(list))
	}
}

// startPlugin starts a call of an installed plugin, which waits for its configuration.
func startPlugin(t *testing.T, file string) (*exec.Cmd, io.Closer) {
	t.Helper()
	for {
		cmd := exec.Command(file)
		cmd.Env = []string{"CNI_COMMAND=VERSION"}
		stdin, err := cmd.StdinPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err == nil {
			return cmd, stdin
		}
		// A process that another test starts has the file open for writing until execve(2).
		if !errors.Is(err, unix.ETXTBSY) {
			t.Fatal(err)
		}
	}
}

// Odd files in place of the plugin are those of somebody else, and several installations at a
// time, also while the plugin runs, leave a whole one.
func TestInstallInOddDirectories(t *testing.T) {
	t.Parallel()
	for name, make := range map[string]func(file string) error{
		"directory":     func(file string) error { return os.Mkdir(file, 0o755) },
		"pipe":          func(file string) error { return unix.Mkfifo(file, 0o600) },
		"dangling link": func(file string) error { return os.Symlink("/gone", file) },
	} {
		dir := t.TempDir()
		if err := make(filepath.Join(dir, "egress-router")); err != nil {
			t.Fatal(err)
		}
		wantManaged(t, 1, "is another plugin: add --replace", "install", "--dir", dir)
		wantManaged(t, 1, "is another plugin: it stays", "uninstall", "--dir", dir)
		if list, _ := os.ReadDir(dir); len(list) != 1 {
			t.Errorf("%s: %d files, want one", name, len(list))
		}
	}
	dir, link := t.TempDir(), filepath.Join(t.TempDir(), "bin")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	wantManaged(t, 0, "installed ", "install", "--dir", link)
	file := filepath.Join(dir, "egress-router")
	cmd, stdin := startPlugin(t, file)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() { wantManaged(t, 0, "installed ", "install", "--dir", dir) })
	}
	all.Wait()
	_ = stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if list, _ := os.ReadDir(dir); len(list) != 1 {
		t.Errorf("%d files, want one", len(list))
	}
	wantManaged(t, 0, "removed ", "uninstall", "--dir", link)
}
