package config

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egress-router/egress-router/internal/spec"
)

// standingBy returns a valid environment of a router that is one of several.
func standingBy() Environment {
	env := good()
	env.Mode, env.Standby, env.StandbyPeers, env.StandbyKeyFile = "legacy", "true", "routers.egress", "/key"
	return env
}

// keyFile returns the content of the file with the key.
func keyFile(string) ([]byte, error) { return []byte("0123456789abcdef0123\n"), nil }

func TestStandby(t *testing.T) {
	gateway := netip.MustParseAddr("192.168.12.1")
	plain := spec.Standby{Interval: 20 * time.Millisecond, Port: 9467, Witness: gateway, Fence: spec.FenceAuto}
	peers := Peers{Names: []string{"routers.egress"}, Priority: 100, Key: []byte("0123456789abcdef0123")}
	for name, test := range map[string]struct {
		change func(*Environment)
		want   func(*spec.Standby, *Peers)
	}{
		"defaults":      {func(*Environment) {}, func(*spec.Standby, *Peers) {}},
		"monitor":       {func(e *Environment) { e.Mode = "monitor" }, func(*spec.Standby, *Peers) {}},
		"some peers":    {func(e *Environment) { e.StandbyPeers = "10.0.0.1, 10.0.0.2 a.b." }, func(_ *spec.Standby, p *Peers) { p.Names = []string{"10.0.0.1", "10.0.0.2", "a.b."} }},
		"priority":      {func(e *Environment) { e.StandbyPriority = "0" }, func(_ *spec.Standby, p *Peers) { p.Priority = 0 }},
		"interval":      {func(e *Environment) { e.StandbyInterval = "10ms" }, func(s *spec.Standby, _ *Peers) { s.Interval = 10 * time.Millisecond }},
		"long interval": {func(e *Environment) { e.StandbyInterval = "1s" }, func(s *spec.Standby, _ *Peers) { s.Interval = time.Second }},
		"witness":       {func(e *Environment) { e.StandbyWitness = "203.0.113.1" }, func(s *spec.Standby, _ *Peers) { s.Witness = netip.MustParseAddr("203.0.113.1") }},
		"the gateway":   {func(e *Environment) { e.StandbyWitness = "192.168.12.1" }, func(*spec.Standby, *Peers) {}},
		"API server":    {func(e *Environment) { e.APIServer = "10.96.0.1:443" }, func(_ *spec.Standby, p *Peers) { p.Reference = "10.96.0.1:443" }},
		"no reference":  {func(e *Environment) { e.APIServer, e.StandbyReference = "10.96.0.1:443", "none" }, func(*spec.Standby, *Peers) {}},
		"a reference":   {func(e *Environment) { e.StandbyReference = "[2001:db8::1]:6443" }, func(_ *spec.Standby, p *Peers) { p.Reference = "[2001:db8::1]:6443" }},
		"endpoints": {func(e *Environment) {
			e.APIServer, e.StandbyEndpoints, e.StandbyReference = "10.96.0.1:443", "egress", "none"
		}, func(_ *spec.Standby, p *Peers) { p.Endpoints, p.APIServer = "egress", "10.96.0.1:443" }},
		"carry": {func(e *Environment) {
			e.StandbyPeers, e.StandbyCarry = "10.0.0.1,10.0.0.2", "vxlan"
		}, func(s *spec.Standby, p *Peers) {
			p.Names, s.Carry = []string{"10.0.0.1", "10.0.0.2"}, &spec.Carry{}
		}},
		"carry below main": {func(e *Environment) { e.StandbyCarry, e.StandbyPorts, e.ReplyTable = "vxlan", "2000-2001", "237" }, func(s *spec.Standby, _ *Peers) {
			s.Carry = &spec.Carry{First: 2000, Last: 2001}
		}},
		"no carry":       {func(e *Environment) { e.StandbyCarry = "off" }, func(*spec.Standby, *Peers) {}},
		"carry by ports": {func(e *Environment) { e.StandbyCarry, e.StandbyPorts = "vxlan", "2000-2001" }, func(s *spec.Standby, _ *Peers) { s.Carry = &spec.Carry{First: 2000, Last: 2001} }},
		"carry by index": {func(e *Environment) { e.StandbyCarry, e.StandbyPorts = "vxlan", "1/2" }, func(s *spec.Standby, _ *Peers) { s.Carry = &spec.Carry{First: 33280, Last: 65535} }},
		"fence":          {func(e *Environment) { e.StandbyFence = "require" }, func(s *spec.Standby, _ *Peers) { s.Fence = spec.FenceRequire }},
	} {
		t.Run(name, func(t *testing.T) {
			env, s, p := standingBy(), plain, peers
			test.change(&env)
			test.want(&s, &p)
			c, err := Parse(env, keyFile)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&s, c.Standby, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
			if diff := cmp.Diff(p, c.Peers); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
			if len(c.Warnings) > 0 {
				t.Errorf("warnings %q", c.Warnings)
			}
		})
	}
}

