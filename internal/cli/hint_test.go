package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/router"
)

// Every error of a run has a hint in front of the last line, on lines of their own.
func TestReportHasHint(t *testing.T) {
	for name, test := range map[string]struct {
		err        error
		hint, last string
	}{
		"no hint":          {errors.New("no convergence"), "hint: EGRESS_ROUTER_DEBUG=1 logs every step", "egress-router: no convergence\n"},
		"of several lines": {errors.Join(errors.New("a"), errors.New("b")), "hint: EGRESS_ROUTER_DEBUG=1", "egress-router: a; b\n"},
		"a hint":           {fmt.Errorf("load: %w", &router.UndoError{Err: os.ErrClosed}), "hint: the pod is partly configured", "egress-router: load: roll back changes: file already closed\n"},
		"with variables": {&router.ConflictError{Address: netip.MustParseAddr("192.168.12.99"), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}},
			"hint: stop the host with that hardware address (an older pod that still runs, or another pod with the same EGRESS_SOURCE), or set EGRESS_CONFLICT=warn to take the address anyway\n",
			"egress-router: take reserved address 192.168.12.99: already in use by 02:00:00:00:00:01\n"},
		"permission":                    {os.ErrPermission, "hint: the container ", "egress-router: permission denied\n"},
		"lacks privilege":               {&privilegeError{[]string{"NET_ADMIN"}}, "hint: ", "egress-router: check capabilities: NET_ADMIN missing, operation not permitted\n"},
		"for the host":                  {&privilegeError{[]string{"NET_ADMIN", "SYS_ADMIN"}}, "hint: EGRESS_MACVLAN_PARENT requires", "egress-router: check capabilities: NET_ADMIN, SYS_ADMIN missing, operation not permitted\n"},
		"interrupted":                   {context.Canceled, "", "egress-router: interrupted, changes rolled back\n"},
		"partly rolled back":            {errors.Join(context.Canceled, &router.UndoError{Err: os.ErrClosed}), "hint: the pod is partly configured", "egress-router: context canceled; roll back changes: file already closed\n"},
		"failed and partly rolled back": {errors.Join(&router.ConflictError{}, &router.UndoError{Err: os.ErrClosed}), "hint: the pod is partly configured", "roll back changes: file already closed\n"},
	} {
		text := report(advised(config.Config{}, test.err))
		if !strings.HasPrefix(text, test.hint) || !strings.HasSuffix(text, test.last) || test.hint == "" && text != test.last {
			t.Errorf("%s:\n%s", name, text)
		}
	}
	if advised(config.Config{}, nil) != nil {
		t.Error("no error has a hint")
	}
}
