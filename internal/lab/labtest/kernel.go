package labtest

import (
	"os"
	"os/exec"
	"slices"
	"testing"
)

// LoadModules loads modules of the kernel, as the administrator of a node does, if the kernel has
// modules.
func LoadModules(t *testing.T, names ...string) {
	t.Helper()
	if _, err := os.Stat("/proc/modules"); err != nil {
		return
	}
	if out, err := exec.Command("modprobe", append([]string{"-a"}, names...)...).CombinedOutput(); err != nil {
		t.Fatalf("modprobe -a %q: %v: %s", names, err, out)
	}
}

// kernelVariable is the release of Debian's kernel that .ci/kernels has booted.
const kernelVariable = "EGRESS_TEST_KERNEL"

// HasNetdevEgress reports whether the kernel that .ci/kernels has booted has the egress hook of
// netdev (Linux 5.16, CONFIG_NETFILTER_EGRESS). It is not known of this machine's own kernel.
func HasNetdevEgress(t *testing.T) (has, known bool) {
	t.Helper()
	release := os.Getenv(kernelVariable)
	if release == "" {
		return false, false
	}
	kernels := []string{"5.10", "6.1", "6.12"}
	if !slices.Contains(kernels, release) {
		t.Fatalf("%s=%s: expected one of %q", kernelVariable, release, kernels)
	}
	return release != "5.10", true
}
