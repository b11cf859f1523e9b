package httpproxy

import (
	"bufio"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Fields that Connection names are removed, however many it names.
func TestNamedFields(t *testing.T) {
	for _, extra := range []int{0, 1, 3, 4, 100} {
		f := fields{{"Connection", "a-b ,, X\t,"}, {"A-B", "1"}, {"Z", "2"}, {"X", "3"}, {"Z1", "4"}}
		for i := range extra {
			f = append(f, field{"Connection", fmt.Sprintf("other-%d,ANOTHER-%d", i, i)}, field{fmt.Sprintf("Another-%d", i), "5"}, field{fmt.Sprintf("Kept-%d", i), "6"})
		}
		want := fields{{"Z", "2"}, {"Z1", "4"}}
		for i := range extra {
			want = append(want, field{fmt.Sprintf("Kept-%d", i), "6"})
		}
		if got := slices.Clone(f).withoutHopByHop(); !slices.Equal(got, want) {
			t.Errorf("%d more: %v", extra, got)
		}
		got := slices.DeleteFunc(f.withoutNamed(), func(one field) bool { return one.name == "Connection" })
		if !slices.Equal(got, want) {
			t.Errorf("a switch, %d more: %v", extra, got)
		}
	}
}

// Names in Trailer are announced once, in their order.
func TestAnnouncedTrailers(t *testing.T) {
	list := "b, A,, b,c,d,e,f,F,g,A,host,x y"
	_, names, err := fields{{"Trailer", list}, {"Trailer", "h,g"}}.announcedTrailers()
	if got := strings.Join(names, " "); got != "B A C D E F G H" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// The work for a header is linear in its length, whatever its sender writes: 16 times
// the length takes about 16 times the processor time of the thread, which other programs hardly
// change, and not 256 times.
func TestLinearWork(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	processor := func() time.Duration {
		var used unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &used); err != nil {
			t.Fatal(err)
		}
		return time.Duration(used.Nano())
	}
	names := func(n int) string {
		var list strings.Builder
		for i := range n {
			fmt.Fprintf(&list, "x%05d,", i)
		}
		return list.String()
	}
	for name, text := range map[string]func(n int) string{
		"empty tokens": func(n int) string {
			return "Connection: " + strings.Repeat(",", 4*n) + "\r\n" + strings.Repeat("a:\r\n", n)
		},
		"empty lists":      func(n int) string { return strings.Repeat("Connection:\r\n", n) + strings.Repeat("a:\r\n", n) },
		"different tokens": func(n int) string { return "Connection: " + names(n) + "\r\n" + strings.Repeat("a:\r\n", n) },
		"trailers":         func(n int) string { return "Trailer: " + names(n) + "\r\n" },
	} {
		for work, do := range map[string]func(fields){
			"a connection":       func(f fields) { f.withoutHopByHop() },
			"a switch":           func(f fields) { f.withoutNamed() },
			"announced trailers": func(f fields) { _, _, _ = f.announcedTrailers() },
		} {
			// sample returns what measures the work for n fields once.
			sample := func(n int) func() time.Duration {
				h := newHeadReader(1 << 20)
				t.Cleanup(h.free)
				_, header, err := h.read(bufio.NewReader(strings.NewReader(text(n)+"\r\n")), nil, nil)
				if err != nil {
					t.Fatal(err)
				}
				copied := slices.Clone(header)
				return func() time.Duration {
					copy(copied, header)
					begun := processor()
					do(copied)
					return processor() - begun
				}
			}
			// The kernel adds the work of interrupts to the time of the thread: the least counts.
			takePart, takeWhole := sample(1000), sample(16000)
			part, whole := time.Hour, time.Hour
			for i := 0; i < 7 || whole > 80*part && i < 1000; i++ {
				part, whole = min(part, takePart()), min(whole, takeWhole())
			}
			if whole > 80*part {
				t.Errorf("%s, %s: %v, but a sixteenth takes %v", name, work, whole, part)
			}
		}
	}
}
