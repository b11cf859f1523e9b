package cli

import (
	"context"
	"fmt"

	"github.com/egress-router/egress-router/internal/config"
)

// runRemove takes out of the namespace what runs with the same variables have put there, in
// any mode.
func runRemove(ctx context.Context, p Process) error {
	env, err := p.Environment()
	if err != nil {
		return fmt.Errorf("read environment: %w", err)
	}
	// A mode without destinations: they may be invalid, or their file gone.
	env.Mode, env.Standby = string(config.HTTPProxy), ""
	c, err := config.Parse(env, readFile)
	if err != nil {
		return err
	}
	if err := checkPrivilege(c); err != nil {
		return err
	}
	log := logger(p.Stderr, c.Log)
	return advised(c, newRouter(c, log).Remove(ctx, nil))
}
