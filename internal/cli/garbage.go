package cli

// floorSize is how much the HTTP proxy lets pile up before it collects garbage, in
// bytes, even if it has next to nothing in use. By itself the runtime collects at
// 4 MiB, which is dozens of times a second under load, and each time requests
// wait. The DNS proxy leaves too little garbage to gain by it.
const floorSize = 16 << 20

// garbageFloor returns what sets that floor as long as it is kept: it counts as in
// use, and the collector runs when the heap has doubled (GOGC in package runtime).
// It is never touched, so that it takes no memory. A higher GOGC would take a
// multiple of what is in use with many clients, too.
func garbageFloor() []byte { return make([]byte, floorSize) }
