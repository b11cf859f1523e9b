package nft

import (
	"fmt"

	"github.com/google/nftables"
)

// tableLoaded reports whether the kernel has a table. An error begins with "read" and the noun.
func tableLoaded(t *nftables.Table, noun string) (bool, error) {
	there, err := hasTable(t)
	if err != nil {
		return false, fmt.Errorf("read %s: %w", noun, err)
	}
	return there, nil
}

// replaceTable has the kernel have a table with chains of the type filter instead of the one of that
// name, in one transaction. more adds what the rules need besides. An error begins with what.
func replaceTable(t *nftables.Table, chains []gateChain, what string, more func(*batch)) error {
	there, err := hasTable(t)
	if err != nil {
		return fmt.Errorf("%s: read table: %w", what, err)
	}
	var b batch
	if there {
		b.deleteTable(t)
	}
	b.addTable(t)
	more(&b)
	for _, c := range chains {
		b.addChainOf(t, nftables.ChainTypeFilter, c)
		for _, r := range c.rules {
			b.addRule(t, c.name, r)
		}
	}
	if err := b.run(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// removeTable removes a table, if it is there. An error begins with "remove" and the noun.
func removeTable(t *nftables.Table, noun string) error {
	there, err := tableLoaded(t, noun)
	if err != nil || !there {
		return err
	}
	var b batch
	b.deleteTable(t)
	if err := b.run(); err != nil {
		return fmt.Errorf("remove %s: %w", noun, err)
	}
	return nil
}
