package nft

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
)

// ForeignDrops describes the chains of other programs that redirected packets traverse and
// that drop, by their policy, what their rules do not accept. Those of legacy iptables are
// not in nf_tables.
func ForeignDrops() ([]string, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nfnetlink socket: %w", err)
	}
	chains, err := conn.ListChains()
	if missing(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	names := map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet"}
	hooks := []*nftables.ChainHook{nftables.ChainHookPrerouting, nftables.ChainHookForward, nftables.ChainHookPostrouting}
	var found []string
	for _, c := range chains {
		family, crosses := names[c.Table.Family]
		own := slices.Contains([]string{tableName, guardName, limitsName}, c.Table.Name)
		at := func(h *nftables.ChainHook) bool { return c.Hooknum != nil && *c.Hooknum == *h }
		if crosses && !own && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop && slices.ContainsFunc(hooks, at) {
			found = append(found, fmt.Sprintf("chain %s of table %s %s", c.Name, family, c.Table.Name))
		}
	}
	return found, nil
}
