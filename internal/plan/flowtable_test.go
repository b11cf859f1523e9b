package plan

import (
	"reflect"
	"slices"
	"testing"

	"github.com/egress-router/egress-router/internal/spec"
)

// The flowtable comes behind all rules, once, and one of an earlier configuration goes before
// anything else changes.
func TestFlowtableIsLast(t *testing.T) {
	r := spec.Router{Egress: "macvlan0", Cluster: "eth0", Forward: true, ReplyMark: spec.DefaultReplyMark, Flowtable: spec.FlowtableAuto}
	want := WantOf(r)
	if f := want.Flowtable; f == nil || f.Cluster != "eth0" || f.Egress != "macvlan0" || f.Mark != uint32(spec.DefaultReplyMark) {
		t.Fatalf("flowtable %+v", f)
	}
	r.Forward = false
	if f := WantOf(r).Flowtable; f != nil {
		t.Errorf("flowtable of a proxy: %+v", f)
	}
	stages := func(want Want, have Have, kind Step) (found []Stage) {
		for _, g := range Steps(want, have) {
			if slices.ContainsFunc(g.Steps, func(s Step) bool { return reflect.TypeOf(s) == reflect.TypeOf(kind) }) {
				found = append(found, g.Stage)
			}
		}
		return found
	}
	have := Have{Differs: []string{"rules"}, Flowtable: []string{"missing"}}
	if found := stages(want, have, Offload{}); !slices.Equal(found, []Stage{Rules}) {
		t.Errorf("loaded in the stages %v, want %v", found, Rules)
	}
	have.Offloads = true
	if found := stages(want, have, Offload{}); found != nil {
		t.Errorf("loaded again in the stages %v", found)
	}
	have.Offloads, want.Flowtable = false, nil
	if found := stages(want, have, RemoveFlowtable{}); !slices.Equal(found, []Stage{Guard}) {
		t.Errorf("removed in the stages %v, want %v", found, Guard)
	}
	if all := Remove(want, have, State{}); len(all) == 0 || all[0] != (RemoveFlowtable{}) {
		t.Errorf("steps %v, want the flowtable removed first", all)
	}
}
