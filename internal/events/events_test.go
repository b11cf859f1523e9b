package events

import (
	"errors"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// Elements of the tables whose elements come and go are no events, in whichever transaction; all
// other changes are, also in the same tables.
func TestElementsOfTimedTables(t *testing.T) {
	file, err := open(unix.NETLINK_NETFILTER, rulesGroup)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	s := &Subscription{timed: []string{"timed"}}
	// The kernel has sent the messages when nft(8) ends.
	matters := func() (matters bool) {
		for b := make([]byte, longest); ; {
			n, _, err := unix.Recvfrom(int(file.Fd()), b, unix.MSG_DONTWAIT)
			if errors.Is(err, unix.EAGAIN) {
				return matters
			}
			if err != nil {
				t.Fatal(os.NewSyscallError("recvfrom", err))
			}
			matters = s.matters(b[:n]) || matters
		}
	}
	const set = "{ type mark; flags dynamic, timeout; }"
	for _, step := range []struct {
		change  string
		matters bool
	}{
		{"add table netdev timed", true},
		{"add set netdev timed s " + set, true},
		{"add table ip other; add set ip other s " + set, true},
		{"add element netdev timed s { 1 timeout 1h }", false},
		{"add element netdev timed s { 2 timeout 1h, 3 timeout 1h }; delete element netdev timed s { 1 }", false},
		{"flush set netdev timed s; add element netdev timed s { 1 timeout 1h }", false},
		{"flush set netdev timed s", false},
		{"flush set netdev timed s", false},
		{"add element netdev timed s { 1 }; add element ip other s { 1 }", true},
		{"delete element ip other s { 1 }; delete element netdev timed s { 1 }", true},
		{"add element ip other s { 1 }", true},
		{"add element netdev timed s { 1 }", false},
		{"add chain netdev timed c", true},
		{"add rule netdev timed c accept", true},
		{"add element netdev timed s { 4 }; add rule netdev timed c drop", true},
		{"flush chain netdev timed c", true},
		{"delete set ip other s", true},
		{"delete table netdev timed", true},
	} {
		if out, err := exec.Command("nft", step.change).CombinedOutput(); err != nil {
			t.Fatalf("nft %s: %v\n%s", step.change, err, out)
		}
		if got := matters(); got != step.matters {
			t.Errorf("%s: matters: %v, want %v", step.change, got, step.matters)
		}
	}
	generation := []byte{16, 0, 0, 0, unix.NFT_MSG_NEWGEN, unix.NFNL_SUBSYS_NFTABLES, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if !s.matters(generation) {
		t.Error("a generation whose messages are lost does not matter")
	}
}
