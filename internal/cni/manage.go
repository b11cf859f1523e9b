package cni

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/object"
)

// usage is printed for a person.
const usage = `egress-router-cni is a CNI plugin, which a runtime calls as egress-router. For people:

  egress-router-cni install --dir DIR [--replace] [--stay]
      copy the program to DIR/egress-router; --replace also in place of another plugin
      of that name, which uninstall brings back; --stay waits for SIGTERM afterwards
  egress-router-cni uninstall --dir DIR
      remove it, if no pod of the node has a router
  egress-router-cni version
      print the version
`

// number is set at build time; empty: that of the module.
var number string

// manage runs a command of an administrator. It returns the exit code.
func manage(ctx context.Context, p Process) int {
	err := command(ctx, p)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	fmt.Fprintf(p.Stderr, "egress-router-cni: %v\n", err)
	return 1
}

func command(ctx context.Context, p Process) error {
	name := p.Args[0]
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	dir := flags.String("dir", "", "")
	replace, stay := new(bool), new(bool)
	if name == "install" {
		replace, stay = flags.Bool("replace", false, ""), flags.Bool("stay", false, "")
	}
	if err := flags.Parse(p.Args[1:]); errors.Is(err, flag.ErrHelp) || name == "help" || name == "--help" || name == "-h" {
		_, err := io.WriteString(p.Stdout, usage)
		return err
	} else if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%s: unexpected argument %q", name, flags.Arg(0))
	}
	switch name {
	case "version":
		_, err := fmt.Fprintf(p.Stdout, "egress-router-cni %s\n", programVersion())
		return err
	case "install", "uninstall":
		if *dir == "" {
			return fmt.Errorf("%s: --dir is missing: expected the directory of the node's CNI plugins, for example /opt/cni/bin", name)
		}
	default:
		return fmt.Errorf("unknown command %q: expected install, uninstall, version or help", name)
	}
	file := filepath.Join(*dir, object.PluginType)
	if name == "uninstall" {
		return p.uninstall(file)
	}
	if err := p.install(file, *replace); err != nil {
		return err
	}
	if *stay {
		<-ctx.Done()
	}
	return nil
}

func programVersion() string {
	if number != "" {
		return number
	}
	if info, known := debug.ReadBuildInfo(); known && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// signature is in every version of this program, and in no other one.
const signature = "CNI plugin of github.com/egress-router/egress-router"

// replaced is the end of the name of a plugin that install has replaced.
const replaced = ".replaced"

// isOurs reports whether a file is this program, perhaps in another version.
func isOurs(file string) (ours, exists bool, err error) {
	if info, err := os.Stat(file); err == nil && !info.Mode().IsRegular() { // a pipe would have no end
		return false, true, nil
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		_, err := os.Lstat(file) // a link without a target is a file of somebody
		return false, err == nil, nil
	}
	return bytes.Contains(text, []byte(signature)), true, err
}

// install copies the program to a file. A plugin that is called meanwhile is the former or the
// new one.
func (p Process) install(file string, replace bool) error {
	defer lockDirectory(filepath.Dir(file))()
	ours, exists, err := isOurs(file)
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	if exists && !ours {
		if !replace {
			return fmt.Errorf("%s is another plugin: add --replace to replace it, which uninstall reverts", file)
		}
		if err := keep(file); err != nil {
			return err
		}
	}
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the program: %w", err)
	}
	if err := replaceBy(program, file); err != nil {
		return err
	}
	_, err = fmt.Fprintf(p.Stdout, "installed %s, version %s\n", file, programVersion())
	return err
}

// lockDirectory waits until no other command changes a directory, and removes what killed ones
// have left there: a pod that is restarted again and again would fill the disk. A file system
// without locks is no obstacle, and for a missing directory its use has the error.
func lockDirectory(dir string) (unlock func()) {
	d, err := os.Open(dir)
	if err != nil {
		return func() {}
	}
	for errors.Is(unix.Flock(int(d.Fd()), unix.LOCK_EX), unix.EINTR) {
		continue // a file system of a server may be interrupted by a signal
	}
	names, _ := d.Readdirnames(-1)
	for _, name := range names {
		if strings.HasPrefix(name, temporary) {
			_ = os.Remove(filepath.Join(dir, name))
		}
	}
	return func() { _ = d.Close() }
}

// temporary is the beginning of the names of unfinished copies.
const temporary = "." + object.PluginType + "-"

// keep keeps a plugin of somebody else beside its name, under which it stays until the new one
// is there. A killed command may have done so already.
func keep(file string) error {
	kept, err := os.Lstat(file + replaced)
	if err == nil {
		if now, err := os.Lstat(file); err == nil && os.SameFile(kept, now) {
			return nil
		}
		return fmt.Errorf("%s%s exists already: move it away", file, replaced)
	}
	if err := os.Link(file, file+replaced); err != nil {
		return fmt.Errorf("keep the other plugin: %w", err)
	}
	return nil
}

// replaceBy replaces a file by a copy of another one.
func replaceBy(from, file string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("open the program: %w", err)
	}
	defer in.Close()
	out, err := os.CreateTemp(filepath.Dir(file), temporary+"*")
	if err != nil {
		return fmt.Errorf("create a temporary file: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(out.Name())
		}
	}()
	_, err = io.Copy(out, in)
	if err == nil {
		err = out.Chmod(0o755)
	}
	if err == nil {
		err = out.Sync()
	}
	if closed := out.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(out.Name(), file)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}

// uninstall removes the program, and brings back the plugin that install has replaced. Without
// the program a runtime could not delete pods with a router.
func (p Process) uninstall(file string) error {
	defer lockDirectory(filepath.Dir(file))()
	ours, exists, err := isOurs(file)
	switch {
	case err != nil:
		return fmt.Errorf("read %s: %w", file, err)
	case exists && !ours:
		return fmt.Errorf("%s is another plugin: it stays", file)
	}
	routers := 0
	if err := p.eachNamespace(func(_ string, found []attachment) error {
		routers += len(found)
		return nil
	}); err != nil {
		return fmt.Errorf("look for routers: %w", err)
	}
	if routers > 0 {
		return fmt.Errorf("routers left on the node: %d; delete their pods first, or move them to another node", routers)
	}
	done := "nothing to remove"
	switch _, err := os.Lstat(file + replaced); {
	case err == nil:
		err = os.Rename(file+replaced, file)
		if done = "brought back the plugin that " + file + " was before"; err != nil {
			return fmt.Errorf("bring back the plugin that was before: %w", err)
		}
	case exists:
		if err := os.Remove(file); err != nil {
			return fmt.Errorf("remove the program: %w", err)
		}
		done = "removed " + file
	}
	_, err = fmt.Fprintln(p.Stdout, done)
	return err
}
