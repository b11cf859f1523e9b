package router

// For tests of package router_test.
const (
	FirstPause   = firstPause
	LongestPause = longestPause
)