// Helpers open connections whose source port no rule sets: with a tunnel that is pointed out.
func TestCarryHelpers(t *testing.T) {
	env := standingBy()
	env.StandbyCarry, env.StandbyPorts, env.Helpers = "vxlan", "0/2", "ftp"
	c, err := Parse(env, keyFile)
	if err != nil || len(c.Warnings) != 1 || !strings.HasPrefix(c.Warnings[0], "EGRESS_HELPERS with EGRESS_STANDBY_CARRY=vxlan: ") {
		t.Errorf("%v, warnings %q", err, c.Warnings)
	}
}

// The rules of a tunnel see each packet: there is no flowtable with it.
func TestCarryWithoutFlowtable(t *testing.T) {
	env := standingBy()
	env.StandbyCarry, env.StandbyPorts, env.Flowtable = "vxlan", "0/2", "auto"
	c, err := Parse(env, keyFile)
	const warning = "EGRESS_FLOWTABLE=auto has no effect with EGRESS_STANDBY_CARRY=vxlan, which has rules for each packet"
	if err != nil || c.Flowtable != spec.FlowtableOff || !slices.Equal(c.Warnings, []string{warning}) {
		t.Errorf("%v, flowtable %q, warnings %q", err, c.Flowtable, c.Warnings)
	}
	env.Flowtable = "require"
	if _, err := Parse(env, keyFile); err == nil || !strings.HasSuffix(err.Error(), "EGRESS_FLOWTABLE=require is not possible with EGRESS_STANDBY_CARRY=vxlan, which has rules for each packet") {
		t.Error(err)
	}
	env.StandbyCarry, env.StandbyPorts = "", ""
	if c, err := Parse(env, keyFile); err != nil || c.Flowtable != spec.FlowtableRequire {
		t.Errorf("without a tunnel: %v, %q", err, c.Flowtable)
	}
}

// Without EGRESS_STANDBY nothing changes, and the other variables are pointed out.
func TestStandbyOff(t *testing.T) {
	for _, value := range []string{"", "false"} {
		env := standingBy()
		env.Standby = value
		c, err := Parse(env, keyFile)
		if err != nil || c.Standby != nil || len(c.Peers.Names) > 0 {
			t.Errorf("%q: %+v, %+v, %v", value, c.Standby, c.Peers, err)
		}
		var want []string
		if value == "" {
			want = []string{"EGRESS_STANDBY_PEERS has no effect without EGRESS_STANDBY=true", "EGRESS_STANDBY_KEY_FILE has no effect without EGRESS_STANDBY=true"}
		}
		if diff := cmp.Diff(want, c.Warnings); diff != "" {
			t.Errorf("%q: warnings: - want, + got:\n%s", value, diff)
		}
	}
}

// TestStandbyWithoutKey warns of heartbeats that anybody can send.
func TestStandbyWithoutKey(t *testing.T) {
	env := standingBy()
	env.StandbyKeyFile = ""
	c, err := Parse(env, keyFile)
	if err != nil || c.Peers.Key != nil || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "EGRESS_STANDBY_KEY_FILE") {
		t.Errorf("key %q, warnings %q, %v", c.Peers.Key, c.Warnings, err)
	}
	for peers, want := range map[string]string{
		"routers.egress":          "heartbeats are not authenticated: any pod that reaches UDP port 9467 can end the service of this address; set EGRESS_STANDBY_KEY_FILE",
		"10.0.0.1,routers.egress": "heartbeats are not authenticated: any pod that reaches UDP port 9467 can end the service of this address; set EGRESS_STANDBY_KEY_FILE",
		"10.0.0.1,10.0.0.2":       "heartbeats are not authenticated: a pod that has or forges an address of EGRESS_STANDBY_PEERS can end the service of this address, or any pod if only this router's is there; set EGRESS_STANDBY_KEY_FILE",
	} {
		env.StandbyPeers = peers
		c, err := Parse(env, keyFile)
		if diff := cmp.Diff([]string{want}, c.Warnings); diff != "" || err != nil {
			t.Errorf("peers %s: %v, warnings (-want +got):\n%s", peers, err, diff)
		}
	}
}

