package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// A file is one of an image.
type file struct {
	*tar.Header
	content []byte
}

// files returns everything in an image, by its path without a slash in front.
func files(t *testing.T, name string) map[string]file {
	t.Helper()
	id := strings.TrimSpace(run(t, "podman", "create", name))
	defer func() {
		if err := command("podman", "rm", id).run(); err != nil {
			t.Error(err)
		}
	}()
	found := map[string]file{}
	r := tar.NewReader(strings.NewReader(run(t, "podman", "export", id)))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return found
		} else if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		found[strings.TrimSuffix(h.Name, "/")] = file{h, content}
	}
}

// resolve follows the symbolic links of a path inside an image, in any of its
// parts. It returns "" for a path that leads nowhere.
func resolve(in map[string]file, name string) string {
	for range 40 {
		parts := strings.Split(strings.TrimPrefix(path.Clean(name), "/"), "/")
		link := -1
		for i := range parts {
			if f, ok := in[path.Join(parts[:i+1]...)]; ok && f.Typeflag == tar.TypeSymlink {
				link = i
				break
			}
		}
		if link < 0 {
			name = path.Join(parts...)
			if _, ok := in[name]; !ok {
				return ""
			}
			return name
		}
		target := in[path.Join(parts[:link+1]...)].Linkname
		if !path.IsAbs(target) {
			target = path.Join(path.Join(parts[:link]...), target)
		}
		name = path.Join(append([]string{target}, parts[link+1:]...)...)
	}
	return ""
}

// The images of both platforms contain the files that they need and no binary of
// another platform.
func TestImages(t *testing.T) {
	foreign := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	for tag, arch := range map[string]string{"latest": runtime.GOARCH, foreign: foreign} {
		t.Run(arch, func(t *testing.T) {
			var first map[string]file
			for _, name := range images {
				name := "localhost/" + name + ":" + tag
				all, limit := files(t, name), 28e6 // as in .ci/image
				switch {
				case strings.Contains(name, alone):
					limit = 15e6
					checkAlone(t, all, "usr/bin/egress-router", machines[arch])
				case strings.Contains(name, plugin):
					limit = 6.1e6
					checkAlone(t, all, "usr/bin/egress-router-cni", machines[arch])
				case strings.Contains(name, operator):
					limit = 45e6
					checkAlone(t, all, "usr/bin/egress-operator", machines[arch])
				case first == nil:
					first = all
					checkFiles(t, all, machines[arch])
				case !slices.Equal(slices.Sorted(maps.Keys(first)), slices.Sorted(maps.Keys(all))):
					t.Errorf("%s contains other files than the first image", name)
				}
				inspect := func(format string) string {
					return strings.TrimSpace(run(t, "podman", "image", "inspect", "--format", format, name))
				}
				if got := inspect("{{.Os}}/{{.Architecture}}"); got != "linux/"+arch {
					t.Errorf("%s is of platform %s", name, got)
				}
				size := 0
				if _, err := fmt.Sscan(inspect("{{.Size}}"), &size); err != nil || size == 0 || float64(size) >= limit {
					t.Errorf("%s has %d bytes (%v), want less than %.0f MB", name, size, err, limit/1e6)
				}
				for _, label := range []string{"title", "description", "licenses", "source"} {
					if inspect(`{{index .Labels "org.opencontainers.image.`+label+`"}}`) == "" {
						t.Errorf("%s has no label %s", name, label)
					}
				}
			}
		})
	}
	for name, want := range map[string]string{
		"egress-router":     "[/usr/bin/egress-router]",
		"egress-http-proxy": "[/usr/bin/egress-router http-proxy]",
		"egress-dns-proxy":  "[/usr/bin/egress-router dns-proxy]",
		alone:               "[/usr/bin/egress-router]",
		plugin:              "[/usr/bin/egress-router-cni]",
		operator:            "[/usr/bin/egress-operator]",
	} {
		if got := strings.TrimSpace(run(t, "podman", "image", "inspect", "--format", "{{.Config.Entrypoint}}", "localhost/"+name)); got != want {
			t.Errorf("%s starts %s, want %s", name, got, want)
		}
	}
}

// checkAlone checks an image that contains a program only. Empty files are podman's:
// it adds them to each container.
func checkAlone(t *testing.T, all map[string]file, program string, machine elf.Machine) {
	t.Helper()
	var names []string
	for name, f := range all {
		if f.Size > 0 {
			names = append(names, name)
		}
	}
	if len(names) != 1 || names[0] != program {
		t.Fatalf("an image contains %v, want %s alone", names, program)
	}
	e, err := elf.NewFile(bytes.NewReader(all[program].content))
	if err != nil {
		t.Fatal(err)
	}
	if needed, _ := e.ImportedLibraries(); e.Machine != machine || len(needed) > 0 {
		t.Errorf("the program is for %s and needs %v; want %s and nothing", e.Machine, needed, machine)
	}
}

