package config

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
	"testing"

	"github.com/egress-router/egress-router/internal/wording"
)

// Every field has a variable: messages about it name that.
func TestEveryFieldHasName(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../wording/wording.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	fields := 0
	ast.Inspect(file, func(n ast.Node) bool {
		constant, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if kind, ok := constant.Type.(*ast.Ident); !ok || kind.Name != "Field" {
			t.Fatalf("%s is no field", constant.Names[0])
		}
		text, err := strconv.Unquote(constant.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		fields++
		if name := (Names{}).Name(wording.Field(text)); !strings.HasPrefix(name, "EGRESS_") {
			t.Errorf("field %q is named %q", text, name)
		}
		return false
	})
	if fields == 0 {
		t.Error("no field")
	}
	if got, want := wording.Set(wording.Conflict, "warn").In(Names{}), "EGRESS_CONFLICT=warn"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