func TestStandbyFaults(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*Environment)
		want   string
	}{
		"no boolean":           {func(e *Environment) { e.Standby = "maybe" }, "EGRESS_STANDBY "},
		"init":                 {func(e *Environment) { e.Mode = "init" }, "EGRESS_STANDBY=true is not possible in mode init, which ends at once: standing by takes a process that stays"},
		"proxy":                {func(e *Environment) { e.Mode = "http-proxy" }, "EGRESS_STANDBY=true is not possible in mode http-proxy"},
		"no peers":             {func(e *Environment) { e.StandbyPeers = " ," }, "EGRESS_STANDBY_PEERS is not set: a router that stands by needs to know the others"},
		"a peer with port":     {func(e *Environment) { e.StandbyPeers = "10.0.0.1:9467" }, `EGRESS_STANDBY_PEERS "10.0.0.1:9467" is neither an address nor a name: it contains ':'`},
		"an empty label":       {func(e *Environment) { e.StandbyPeers = "a..b" }, `EGRESS_STANDBY_PEERS "a..b" is neither an address nor a name: a label is empty`},
		"a dash":               {func(e *Environment) { e.StandbyPeers = "-a" }, `EGRESS_STANDBY_PEERS "-a" is neither an address nor a name: a label begins with -`},
		"a dash at the end":    {func(e *Environment) { e.StandbyPeers = "a-.b" }, `EGRESS_STANDBY_PEERS "a-.b" is neither an address nor a name: a label ends with -`},
		"a long label":         {func(e *Environment) { e.StandbyPeers = strings.Repeat("a", 64) }, "a label has more than 63 bytes"},
		"a long name":          {func(e *Environment) { e.StandbyPeers = strings.Repeat("a.", 127) + "b" }, "it has more than 253 bytes"},
		"short interval":       {func(e *Environment) { e.StandbyInterval = "9ms" }, `EGRESS_STANDBY_INTERVAL "9ms" is out of range: expected 10ms to 1s, in whole milliseconds`},
		"long interval":        {func(e *Environment) { e.StandbyInterval = "2s" }, `EGRESS_STANDBY_INTERVAL "2s" is out of range: expected 10ms to 1s, in whole milliseconds`},
		"a fraction":           {func(e *Environment) { e.StandbyInterval = "15500us" }, `EGRESS_STANDBY_INTERVAL "15500us" is out of range: expected 10ms to 1s, in whole milliseconds`},
		"no interval":          {func(e *Environment) { e.StandbyInterval = "20" }, "EGRESS_STANDBY_INTERVAL "},
		"a large priority":     {func(e *Environment) { e.StandbyPriority = "256" }, `EGRESS_STANDBY_PRIORITY "256" is not a priority: expected a number from 0 to 255`},
		"an odd priority":      {func(e *Environment) { e.StandbyPriority = "007" }, `EGRESS_STANDBY_PRIORITY "007" is not a priority: expected a number from 0 to 255`},
		"no address":           {func(e *Environment) { e.StandbyWitness = "gateway" }, `EGRESS_STANDBY_WITNESS "gateway" is not an address`},
		"another family":       {func(e *Environment) { e.StandbyWitness = "2001:db8::1" }, "EGRESS_STANDBY_WITNESS 2001:db8::1 is not of the family of 192.168.12.99, the first reserved address"},
		"the reserved address": {func(e *Environment) { e.StandbyWitness = "192.168.12.99" }, "EGRESS_STANDBY_WITNESS 192.168.12.99 is a reserved address: expected the gateway, or a host beyond it"},
		"a neighbour":          {func(e *Environment) { e.StandbyWitness = "192.168.12.7" }, "EGRESS_STANDBY_WITNESS 192.168.12.7 is in the subnet of the reserved address and not the gateway"},
		"no port":              {func(e *Environment) { e.StandbyReference = "10.96.0.1" }, `EGRESS_STANDBY_REFERENCE "10.96.0.1" is not an address and a port: expected such as 10.96.0.1:443, or none`},
		"two labels":           {func(e *Environment) { e.APIServer, e.StandbyEndpoints = "10.96.0.1:443", "a.b" }, `EGRESS_STANDBY_ENDPOINTS "a.b" is not the name of a Service`},
		"another carry":        {func(e *Environment) { e.StandbyCarry = "yes" }, "EGRESS_STANDBY_CARRY "},
		"carry with names":     {func(e *Environment) { e.StandbyCarry = "vxlan" }, `EGRESS_STANDBY_PORTS is not set, and EGRESS_STANDBY_PEERS "routers.egress" is a name`},
		"carry with its mark":  {func(e *Environment) { e.StandbyCarry, e.StandbyPorts, e.ReplyMark = "vxlan", "0/2", "0x01000000" }, "EGRESS_STANDBY_CARRY=vxlan marks packets with the bits 0xf000000"},
		"its port": {func(e *Environment) {
			e.StandbyCarry, e.StandbyPorts, e.Destination = "vxlan", "0/2", "9468 udp 203.0.113.1"
		}, "by UDP port 9468, which is also a local port"},
		"carry over main":  {func(e *Environment) { e.StandbyCarry, e.StandbyPorts, e.ReplyTable = "vxlan", "0/2", "238" }, "EGRESS_STANDBY_CARRY=vxlan uses the routing tables 239 to 253"},
		"carry to the end": {func(e *Environment) { e.StandbyCarry, e.StandbyPorts, e.ReplyTable = "vxlan", "0/2", "2147483640" }, "EGRESS_STANDBY_CARRY=vxlan uses the routing tables 2147483641 to"},
		"ports reversed":   {func(e *Environment) { e.StandbyCarry, e.StandbyPorts = "vxlan", "3000-2000" }, `EGRESS_STANDBY_PORTS "3000-2000" is not a range of ports: expected more than one port, from 1024 to 65535`},
		"low ports":        {func(e *Environment) { e.StandbyCarry, e.StandbyPorts = "vxlan", "1023-2000" }, "expected more than one port, from 1024"},
		"one port":         {func(e *Environment) { e.StandbyCarry, e.StandbyPorts = "vxlan", "2000" }, "expected two numbers"},
		"odd ports":        {func(e *Environment) { e.StandbyCarry, e.StandbyPorts = "vxlan", "02000-3000" }, "expected two numbers"},
		"index of none":    {func(e *Environment) { e.StandbyCarry, e.StandbyPorts = "vxlan", "2/2" }, "the index of a part is less than their number, which is at most 15"},
		"many parts":       {func(e *Environment) { e.StandbyCarry, e.StandbyPorts = "vxlan", "0/16" }, "the index of a part is less than their number, which is at most 15"},
		"another fence":    {func(e *Environment) { e.StandbyFence = "yes" }, "EGRESS_STANDBY_FENCE "},
	} {
		t.Run(name, func(t *testing.T) {
			env := standingBy()
			test.change(&env)
			_, err := Parse(env, keyFile)
			var faults Errors
			if !errors.As(err, &faults) || len(faults) != 1 || !strings.Contains(faults[0].Sentence, test.want) {
				t.Errorf("expected %q, found %v", test.want, err)
			}
		})
	}
	for name, read := range map[string]func(string) ([]byte, error){
		`EGRESS_STANDBY_KEY_FILE "/key" cannot be read: no such file`:       func(string) ([]byte, error) { return nil, errors.New("no such file") },
		`EGRESS_STANDBY_KEY_FILE "/key" has 15 bytes: expected at least 16`: func(string) ([]byte, error) { return []byte("0123456789abcde\n"), nil },
	} {
		if _, err := Parse(standingBy(), read); err == nil || !strings.HasSuffix(err.Error(), name) {
			t.Errorf("expected %q, found %v", name, err)
		}
	}
}

