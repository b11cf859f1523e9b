package router

// For tests of package router_test.
var MissingTranslator = missingTranslator

const (
	FirstPause   = firstPause
	LongestPause = longestPause
)
