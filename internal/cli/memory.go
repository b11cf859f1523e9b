package cli

import (
	"bufio"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// startMemory is how much a run may take before it collects garbage, in bytes.
// The largest destination list that a ConfigMap holds needs less than half.
const startMemory = 64 << 20

// idlePercent is how much of its memory a router that stays may fill anew before
// it collects garbage. It does little, so that collecting costs nothing.
const idlePercent = 25

// hurry lets a run that ends in milliseconds do without a collection of garbage,
// which would take as long again. What it returns is for one that stays instead:
// it gives back the memory of the start.
func hurry() (settle func()) {
	debug.SetGCPercent(-1)
	limit := debug.SetMemoryLimit(startMemory)
	return func() {
		debug.SetGCPercent(idlePercent)
		debug.SetMemoryLimit(limit)
		debug.FreeOSMemory()
		giveBackProgram()
	}
}

// giveBackProgram has the kernel take the pages of the program's file out of the
// process's memory, most of which only the start needed, or came in around those
// that it needed. They come back as they are used, from the page cache
// (madvise(2), MADV_DONTNEED). Where this fails nothing is lost.
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
