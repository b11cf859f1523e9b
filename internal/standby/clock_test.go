package standby

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// No time of day decides anything: the machine's clock is a duration, and what measures or waits
// here uses the monotonic reading that time.Now has, which none of these calls leaves in place.
func TestMonotonic(t *testing.T) {
	wall := []string{"Unix", "UnixMilli", "UnixMicro", "UnixNano", "UTC", "In", "Local", "AddDate", "UnmarshalText", "Format"} // methods, too
	clock := []string{"Date", "Parse", "ParseInLocation", "Now", "Since", "Until", "After", "AfterFunc", "NewTimer", "NewTicker", "Tick", "Sleep"}
	seen := 0
	for directory, forbidden := range map[string][]string{".": append(clock[:3:3], wall...), "../election": append(clock, wall...)} {
		files, err := filepath.Glob(filepath.Join(directory, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			set := token.NewFileSet()
			file, err := parser.ParseFile(set, name, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			ast.Inspect(file, func(n ast.Node) bool {
				s, is := n.(*ast.SelectorExpr)
				if !is {
					return true
				}
				seen++
				x, _ := s.X.(*ast.Ident)
				ofTime := x != nil && x.Name == "time"
				if slices.Contains(forbidden, s.Sel.Name) && (ofTime || slices.Contains(wall, s.Sel.Name)) {
					t.Errorf("%s: %s", set.Position(n.Pos()), s.Sel.Name)
				}
				return true
			})
		}
	}
	if seen < 1000 {
		t.Errorf("expected more than 1000 selectors, found %d", seen)
	}
}
