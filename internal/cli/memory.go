package cli

import (
	"bufio"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

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

// giveBackProgram drops the pages of the program's file from the process's memory:
// most are needed, or were read ahead, only for the start. The kernel reads them from
// the page cache when they are used again (madvise(2), MADV_DONTNEED). Errors do not
// matter.
func giveBackProgram() {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	maps, err := os.Open("/proc/self/maps") // proc_pid_maps(5)
	if err != nil {
		return
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var begin, end uintptr
		var permissions string
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s", &begin, &end, &permissions); n != 3 {
			continue
		}
		if strings.HasSuffix(lines.Text(), " "+exe) && !strings.Contains(permissions, "w") {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, begin, end-begin, unix.MADV_DONTNEED)
		}
	}
}