// Routers with the same addresses of all, or of all others, have disjoint parts of all ports.
func TestPlaceCarry(t *testing.T) {
	all := []string{"10.0.0.3", "10.0.0.1", "10.0.0.2"}
	var found []spec.Carry
	for i, own := range all {
		for _, peers := range [][]string{all, append(append([]string{}, all[:i]...), all[i+1:]...)} {
			env := standingBy()
			env.StandbyCarry, env.StandbyPeers = "vxlan", strings.Join(peers, ",")
			c, err := Parse(env, keyFile)
			if err != nil {
				t.Fatal(err)
			}
			before := c
			c.PlaceCarry(netip.MustParseAddr(own))
			if before.Standby.Carry.First != 0 {
				t.Error("a copy has changed")
			}
			found = append(found, *c.Standby.Carry)
		}
	}
	want := []spec.Carry{{First: 44032, Last: 65535}, {First: 44032, Last: 65535}, {First: 1024, Last: 22527}, {First: 1024, Last: 22527}, {First: 22528, Last: 44031}, {First: 22528, Last: 44031}}
	if diff := cmp.Diff(want, found); diff != "" {
		t.Errorf("- want, + got:\n%s", diff)
	}
}

// An interval without a unit is one of milliseconds: seconds are out of range.
func TestIntervalHint(t *testing.T) {
	env := standingBy()
	env.StandbyInterval = "20"
	_, err := Parse(env, keyFile)
	var faults Errors
	if !errors.As(err, &faults) || len(faults) != 1 || !strings.Contains(faults[0].Hint, "write 20ms for 20 milliseconds") {
		t.Errorf("expected a hint at 20ms, found %v", err)
	}
}
