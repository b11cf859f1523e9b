package nstest

import "os"

// Environment returns, NAME=VALUE, the variables of a test binary that a copy of it needs
// when a test runs the copy as a program, as far as they are set: GOCOVERDIR, the directory
// to which it writes its coverage counters (https://go.dev/doc/build-cover), and GORACE,
// the options of the race detector (https://go.dev/doc/articles/race_detector).
func Environment() []string {
	var variables []string
	for _, name := range []string{"GOCOVERDIR", "GORACE"} {
		if value := os.Getenv(name); value != "" {
			variables = append(variables, name+"="+value)
		}
	}
	return variables
}
