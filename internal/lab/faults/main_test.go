package faults_test

import (
	"testing"

	"github.com/egress-router/egress-router/internal/lab/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }
