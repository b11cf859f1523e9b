package controller

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/render"
	"github.com/egress-router/egress-router/internal/object"
)

// router returns the claim of a router of an age in seconds: names it has already, and
// the address of its attachment, empty if it has none.
func router(name string, age int, n names, wanted, has string, change ...func(*claim)) claim {
	c := claim{EgressRouter: &api.EgressRouter{}, names: n}
	c.Namespace, c.Name, c.UID = "egress", name, types.UID(name)
	c.CreationTimestamp = metav1.NewTime(time.Unix(int64(100000-age), 0))
	c.Spec.Addresses = []object.Address{{IP: wanted + "/24"}}
	if has != "" {
		c.has = []reservation{{address: netip.MustParseAddr(has)}}
	}
	for _, f := range change {
		f(&c)
	}
	return c
}

func deleting(c *claim)  { c.DeletionTimestamp = new(metav1.Now()) }
func elsewhere(c *claim) { c.Namespace = "other" }

// onMaster sets the NIC of a resource, and of its attachment.
func onMaster(name string) func(*claim) {
	return func(c *claim) {
		runsOn(name)(c)
		c.Spec.NetworkInterface.Macvlan.Master = name
	}
}

// runsOn sets the NIC of an attachment alone, whose resource has another one by now.
func runsOn(name string) func(*claim) {
	return func(c *claim) {
		for i := range c.has {
			c.has[i].master = name
		}
	}
}

func TestNamesFor(t *testing.T) {
	const a, b = "192.168.12.1", "192.168.12.2"
	for _, test := range []struct {
		name   string
		router claim
		other  claim
		frozen bool
	}{
		{"older", router("x", 9, none, a, ""), router("y", 1, none, b, ""), true},
		{"younger", router("x", 1, none, a, ""), router("y", 9, none, b, ""), false},
		{"same second, first by name", router("x", 1, none, a, ""), router("y", 1, none, b, ""), true},
		{"same second, second by name", router("y", 1, none, a, ""), router("x", 1, none, b, ""), false},
		{"older, but the other one has the names", router("x", 9, none, a, ""), router("y", 1, first, b, b), false},
		{"has the names, and the other one is older", router("x", 1, first, a, a), router("y", 9, none, b, ""), true},
		{"has others, and the frozen ones are free", router("x", 9, further, a, a), router("y", 1, none, b, ""), false},
		{"new, and the frozen ones are free", router("x", 1, none, a, ""), router("y", 9, further, b, b), true},
		{"the older one is being deleted, without objects", router("x", 1, none, a, ""), router("y", 9, none, b, "", deleting), true},
		{"the older one is being deleted, with objects", router("x", 1, none, a, ""), router("y", 9, first, b, b, deleting), false},
		{"the older one is in another namespace", router("x", 1, none, a, ""), router("y", 9, first, b, b, elsewhere), true},
	} {
		t.Run(test.name, func(t *testing.T) {
			want := render.Further(test.router.Name)
			if test.frozen {
				want = render.First()
			}
			if found := namesFor(test.router, []claim{test.other, test.router}); found != want {
				t.Errorf("want %+v, found %+v", want, found)
			}
		})
	}
}

func TestHolder(t *testing.T) {
	const a, b = "192.168.12.1", "192.168.12.2"
	for _, test := range []struct {
		name          string
		router, other claim
		held          bool
	}{
		{"another address", router("x", 1, none, a, ""), router("y", 9, none, b, ""), false},
		{"older", router("x", 9, none, a, ""), router("y", 1, none, a, ""), false},
		{"younger", router("x", 1, none, a, ""), router("y", 9, none, a, ""), true},
		{"younger, other namespace", router("x", 1, none, a, ""), router("y", 9, none, a, "", elsewhere), true},
		{"younger, other NIC", router("x", 1, none, a, "", onMaster("eth1")), router("y", 9, none, a, "", onMaster("eth2")), false},
		{"younger, a NIC that the node chooses", router("x", 1, none, a, "", onMaster("eth1")), router("y", 9, none, a, ""), true},
		{"older, but the other one runs with it", router("x", 9, first, a, b), router("y", 1, first, a, a), true},
		{"runs with it, and an older one wants it", router("x", 1, first, a, a), router("y", 9, first, a, b), false},
		{"both have it, older", router("x", 9, first, a, a), router("y", 1, first, a, a), false},
		{"both have it, younger", router("x", 1, first, a, a), router("y", 9, first, a, a), true},
		{"older, comes to the NIC on which the other one runs", router("x", 9, first, a, a, onMaster("eth1"), runsOn("eth2")), router("y", 1, first, a, a, onMaster("eth1")), true},
		{"runs with it, and an older one comes to its NIC", router("x", 1, first, a, a, onMaster("eth1")), router("y", 9, first, a, a, onMaster("eth1"), runsOn("eth2")), false},
		{"older, leaves the NIC to the node, which may choose that of the other one", router("x", 9, first, a, a, runsOn("eth2")), router("y", 1, first, a, a, onMaster("eth1")), true},
		{"younger, names the NIC that the node has chosen", router("x", 1, first, a, a, onMaster("eth1"), runsOn("")), router("y", 9, none, a, ""), false},
		{"the other one still runs on the NIC, and wants another one", router("x", 9, none, a, "", onMaster("eth1")), router("y", 1, first, a, a, onMaster("eth2"), runsOn("eth1")), true},
		{"the other one still has it, and wants another one", router("x", 9, first, a, b), router("y", 1, first, b, a), true},
		{"the other one is being deleted, without objects", router("x", 1, none, a, ""), router("y", 9, none, a, "", deleting), false},
		{"the other one is being deleted, with objects", router("x", 1, none, a, ""), router("y", 9, first, a, a, deleting), true},
	} {
		t.Run(test.name, func(t *testing.T) {
			other, _ := holder(test.router, []claim{test.other, test.router})
			if (other != nil) != test.held {
				t.Errorf("want held %v, found %v", test.held, other)
			}
		})
	}
}

// Of routers with the same address exactly one has it, whatever their ages and objects.
func TestOneHolder(t *testing.T) {
	const a, b = "192.168.12.1", "192.168.12.2"
	var kinds []func(name string) claim
	for age := range 2 {
		for _, has := range []string{"", a, b} {
			kinds = append(kinds, func(name string) claim { return router(name, age, none, a, has) })
		}
	}
	for i, x := range kinds {
		for j, y := range kinds {
			all := []claim{x("x"), y("y")}
			one, _ := holder(all[0], all)
			two, _ := holder(all[1], all)
			if (one == nil) == (two == nil) {
				t.Error(fmt.Sprint(i, j, ": ", one != nil, two != nil))
			}
		}
	}
}

// Two routers never get the same address on the same NIC, whatever their NICs were and are.
func TestNeverTwoHolders(t *testing.T) {
	const a = "192.168.12.1"
	masters := []string{"", "eth1", "eth2"}
	var kinds []func(name string) claim
	for age := range 2 {
		for _, want := range masters {
			kinds = append(kinds, func(name string) claim { return router(name, age, none, a, "", onMaster(want)) })
			for _, has := range masters {
				kinds = append(kinds, func(name string) claim { return router(name, age, first, a, a, onMaster(want), runsOn(has)) })
			}
		}
	}
	for i, x := range kinds {
		for j, y := range kinds {
			all := []claim{x("x"), y("y")}
			if len(all[0].has) > 0 && slices.ContainsFunc(all[1].has, all[0].has[0].meets) {
				continue // both have it already
			}
			after := slices.Clone(all)
			for k := range all { // one after the other, as the operator reconciles them
				if other, _ := holder(after[k], after); other == nil {
					after[k].has = wanted(after[k].EgressRouter)
				}
			}
			if len(after[0].has) > 0 && slices.ContainsFunc(after[1].has, after[0].has[0].meets) {
				t.Errorf("%d, %d: %+v and %+v, before %+v and %+v", i, j, after[0].has, after[1].has, all[0].has, all[1].has)
			}
		}
	}
}
