package nstest

import "os"

// longVariable selects the long variant of the tests. It is an environment
// variable, not a flag: `go test ./... -long` fails in every package that does
// not define the flag.
const longVariable = "EGRESS_TEST_LONG"

// Long reports whether the long variant of the tests runs (`make test-long`,
// which sets EGRESS_TEST_LONG=1). A test has the same checks in both variants,
// and fewer rounds or shorter measurements in the short one.
func Long() bool { return os.Getenv(longVariable) == "1" }
