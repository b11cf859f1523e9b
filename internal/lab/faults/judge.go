package faults

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/lab"
)

// Role is what a frame says about its sender.
type Role uint8

// The roles. Only a router whose gate is open sends frames of Holds; a router that takes
// the address over announces it before.
const (
	None   Role = iota
	Claims      // an announcement of the reserved address, in either form (RFC 5227, section 3)
	Holds       // a packet with the reserved address, or an ARP reply with it for another host
)

// RoleOf returns the role of a frame with the reserved address source as its sender. Echo
// requests have none: a router that claims pings its gateway before it may send anything
// else. ARP requests for other addresses have none either: one may be part of a claim.
func RoleOf(f lab.Frame, source netip.Addr) Role {
	if a, ok := f.ARP(); ok && a.SenderIP == source {
		switch {
		case a.Announces():
			return Claims
		case a.Op == 2:
			return Holds
		}
		return None
	}
	p, ok := f.IPv4()
	if !ok || p.Src.Addr() != source || echoRequest(f, p) {
		return None
	}
	return Holds
}

// echoRequest reports whether an IPv4 packet is an ICMP echo request (RFC 792).
func echoRequest(f lab.Frame, p lab.Packet) bool {
	const ethernet = 14
	icmp := ethernet + int(f.Data[ethernet]&0xf)*4
	return p.Protocol == unix.IPPROTO_ICMP && len(f.Data) > icmp && f.Data[icmp] == 8
}

// A Sighting is a frame with a role.
type Sighting struct {
	lab.Frame
	MAC  string // of the sender
	Role Role
}

// Judge finds routers that send with one reserved address at the same time, in the captures
// of the switch ports of all routers. It knows nothing of the routers' states:
//
// A frame that holds, of A after one of another router B, is a violation unless A has
// claimed the address since its own last frame that holds. B remains the holder then.
//
// This accuses nobody innocent. A gate that was shut opens by a claim, or again without one
// after a lapse. The latter is shorter than any other router needs to open: then B has sent
// nothing. All frames are stamped by one clock as they enter the switch, before the switch
// may lose them, in the context of the sender.
//
// It finds every overlap in which each router sends twice. Let A and B be open from s to e.
// The one that opened first, A, has no reason to claim while it is open. A sends after B's
// first frame, with no claim since its own last frame: a violation. With data each 5 ms by
// every router that is an overlap of 10 ms. The regular announcement of an open router, once
// a minute, hides one frame.
type Judge struct {
	Source netip.Addr

	waiting []Sighting      // not judged yet
	recent  []Sighting      // judged, for excerpts
	last    Sighting        // the last one that holds, without violations
	claimed map[string]bool // has claimed since it held
}

// A Violation is a frame that a router sent while another one was open.
type Violation struct {
	Before, Frame Sighting
	Excerpt       []Sighting // the frames before, and this one
}

// String returns the violation as lines for a person.
func (v Violation) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s sent %s after %s, without a claim\n", v.Frame.MAC, v.Frame.At.Sub(v.Before.At), v.Before.MAC)
	for _, s := range v.Excerpt {
		fmt.Fprintf(&b, "\t%s %s\n", s.At.Format("15:04:05.000000"), s.Frame)
	}
	return b.String()
}

// excerpt is the number of frames in a Violation.
const excerpt = 40

// Add adds the frames of one port that the switch received.
func (j *Judge) Add(frames []lab.Frame) {
	for _, f := range frames {
		if role := RoleOf(f, j.Source); role != None && !f.Outgoing {
			j.waiting = append(j.waiting, Sighting{f, f.Source().String(), role})
		}
	}
}

// Until judges the frames before a time, up to which the frames of all ports have been
// added. Frames must not be added for a time that has been judged.
func (j *Judge) Until(end time.Time) []Violation {
	slices.SortStableFunc(j.waiting, func(a, b Sighting) int { return a.At.Compare(b.At) })
	n, _ := slices.BinarySearchFunc(j.waiting, end, func(s Sighting, end time.Time) int { return cmp.Or(s.At.Compare(end), 1) })
	var found []Violation
	for _, s := range j.waiting[:n] {
		j.recent = append(j.recent, s)
		violates := j.violates(s)
		if violates {
			from := max(0, len(j.recent)-excerpt)
			found = append(found, Violation{j.last, s, slices.Clone(j.recent[from:])})
		}
		j.learn(s, !violates)
	}
	j.waiting = slices.Delete(j.waiting, 0, n)
	if cut := len(j.recent) - excerpt; cut > 0 {
		j.recent = slices.Delete(j.recent, 0, cut)
	}
	return found
}

// violates reports whether a frame is a violation. The first holder of all may have opened
// before the captures began.
func (j *Judge) violates(s Sighting) bool {
	return s.Role == Holds && j.last.MAC != "" && s.MAC != j.last.MAC && !j.claimed[s.MAC]
}

func (j *Judge) learn(s Sighting, lawful bool) {
	if j.claimed == nil {
		j.claimed = map[string]bool{}
	}
	j.claimed[s.MAC] = s.Role == Claims
	if s.Role == Holds && lawful {
		j.last = s
	}
}

// Holder returns the hardware address of the router that sent last, of the frames judged
// and without violations; "" if none did.
func (j *Judge) Holder() string { return j.last.MAC }

// An Attempt is a new connection of the client.
type Attempt struct {
	At       time.Time // when its datagrams were sent
	Answered bool
}

// Gap returns the longest time between two answered attempts with others in between. A
// client that itself pauses has no gap. Attempts at the end without an answer do not count.
func Gap(attempts []Attempt) time.Duration {
	var longest time.Duration
	last := -1
	for i, a := range attempts {
		if !a.Answered {
			continue
		}
		if last >= 0 && i > last+1 {
			longest = max(longest, a.At.Sub(attempts[last].At))
		}
		last = i
	}
	return longest
}
