package httpproxy

import (
	"bufio"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
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

// The work for a header is linear in its length, whatever its sender writes: eight times
// the length takes about eight times as long, and not 64 times.
func TestLinearWork(t *testing.T) {
	fastest := func(do func()) time.Duration {
		least := time.Hour
		for range 7 {
			begun := time.Now()
			do()
			least = min(least, time.Since(begun))
		}
		return least
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
			took := func(n int) time.Duration {
				h := newHeadReader(1 << 20)
				defer h.free()
				_, header, err := h.read(bufio.NewReader(strings.NewReader(text(n)+"\r\n")), nil, nil)
				if err != nil {
					t.Fatal(err)
				}
				copied := slices.Clone(header)
				return fastest(func() { copy(copied, header); do(copied) })
			}
			if part, whole := took(1000), took(8000); whole > 24*part {
				t.Errorf("%s, %s: %v, but an eighth takes %v", name, work, whole, part)
			}
		}
	}
}
