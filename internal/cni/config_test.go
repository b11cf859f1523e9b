package cni

import (
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

// Whatever is on stdin, the plugin describes a router that rules can be made of, or has an
// error with a code.
func FuzzConfig(f *testing.F) {
	for _, text := range []string{
		"", "{}", `{"cniVersion": "0.4.0", "name": "x", "ip": {"addresses": ["192.168.12.99/24"], "gateway": "192.168.12.1", "destinations": ["80 TCP 203.0.113.25/30 81"], "fallbackIP": "203.0.113.27"}}`,
		`{"cniVersion": "1.1.0", "name": "x", "interfaceArgs": {"mtu": 1400}, "ip": {"gateway": ["fe80::1"], "addresses": ["2001:db8:12::99/64"], "destinations": ["80 SCTP 2001:db8::25", "80 sctp 2001:db8::26"]}, "runtimeConfig": {"mac": "0a:58:c0:a8:0c:63"}}`,
		`{"cniVersion": "1.1.0", "name": "x", "ip": {}, "prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "net1", "sandbox": "/x"}], "ips": [{"address": "192.168.12.99/24", "gateway": "192.168.12.1", "interface": 0}]}}`,
		`{"cniVersion": "1.0.0", "name": "x", "ip": {}, "prevResult": {"interfaces": [{"name": "net1", "sandbox": "/x"}, null], "ips": [{"address": null, "interface": 0}, null]}}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, adjusts := range []bool{false, true} {
			c := &call{ifname: "net1", adjusts: adjusts}
			err := c.parse(text)
			if err == nil {
				d, _, faults := c.describe()
				if err = faults; err == nil {
					if err := c.want(d.Router, nil, "eth0").Rules.Validate(); err != nil {
						t.Errorf("%q: %v", text, err)
					}
					continue
				}
			}
			if e := failure(err); e.Msg == "" || e.Code != types.ErrDecodingFailure && e.Code != types.ErrInvalidNetworkConfig && e.Code != types.ErrIncompatibleCNIVersion {
				t.Errorf("%q: error %d %q", text, e.Code, e.Msg)
			}
		}
	})
}
