package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/egress-router/egress-router/internal/object"
)

// A config is the configuration on stdin.
type config struct {
	object.Attachment
	Conflict      string               `json:"conflict"` // warn, refuse or defend
	DNS           types.DNS            `json:"dns"`
	RuntimeConfig runtimeConfig        `json:"runtimeConfig"`
	RawPrevResult map[string]any       `json:"prevResult"`
	Valid         []types.GCAttachment `json:"cni.dev/valid-attachments"`

	prevResult *types100.Result // nil: none
	listsValid bool             // the list of valid attachments is there
}

// A runtimeConfig has the values of the capabilities mac and ips.
type runtimeConfig struct {
	MAC string   `json:"mac"` // hardware address of the macvlan
	IPs []string `json:"ips"` // instead of ip.addresses
}

// parse reads the configuration.
func (c *call) parse(text []byte) error {
	var v struct {
		CNIVersion any `json:"cniVersion"`
		LogFile    any `json:"log_file"`
		LogLevel   any `json:"log_level"`

		Valid json.RawMessage `json:"cni.dev/valid-attachments"` // nil only if it is missing
	}
	if err := json.Unmarshal(text, &v); err != nil {
		return newError(types.ErrDecodingFailure, "", "decode configuration: %v", err)
	}
	// The log has the error of a key before these.
	c.conf.LogFile, _ = v.LogFile.(string)
	c.conf.LogLevel, _ = v.LogLevel.(string)
	c.conf.listsValid = v.Valid != nil
	switch v := v.CNIVersion.(type) {
	case nil:
		c.version = "0.1.0" // before there was the key
	case string:
		if c.version = v; v == "" {
			c.version = "0.1.0"
		}
	default:
		return newError(types.ErrDecodingFailure, "", "cniVersion is %v: expected a text", v)
	}
	err := json.Unmarshal(text, &c.conf)
	if all := version.All.SupportedVersions(); !slices.Contains(all, c.version) {
		found := c.version
		c.version = version.Current()
		return newError(types.ErrIncompatibleCNIVersion, "", "cniVersion is %q: expected one of %v", found, all)
	}
	if wrong, is := errors.AsType[*json.UnmarshalTypeError](err); is {
		return newError(types.ErrInvalidNetworkConfig, "", "%s is %s: expected %s", strings.TrimPrefix(wrong.Field, "Attachment."), kindOf(wrong.Value), kindOf(wrong.Type.String()))
	}
	if err != nil {
		return newError(types.ErrDecodingFailure, "", "decode configuration: %v", err)
	}
	if invalid := utils.ValidateNetworkName(c.conf.Name); invalid != nil {
		return newError(types.ErrInvalidNetworkConfig, "", "name is %q: expected letters, digits, dots, hyphens and underscores", c.conf.Name)
	}
	if c.conf.RawPrevResult == nil {
		return nil
	}
	if c.conf.prevResult, err = parseResult(c.version, c.conf.RawPrevResult); err != nil {
		return newError(types.ErrDecodingFailure, "", "decode prevResult: %v", err)
	}
	return nil
}

// parseResult reads the result of an earlier plugin. JSON can have a null in place of each of
// its objects, which the types of the specification do not expect.
func parseResult(cniVersion string, raw map[string]any) (r *types100.Result, err error) {
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		list, _ := raw[key].([]any)
		if i := slices.Index(list, nil); i >= 0 {
			return nil, fmt.Errorf("%s[%d] is null: expected an object", key, i)
		}
	}
	previous := types.PluginConf{CNIVersion: cniVersion, RawPrevResult: raw}
	if err := version.ParsePrevResult(&previous); err != nil {
		return nil, err
	}
	return types100.GetResult(previous.PrevResult)
}

// kindOf describes a kind of JSON, or a type of Go, for people.
func kindOf(t string) string {
	kind, _, _ := strings.Cut(t, " ") // a number may follow
	switch kind {
	case "string", "object.Text":
		return "a text"
	case "[]string", "object.Texts":
		return "a list of texts"
	case "uint16":
		return "a port"
	case "bool":
		return "true or false"
	case "number":
		return "a number"
	case "array":
		return "a list"
	case "[]types.GCAttachment":
		return "a list of objects"
	}
	return "an object"
}

// previous returns the index of the pod's interface in prevResult.
func (c *call) previous() (index int, found bool) {
	if c.conf.prevResult == nil {
		return 0, false
	}
	for i, in := range c.conf.prevResult.Interfaces {
		if in.Name == c.ifname && in.Sandbox != "" {
			return i, true
		}
	}
	return 0, false
}

// describe returns the router of the configuration, with the values of capabilities and of
// an earlier plugin.
func (c *call) describe() (object.Description, net.HardwareAddr, error) {
	a := c.conf.Attachment
	if a.IP != nil {
		ip := *a.IP
		a.IP = &ip
		if len(c.conf.RuntimeConfig.IPs) > 0 {
			ip.Addresses = c.conf.RuntimeConfig.IPs
		}
		if index, found := c.previous(); found && c.adjusts && len(ip.Addresses) == 0 {
			ip.Addresses, ip.Gateway = c.given(index, ip.Gateway)
		}
	}
	d, err := a.Description()
	if err != nil {
		return d, nil, err
	}
	var mac net.HardwareAddr
	if text := c.conf.RuntimeConfig.MAC; text != "" {
		// A hardware address of a group has the lowest bit of its first byte (IEEE 802).
		if mac, err = net.ParseMAC(text); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
			return d, nil, newError(types.ErrInvalidNetworkConfig, "", "runtimeConfig.mac is %q: expected the hardware address of one host, for example 0a:58:c0:a8:0c:63", text)
		}
	}
	switch c.conf.Conflict {
	case "", "warn", "refuse", "defend":
	default:
		return d, nil, newError(types.ErrInvalidNetworkConfig, "", "conflict is %q: expected warn, refuse or defend", c.conf.Conflict)
	}
	return d, mac, nil
}

// given returns the addresses that an earlier plugin has given to the interface with an index,
// and their gateways if there are no others.
func (c *call) given(index int, gateways object.Texts) ([]string, object.Texts) {
	var addresses []string
	own := len(gateways) == 0
	for _, ip := range c.conf.prevResult.IPs {
		if ip.Interface == nil || *ip.Interface != index {
			continue
		}
		bits, _ := ip.Address.Mask.Size()
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		addresses = append(addresses, fmt.Sprintf("%s/%d", a.Unmap(), bits))
		if g, valid := netip.AddrFromSlice(ip.Gateway); valid && own {
			gateways = append(gateways, g.Unmap().String())
		}
	}
	return addresses, gateways
}
