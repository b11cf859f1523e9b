package faults

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

var (
	source  = netip.MustParseAddr("192.168.12.99")
	gateway = netip.MustParseAddr("192.168.12.1")
	start   = time.Unix(1_000_000, 0)
)

// frame returns a frame of a sender, which is the last byte of its address.
func frame(sender byte, etherType uint16, payload []byte) lab.Frame {
	b := make([]byte, 14, 14+len(payload))
	copy(b[6:], []byte{2, 0, 0, 0, 0, sender})
	binary.BigEndian.PutUint16(b[12:], etherType)
	return lab.Frame{At: start, Data: append(b, payload...)}
}

func arp(sender byte, op uint16, from, to netip.Addr) lab.Frame {
	b := []byte{0, 1, 8, 0, 6, 4, 0, byte(op), 2, 0, 0, 0, 0, sender}
	b = append(b, from.AsSlice()...)
	b = append(b, 0, 0, 0, 0, 0, 0)
	return frame(sender, unix.ETH_P_ARP, append(b, to.AsSlice()...))
}

// packet returns an IPv4 packet whose header has options, with the payload's first byte.
func packet(sender, protocol byte, from netip.Addr, first byte) lab.Frame {
	b := make([]byte, 24, 33)
	b[0], b[9] = 0x46, protocol
	copy(b[12:], from.AsSlice())
	copy(b[16:], gateway.AsSlice())
	return frame(sender, unix.ETH_P_IP, append(b, first, 0, 0, 0, 0, 0, 0, 0))
}

func TestRoleOf(t *testing.T) {
	for name, test := range map[string]struct {
		frame lab.Frame
		want  Role
	}{
		"datagram":                {packet(1, unix.IPPROTO_UDP, source, 0), Holds},
		"echo request":            {packet(1, unix.IPPROTO_ICMP, source, 8), None},
		"echo reply":              {packet(1, unix.IPPROTO_ICMP, source, 0), Holds},
		"datagram of a node":      {packet(1, unix.IPPROTO_UDP, gateway, 0), None},
		"announcement, reply":     {arp(1, 2, source, source), Claims},
		"announcement, request":   {arp(1, 1, source, source), Claims},
		"answer to the gateway":   {arp(1, 2, source, gateway), Holds},
		"request for the gateway": {arp(1, 1, source, gateway), None},
		"probe":                   {arp(1, 1, netip.IPv4Unspecified(), source), None},
		"request of a node":       {arp(1, 1, gateway, source), None},
		"short":                   {lab.Frame{Data: []byte{1}}, None},
	} {
		if got := RoleOf(test.frame, source); got != test.want {
			t.Errorf("%s: role %d, want %d", name, got, test.want)
		}
	}
}

// A letter is a data frame of a router, an upper case letter its claim; each is a
// millisecond after the one before.
func TestJudge(t *testing.T) {
	for name, test := range map[string]struct {
		frames     string
		violations string // the data frames that are violations, marked by x
	}{
		"one router":                            {"aaaa", "...."},
		"claim without data":                    {"aaBaa", "....."},
		"take-over":                             {"aaBBbbb", "......."},
		"take-over and back":                    {"aaBbbAaa", "........"},
		"back after a lapse":                    {"aa  aa", "......"},
		"old holder goes on":                    {"aaBbabaab", "....x.xx."},
		"both, each once":                       {"aBba", "...x"},
		"without any claim":                     {"aab", "..x"},
		"claim that is used up":                 {"aaBbAaCcb", "........x"},
		"announcement of an open router":        {"aaAaa", "....."},
		"announcement hides one frame":          {"aBbAaba", ".....x."},
		"claims of both, one opens":             {"aaBCBCbb", "........"},
		"claims of both, both open":             {"BCbcbc", "....x."},
		"holder claims again while other opens": {"aBAba", "....."},
	} {
		j := Judge{Source: source}
		for i, r := range test.frames {
			if r == ' ' {
				continue
			}
			f := packet(byte(r), unix.IPPROTO_UDP, source, 0)
			if r < 'a' {
				f = arp(byte(r-'A'+'a'), 2, source, source)
			}
			f.At = start.Add(time.Duration(i) * time.Millisecond)
			j.Add([]lab.Frame{f})
		}
		got := []byte(strings.Repeat(".", len(test.frames)))
		for _, v := range j.Until(start.Add(time.Hour)) {
			got[v.Frame.At.Sub(start).Milliseconds()] = 'x'
		}
		if string(got) != test.violations {
			t.Errorf("%s: %s: violations %s, want %s", name, test.frames, got, test.violations)
		}
	}
}

// Frames of several ports are judged in the order in which they passed, in several parts,
// and those that the switch sent are not.
func TestJudgeOrder(t *testing.T) {
	at := func(f lab.Frame, ms int) lab.Frame {
		f.At = start.Add(time.Duration(ms) * time.Millisecond)
		return f
	}
	udp := func(sender byte, ms int) lab.Frame { return at(packet(sender, unix.IPPROTO_UDP, source, 0), ms) }
	sent := udp('c', 5)
	sent.Outgoing = true
	j := Judge{Source: source}
	j.Add([]lab.Frame{at(arp('b', 1, source, source), 3), udp('b', 4), udp('b', 6)})
	j.Add([]lab.Frame{udp('a', 1), sent, udp('a', 5)})
	if found := j.Until(start.Add(5 * time.Millisecond)); len(found) != 0 {
		t.Errorf("violations before the old holder's last frame: %v", found)
	}
	found := j.Until(start.Add(time.Second))
	if len(found) != 1 || found[0].Frame.MAC != "02:00:00:00:00:61" || found[0].Before.MAC != "02:00:00:00:00:62" {
		t.Fatalf("violations %v, want one of a", found)
	}
	const want = "02:00:00:00:00:61 sent 1ms after 02:00:00:00:00:62, without a claim\n"
	if text := found[0].String(); !strings.HasPrefix(text, want) || strings.Count(text, "\n") != 5 {
		t.Errorf("violation:\n%swant %s and 4 frames", text, want)
	}
	if j.Holder() != "02:00:00:00:00:62" {
		t.Errorf("holder %s", j.Holder())
	}
}

func TestGap(t *testing.T) {
	for attempts, want := range map[string]int{
		"":          0,
		"....":      0,
		"++++":      0,
		"+.+":       2,
		"+...+..+":  4,
		"..+.+...":  2,
		"+   +":     0, // the client itself paused
		"+ . +":     4,
		"+..  .  +": 8,
	} {
		var list []Attempt
		for i, r := range attempts {
			if r != ' ' {
				list = append(list, Attempt{start.Add(time.Duration(i) * time.Second), r == '+'})
			}
		}
		if got := Gap(list); got != time.Duration(want)*time.Second {
			t.Errorf("%q: gap %s, want %d s", attempts, got, want)
		}
	}
}
