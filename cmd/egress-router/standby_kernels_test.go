//go:build kernels

package main

import "testing"

// Associations of SCTP live through a take-over as connections of TCP do.
func TestStandbyCarriesSCTP(t *testing.T) { carries(t, "sctp") }
