package cli

import (
	"fmt"
	"log/slog"
	"strings"

	"github.com/egress-router/egress-router/internal/config"
	"github.com/egress-router/egress-router/internal/link"
	"github.com/egress-router/egress-router/internal/netns"
)

// A nic is the egress interface or the NIC below it.
type nic struct {
	text     string // its name, and the kind of a parent
	name     string
	counters []link.Counter // of dropped frames and of errors
}

type nics []nic

// nicsOf returns the egress interface, and the NIC below a macvlan as far as this process may
// look there: in the same namespace, on a node, and in a pod with the host's processes.
func nicsOf(kernel *link.Kernel, c config.Config, look link.Look, log *slog.Logger) nics {
	counters, err := kernel.Troubles(c.Egress)
	all := nics{{c.Egress, c.Egress, counters}}
	var parent nic
	switch {
	case err != nil || look.Mode == "":
	case look.Parent != "":
		parent.text = look.Parent
		parent.name, _, _ = strings.Cut(parent.text, " ")
		parent.counters, err = kernel.Troubles(parent.name)
	default:
		parent, err = parentOnHost(kernel, c)
	}
	if parent.text != "" {
		all = append(all, parent)
	}
	log.Debug("interfaces", "interface", c.Egress, "parent", parent.text, "error", err)
	return all
}

// parentOnHost returns the NIC of the host below the egress interface.
func parentOnHost(kernel *link.Kernel, c config.Config) (parent nic, err error) {
	file := config.DefaultHostNetns
	if c.Macvlan != nil {
		file = c.Macvlan.HostNetns
	}
	host, err := netns.Open(file)
	if err != nil {
		return parent, err
	}
	defer host.Close()
	err = host.Do(func() error {
		there, err := link.Open()
		if err != nil {
			return err
		}
		defer there.Close()
		if parent.text, err = kernel.ParentIn(there, host.Fd(), c.Egress); err != nil || parent.text == "" {
			return err
		}
		parent.name, _, _ = strings.Cut(parent.text, " ")
		parent.counters, err = there.Troubles(parent.name)
		return err
	})
	return parent, err
}

// troubles returns the counters for people, such as "nic0 rx_missed_errors 12".
func (n nics) troubles() (texts []string) {
	for _, one := range n {
		for _, c := range one.counters {
			texts = append(texts, fmt.Sprintf("%s %s %d", one.name, c.Name, c.Value))
		}
	}
	return texts
}
