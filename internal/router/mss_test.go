package router_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/egress-router/egress-router/internal/lab"
	"github.com/egress-router/egress-router/internal/lab/labtest"
	"github.com/egress-router/egress-router/internal/netns"
)

// segmentSizes returns the maximum segment sizes in the SYNs that left by a link, by
// the port that they go to: those of servers go to another.
func segmentSizes(frames []lab.Frame, port uint16) (syn, answer []uint16) {
	for _, f := range frames {
		ip, _ := f.IPv4()
		const at = 14 + 20 // headers of Ethernet and IPv4
		if ip.Protocol != 6 || len(f.Data) < at+24 || f.Data[at+13]&2 == 0 {
			continue
		}
		// RFC 9293, section 3.2: Linux sends it as the first option.
		size := binary.BigEndian.Uint16(f.Data[at+22:])
		if f.Data[at+20] != 2 {
			size = 0
		}
		if ip.Dst.Port() == port {
			syn = append(syn, size)
		} else {
			answer = append(answer, size)
		}
	}
	return syn, answer
}

// Bulk data passes in both directions if the two sides have another MTU and all ICMP
// errors are lost: the SYNs offer what fits both.
func TestSegmentSizeFitsPath(t *testing.T) {
	t.Parallel()
	for name, mtu := range map[string]struct {
		client, cluster, egress, outside int
		offer                            uint16 // maximum segment size that both sides get
	}{
		"overlay":           {1500, 1450, 1500, 1500, 1410},
		"jumbo cluster":     {9000, 9000, 1500, 9000, 1460},
		"jumbo LAN":         {9000, 1450, 9000, 9000, 1410},
		"all the same":      {1500, 1500, 1500, 1500, 1460},
		"smaller at client": {1400, 1500, 1500, 1500, 0},
	} {
		t.Run(name, func(t *testing.T) {
			labtest.EachBackend(t, lab.Options{}, func(p *labtest.Pod) {
				for _, l := range []struct {
					ns   *netns.Namespace
					name string
					mtu  int
				}{
					{p.Lab.Node, lab.ClientPort, mtu.client}, {p.Lab.Node, lab.RouterPort, mtu.cluster}, {p.Lab.Node, lab.NIC, mtu.outside},
					{p.Lab.Node, lab.FarPort, mtu.cluster}, {p.Lab.Far, lab.ClientLink, mtu.cluster},
					{p.Lab.Client, lab.ClientLink, mtu.client}, {p.Lab.Outside, lab.LANLink, mtu.outside},
					{p.Lab.Router, "eth0", mtu.cluster}, {p.Lab.Router, "macvlan0", mtu.egress},
				} {
					h := p.Handle(l.ns)
					if err := h.LinkSetMTU(p.Link(h, l.name), l.mtu); err != nil {
						p.Fatal(err)
					}
				}
				// The pod's ICMP errors are lost on both sides.
				p.NFT("add table ip filtered")
				p.NFT("add chain ip filtered output { type filter hook output priority 0 ; }")
				p.NFT("add rule ip filtered output icmp type destination-unreachable drop")
				p.OK()
				w := p.Watch(p.Lab.Router, "eth0", "macvlan0")
				for _, client := range []*netns.Namespace{p.Lab.Client, p.Lab.Far} {
					transfer(p, client, netip.AddrPortFrom(lab.RouterAddr, 8080))
				}
				syns, _ := segmentSizes(w.Outgoing("macvlan0"), 80)
				_, answers := segmentSizes(w.Outgoing("eth0"), 80)
				if len(syns) < 2 || len(answers) < 2 {
					p.Fatalf("%d SYNs and %d answers, want 2 each", len(syns), len(answers))
				}
				for _, size := range append(syns, answers...) {
					if mtu.offer != 0 && size != mtu.offer {
						p.Errorf("segment size %d, want %d", size, mtu.offer)
					}
				}
				if mtu.offer == 0 && syns[0] != uint16(mtu.client-40) {
					p.Errorf("segment size of the client %d, want its own %d", syns[0], mtu.client-40)
				}
				p.WantUnchanged(p.OK())
			})
		})
	}
}

// transfer sends a megabyte to an echo server and reads it back.
func transfer(p *labtest.Pod, from *netns.Namespace, to netip.AddrPort) {
	p.Helper()
	conn := p.Dial(from, "tcp", to)
	_ = conn.SetDeadline(time.Now().Add(labtest.Patience))
	r := bufio.NewReader(conn)
	if _, err := lab.ReadAnswer(r); err != nil {
		p.Fatal(err)
	}
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	failed := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		failed <- err
	}()
	got := make([]byte, len(sent))
	n, err := io.ReadFull(r, got)
	if err == nil && !bytes.Equal(got, sent) {
		err = fmt.Errorf("other data")
	}
	if err != nil {
		p.Errorf("%d of %d bytes came back: %v", n, len(sent), err)
		_ = conn.Close()
	}
	if err := <-failed; err != nil {
		p.Errorf("send: %v", err)
	}
}
