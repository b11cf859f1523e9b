package cli

import (
	"bufio"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// startMemory is the memory limit, in bytes, below which a starting run collects no
// garbage. The largest destination list of a ConfigMap needs less than half.
const startMemory = 64 << 20

// idlePercent is the GC percentage of a router that stays. It does little, so that
// frequent collections cost nothing.
const idlePercent = 25

// tuneGC disables garbage collection for a run of some milliseconds, which a
// collection would double. A router that stays calls restoreGC, which also returns
// the start's memory to the system.
func tuneGC() (restoreGC func()) {
	debug.SetGCPercent(-1)
	limit := debug.SetMemoryLimit(startMemory)
	return func() {
		debug.SetGCPercent(idlePercent)
		debug.SetMemoryLimit(limit)
		debug.FreeOSMemory()
		giveBackProgram()
	}
}

// A router with manyRedirects makes garbage of some megabytes in each comparison. It is
// collected once, behind the comparison, when also what only the comparison needed is given
// back; with idlePercent it would be collected several times in the comparison, which takes
// longer, and the freed memory would stay until the next one.
const (
	manyRedirects = 1000
	manyPercent   = 400
)

// newRest returns a function to call after each comparison of the rules of a number of
// redirects.
func newRest() func(redirects int) {
	percent := idlePercent
	return func(redirects int) {
		want := idlePercent
		if redirects >= manyRedirects {
			want = manyPercent
		}
		if want != percent { // it stops the world
			percent = want
			debug.SetGCPercent(percent)
		}
		if redirects >= manyRedirects {
			debug.FreeOSMemory()
			giveBackProgram()
		}
	}
}

// giveBackProgram drops the pages of the program's file from the process's memory:
// most are needed, or were read ahead, only for the start or for a comparison. The kernel
// maps them from the page cache when they are used again (madvise(2), MADV_DONTNEED), 16 in
// one fault. Errors do not matter.
func giveBackProgram() {
	for _, m := range programMaps() {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.begin, m.end-m.begin, unix.MADV_DONTNEED)
	}
}

// A mapping is a range of addresses.
type mapping struct{ begin, end uintptr }

// programMaps returns the mappings of the program's file that are not writable, which stay
// as they are.
var programMaps = sync.OnceValue(func() (found []mapping) {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil
	}
	maps, err := os.Open("/proc/self/maps") // proc_pid_maps(5)
	if err != nil {
		return nil
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var m mapping
		var permissions string
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s", &m.begin, &m.end, &permissions); n != 3 {
			continue
		}
		if strings.HasSuffix(lines.Text(), " "+exe) && !strings.Contains(permissions, "w") {
			found = append(found, m)
		}
	}
	return found
})
