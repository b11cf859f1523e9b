package nstest

import "os"

// Coverage returns the variable GOCOVERDIR, NAME=VALUE, if it is set (make cover). A test
// adds it to the environment of a copy of its binary that it runs as a program: the copy
// then writes its coverage counters into that directory when it exits
// (https://go.dev/doc/build-cover).
func Coverage() []string {
	if directory := os.Getenv("GOCOVERDIR"); directory != "" {
		return []string{"GOCOVERDIR=" + directory}
	}
	return nil
}