func checkFiles(t *testing.T, all map[string]file, machine elf.Machine) {
	t.Helper()
	for _, name := range []string{
		"usr/bin/egress-router", "run", "tmp",
		"usr/sbin/iptables", "usr/sbin/iptables-save", "usr/sbin/iptables-restore",
		"usr/sbin/iptables-nft", "usr/sbin/iptables-nft-save", "usr/sbin/iptables-nft-restore",
		"usr/sbin/iptables-legacy", "usr/sbin/iptables-legacy-save", "usr/sbin/iptables-legacy-restore",
		"usr/lib/iptables-legacy/iptables", "usr/lib/iptables-legacy/iptables-save", "usr/lib/iptables-legacy/iptables-restore",
		"usr/sbin/ip6tables-save", "usr/sbin/ip6tables-restore", "usr/sbin/ip6tables-legacy-save", "usr/sbin/ip6tables-legacy-restore",
		"usr/lib/iptables-legacy/ip6tables-save", "usr/lib/iptables-legacy/ip6tables-restore",
	} {
		if resolve(all, name) == "" {
			t.Errorf("%s is missing", name)
		}
	}
	if passwd := string(all["etc/passwd"].content); !strings.Contains(passwd, "\nnonroot:x:65532:65532:") || !strings.HasPrefix(passwd, "root:x:0:0:") {
		t.Errorf("etc/passwd:\n%s", passwd)
	}
	if !x509.NewCertPool().AppendCertsFromPEM(all["etc/ssl/certs/ca-certificates.crt"].content) {
		t.Error("no certificates")
	}
	libraries := map[string]string{} // by soname
	for name := range all {
		if strings.HasPrefix(name, "usr/lib/") && strings.Contains(path.Base(name), ".so") && !strings.Contains(name, "/xtables/") {
			libraries[path.Base(name)] = name
		}
	}
	for name, f := range all {
		// The second is for the socket of health, of any user.
		if open := name == "tmp" || name == "run/egress-router"; open != (f.Mode&0o7777 == 0o1777) || !open && f.Mode&0o7000 != 0 {
			t.Errorf("%s has mode %o", name, f.Mode)
		}
		if f.Typeflag == tar.TypeSymlink && resolve(all, name) == "" {
			t.Errorf("%s leads nowhere: %s", name, f.Linkname)
		}
		if !bytes.HasPrefix(f.content, []byte(elf.ELFMAG)) {
			continue
		}
		e, err := elf.NewFile(bytes.NewReader(f.content))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if e.Machine != machine {
			t.Errorf("%s is for %s, want %s", name, e.Machine, machine)
		}
		needed, err := e.ImportedLibraries()
		if err != nil && name != "usr/bin/egress-router" {
			t.Errorf("%s: %v", name, err)
		}
		for _, n := range needed {
			if libraries[n] == "" {
				t.Errorf("%s needs %s, which is missing", name, n)
			}
		}
		for _, p := range e.Progs {
			if p.Type != elf.PT_INTERP {
				continue
			}
			loader, err := io.ReadAll(p.Open())
			if err != nil {
				t.Error(err)
			}
			if to := string(bytes.TrimRight(loader, "\x00")); resolve(all, to) == "" {
				t.Errorf("%s is started by %s, which is missing", name, to)
			}
			if name == "usr/bin/egress-router" {
				t.Error("the program is not static")
			}
		}
	}
}

// Both flavours of iptables in the image have every match and target of the router,
// and those for troubleshooting.
func TestExtensions(t *testing.T) {
	const text = `*mangle
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -i eth0 -m conntrack --ctstate NEW -m comment --comment "a comment" -j CONNMARK --set-xmark 0x1/0x1
-A PREROUTING -m connmark --mark 0x1/0x1 -j CONNMARK --restore-mark --nfmask 0x1 --ctmask 0x1
-A PREROUTING -m mark --mark 0x1/0x1 -j MARK --set-xmark 0x0/0x1
-A POSTROUTING -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -i eth0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 203.0.113.25:80
-A PREROUTING -p udp -m udp --dport 53 -j REDIRECT --to-ports 5353
-A PREROUTING -p tcp -m multiport --dports 80,443 -m addrtype --dst-type LOCAL -j RETURN
-A POSTROUTING -o macvlan0 -j SNAT --to-source 192.168.12.99
-A POSTROUTING -o eth0 -j MASQUERADE
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
-A INPUT -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A FORWARD -m state --state RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -j LOG --log-prefix "dropped "
-A FORWARD -p tcp -j REJECT --reject-with tcp-reset
COMMIT
`
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			p := command("podman", "run", "--rm", "--interactive", "--network", "none", "--cap-drop", "all", "--cap-add", "net_admin,net_raw",
				"--entrypoint", "/usr/sbin/iptables-"+flavour+"-restore", image)
			p.cmd.Stdin = strings.NewReader(text)
			if err := p.run(); err != nil {
				t.Error(err)
			}
		})
	}
}
