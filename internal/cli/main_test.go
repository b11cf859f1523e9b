package cli

import (
	"testing"

	"github.com/egress-router/egress-router/internal/netns/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }
