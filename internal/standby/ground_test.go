package standby

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/arp"
)

// A leftGate is open for a time.
type leftGate struct {
	brokenGate

	left time.Duration
	err  error
}

func (g leftGate) Left() (time.Duration, error) { return g.left, g.err }

// A request for an address is answered while the gate is open, and by nobody otherwise.
func TestReply(t *testing.T) {
	request := arp.Packet{
		Operation: arp.Request, SenderMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, SenderIP: netip.MustParseAddr("192.168.12.1"),
		TargetMAC: make(net.HardwareAddr, 6), TargetIP: netip.MustParseAddr("192.168.12.99"),
	}
	claim := request
	claim.Operation = arp.Reply
	for name, test := range map[string]struct {
		gate leftGate
		p    arp.Packet
		want bool
	}{
		"open":                {leftGate{left: time.Millisecond}, request, true},
		"shut":                {leftGate{}, request, false},
		"not known":           {leftGate{left: time.Millisecond, err: errors.New("no buffer space")}, request, false},
		"open, not asked for": {leftGate{left: time.Millisecond}, claim, false},
	} {
		t.Run(name, func(t *testing.T) {
			index := 0
			g := newGround(Options{Gate: func(i int) Gate { index = i; return test.gate }}, nil)
			frame := g.reply(test.p, 7, [6]byte{2, 0, 0, 0, 0, 99})
			if (frame != nil) != test.want || index != 7 {
				t.Fatalf("frame %x of the gate of interface %d, want %v of 7", frame, index, test.want)
			}
			if frame == nil {
				return
			}
			if p, err := arp.Parse(frame); err != nil || p.Operation != arp.Reply || p.SenderIP != request.TargetIP || p.SenderMAC.String() != "02:00:00:00:00:63" || p.TargetIP != request.SenderIP {
				t.Errorf("%+v, %v", p, err)
			}
		})
	}
}
