package router

// For tests of package router_test.
const (
	FirstPause   = firstPause
	LongestPause = longestPause
)

// CheckGateway is for tests of package router_test.
var CheckGateway = checkGateway
