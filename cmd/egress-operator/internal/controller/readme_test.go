package controller

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The README lists each reason of a condition once, and no other.
func TestReadmeListsReasons(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "conditions.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	ast.Inspect(file, func(n ast.Node) bool {
		if v, is := n.(*ast.ValueSpec); is && strings.HasPrefix(v.Names[0].Name, "reason") {
			value, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, value)
		}
		return true
	})
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "\n| reason | cause and remedy |\n|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	var found []string
	for _, m := range regexp.MustCompile(`(?m)^\| ([A-Za-z]+) \| \S`).FindAllStringSubmatch(table, -1) {
		found = append(found, m[1])
	}
	slices.Sort(want)
	slices.Sort(found)
	if !slices.Equal(found, want) || len(want) < 15 {
		t.Errorf("reasons in the README: %q\nin the code: %q", found, want)
	}
}
