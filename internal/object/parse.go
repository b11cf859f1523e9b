package object

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// The group, version and kind of the resource.
const (
	APIVersion = "network.operator.openshift.io/v1"
	Kind       = "EgressRouter"
)

// Parse reads a resource in YAML or JSON: the whole object, as kubectl prints it, or its spec
// alone. An unknown field of the spec is an error, as is a value of another type. The error
// of a field is a Faults.
func Parse(text []byte) (Spec, error) {
	if n := documents(string(text)); n > 1 {
		return Spec{}, fmt.Errorf("parse %s: expected one document, found %d", Kind, n)
	}
	converted, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return Spec{}, fmt.Errorf("parse %s: %w", Kind, err)
	}
	var document map[string]any
	if err := json.Unmarshal(converted, &document); err != nil || document == nil {
		return Spec{}, fmt.Errorf("parse %s: expected an object with the field spec, or the content of spec", Kind)
	}
	var faults Faults
	content, whole := document["spec"]
	_, hasKind := document["kind"]
	switch {
	case hasKind || whole:
		faults = checkKind(document)
		if !whole {
			faults = append(faults, Fault{"spec", "is missing"})
		}
	default:
		content = document
	}
	if faults.Err() == nil {
		faults = mismatches(reflect.TypeFor[Spec](), content, "spec")
	}
	if err := faults.Err(); err != nil {
		return Spec{}, err
	}
	var s Spec
	again, err := json.Marshal(content)
	if err == nil {
		err = json.Unmarshal(again, &s)
	}
	if err != nil {
		return Spec{}, fmt.Errorf("parse %s: %w", Kind, err)
	}
	return s, nil
}

// documents returns the number of documents with content, of which YAML reads the first. Three
// hyphens or dots at the beginning of a line separate them (YAML 1.2, section 9.1.2), also
// within a text.
func documents(text string) (n int) {
	content := false
	count := func() {
		if content {
			n++
		}
		content = false
	}
	for line := range strings.Lines(text) {
		first, _, _ := strings.Cut(strings.TrimRight(line, "\r\n"), " ")
		if first == "---" || first == "..." {
			count()
			line = line[len(first):]
		}
		line = strings.TrimSpace(line)
		content = content || line != "" && line[0] != '#' && line[0] != '%'
	}
	count()
	return n
}

// checkKind checks the kind and the version, if they are there.
func checkKind(document map[string]any) (faults Faults) {
	for _, f := range []struct{ key, want string }{{"kind", Kind}, {"apiVersion", APIVersion}} {
		if found, given := document[f.key]; given && found != f.want {
			text := fmt.Sprintf("is %q: expected %s", fmt.Sprint(found), f.want)
			if found == "List" {
				text += ": save one object with kubectl get egressrouter NAME -o yaml"
			}
			faults = append(faults, Fault{f.key, text})
		}
	}
	return faults
}

// mismatches returns a fault for each unknown field of a value, and for each value of
// another type. A null counts as absent.
func mismatches(t reflect.Type, value any, path string) (faults Faults) {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	wrong := func(expected string) Faults {
		return Faults{{path, fmt.Sprintf("is %s: expected %s", kindOf(value), expected)}}
	}
	if value == nil {
		return nil
	}
	switch t.Kind() {
	case reflect.Struct:
		object, is := value.(map[string]any)
		if !is {
			return wrong("an object")
		}
		fields := make(map[string]reflect.Type)
		for f := range t.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			fields[name] = f.Type
		}
		for _, key := range slices.Sorted(maps.Keys(object)) {
			if of, known := fields[key]; known {
				faults = append(faults, mismatches(of, object[key], path+"."+key)...)
				continue
			}
			faults = append(faults, Fault{path + "." + key, "is unknown: the fields are " + strings.Join(slices.Sorted(maps.Keys(fields)), ", ")})
		}
	case reflect.Slice:
		list, is := value.([]any)
		if !is {
			return wrong("a list")
		}
		for i, v := range list {
			faults = append(faults, mismatches(t.Elem(), v, fmt.Sprintf("%s[%d]", path, i))...)
		}
	case reflect.String:
		if _, is := value.(string); !is {
			return wrong("a text")
		}
	default: // a number
		n, is := value.(float64)
		switch {
		case !is || n != float64(int32(n)):
			return wrong("a whole number")
		case n == 0 && strings.HasSuffix(path, ".targetPort"): // which is not absent
			return wrong("a port from 1 to 65535")
		}
	}
	return faults
}

// kindOf describes a value of another type than the expected one.
func kindOf(value any) string {
	switch v := value.(type) {
	case map[string]any:
		return "an object"
	case []any:
		return "a list"
	case string:
		return fmt.Sprintf("the text %q", v)
	}
	return fmt.Sprint(value)
}
