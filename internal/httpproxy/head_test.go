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

// The work for a header is linear in its length, whatever its sender writes: it stays a
// small multiple of that for reading the same header.
func TestLinearWork(t *testing.T) {
	fastest := func(do func()) time.Duration {
		least := time.Hour
		for range 5 {
			begun := time.Now()
			do()
			least = min(least, time.Since(begun))
		}
		return least
	}
	var names strings.Builder
	for i := range 16000 {
		fmt.Fprintf(&names, "%03x,", i)
	}
	for name, text := range map[string]string{
		"empty tokens":        "Connection: " + strings.Repeat(",", 32000) + "\r\n" + strings.Repeat("a:\r\n", 8000),
		"empty lists":         strings.Repeat("Connection:\r\n", 2500) + strings.Repeat("a:\r\n", 8000),
		"different tokens":    "Connection: " + names.String()[:32000] + "\r\n" + strings.Repeat("a:\r\n", 8000),
		"different trailers":  "Trailer: " + names.String()[:64000] + "\r\n",
		"trailers in a field": strings.Repeat("Trailer: a,b\r\n", 4000),
	} {
		var header fields
		read := fastest(func() {
			h := newHeadReader(1 << 20)
			defer h.free()
			var err error
			if _, header, err = h.read(bufio.NewReader(strings.NewReader(text+"\r\n")), nil, nil); err != nil {
				t.Fatal(err)
			}
		})
		for work, do := range map[string]func(fields){
			"of a connection": func(f fields) { f.withoutHopByHop() },
			"of a switch":     func(f fields) { f.withoutNamed() },
			"trailers":        func(f fields) { _, _, _ = f.announcedTrailers() },
		} {
			copied := slices.Clone(header)
			if took := fastest(func() { copy(copied, header); do(copied) }); took > 30*read {
				t.Errorf("%s, %s: %v, but reading takes %v", name, work, took, read)
			}
		}
	}
}
