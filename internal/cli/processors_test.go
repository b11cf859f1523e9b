package cli

import (
	"runtime"
	"testing"
)

func TestHalveProcessors(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	for _, test := range []struct {
		variable string
		have     int
		want     int
	}{
		{"", 1000, max(1, runtime.NumCPU()/2)},
		{"", 1, 1}, // as with a container's share
		{"1000", 1000, 1000},
	} {
		t.Setenv("GOMAXPROCS", test.variable)
		runtime.GOMAXPROCS(test.have)
		restore := halveProcessors()
		if got := runtime.GOMAXPROCS(0); got != test.want {
			t.Errorf("GOMAXPROCS=%q, %d before: %d processors, want %d", test.variable, test.have, got, test.want)
		}
		restore()
		if got := runtime.GOMAXPROCS(0); got != test.have {
			t.Errorf("%d processors afterwards, want %d", got, test.have)
		}
	}
	runtime.GOMAXPROCS(before)
}
