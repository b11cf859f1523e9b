package cli

import (
	"os"
	"runtime"
)

// halveProcessors lets the HTTP proxy run Go code on half of the machine's processors, at
// least on one, until the returned function is called. A limit by GOMAXPROCS or by the
// container's share stays if it is lower; only then does the runtime follow later changes
// of that share.
//
// Half of the work for a request is the kernel's, on both of its connections. With a thread
// for each processor the threads take turns with that work, with clients and with servers:
// while one waits for its turn, up to a tick of the scheduler (CONFIG_HZ), so does its
// request. The throughput is the same with half of them.
func halveProcessors() (restore func()) {
	before := runtime.GOMAXPROCS(0)
	half := max(1, runtime.NumCPU()/2)
	if os.Getenv("GOMAXPROCS") != "" || half >= before {
		return func() {}
	}
	runtime.GOMAXPROCS(half)
	return func() { runtime.GOMAXPROCS(before) }
}
