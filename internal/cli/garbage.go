package cli

// floorSize is the garbage, in bytes, that the HTTP proxy accumulates before a
// collection, even if it uses next to nothing. By default the runtime collects at
// 4 MiB, which is dozens of times a second under load, and delays requests each
// time. The DNS proxy leaves too little garbage to gain by it.
const floorSize = 12 << 20

// garbageFloor returns an allocation that sets that floor while it is kept: it counts
// as in use, and the collector runs when the heap has doubled (GOGC in package
// runtime). It is never touched, so it uses no memory. With many clients a higher
// GOGC would also use a multiple of their memory.
func garbageFloor() []byte { return make([]byte, floorSize) }
