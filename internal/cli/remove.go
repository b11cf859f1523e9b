package cli

import (
	"context"

	"github.com/egress-router/egress-router/internal/config"
)

// runRemove takes out of the namespace what runs with the same variables have put there.
func runRemove(ctx context.Context, p Process) error {
	c, err := parse(p)
	if err != nil {
		return err
	}
	if c.Mode == config.UnitTest {
		return nil // it puts nothing there
	}
	if err := checkPrivilege(c); err != nil {
		return err
	}
	log := logger(p.Stderr, c.Log)
	return advised(newRouter(c, log).Remove(ctx, nil))
}
