package router

// What tests from outside compare with.
const (
	FirstPause   = firstPause
	LongestPause = longestPause
)
