package cli

// garbageFloor is how much the HTTP proxy lets pile up before it collects garbage,
// in bytes, even if it has next to nothing in use. By itself the runtime collects
// at 4 MiB, which is dozens of times a second under load, and each time requests
// wait.
const garbageFloor = 16 << 20

// ballast counts as in use, which sets that floor (the collector runs when the
// heap has doubled, see GOGC in package runtime), and is never touched, so that
// it takes no memory. A higher GOGC would take a multiple of what is in use with
// many clients, too.
var ballast []byte

// setGarbageFloor is for the HTTP proxy. The DNS proxy leaves too little garbage
// to gain by it.
func setGarbageFloor() { ballast = make([]byte, garbageFloor) }
