package metrics

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// A layout has the metrics of a page in the order of their names.
type layout []*family

// A family is a metric of a page, whose values have the same name.
type family struct {
	Metric
	head  string // the lines HELP and TYPE
	order []int  // indexes of Labels, in the order of the labels' names
}

// The escapes of Prometheus's text format 0.0.4.
var (
	helpEscapes  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	labelEscapes = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)

// newLayout lays a table out. The error names the first metric that Prometheus would
// not accept, and the reason.
func newLayout(table []Metric) (layout, error) {
	var l layout
	for _, m := range table {
		if err := m.valid(); err != nil {
			return nil, fmt.Errorf("registering metric %q: %w", m.Name, err)
		}
		f := &family{m, fmt.Sprintf("# HELP %s %s\n# TYPE %[1]s %[3]s\n", m.Name, helpEscapes.Replace(m.Help), m.Type), nil}
		for i := range m.Labels {
			f.order = append(f.order, i)
		}
		slices.SortFunc(f.order, func(a, b int) int { return cmp.Compare(m.Labels[a], m.Labels[b]) })
		l = append(l, f)
	}
	slices.SortFunc(l, func(a, b *family) int { return cmp.Compare(a.Name, b.Name) })
	for i := 1; i < len(l); i++ {
		if l[i].Name == l[i-1].Name {
			return nil, fmt.Errorf("registering metric %q: it is in the table twice", l[i].Name)
		}
	}
	return l, nil
}

// valid returns what Prometheus's data model has against a metric: a name consists of
// letters, digits, "_" and, for metrics only, ":", and does not begin with a digit;
// labels that begin with "__" are Prometheus's own.
func (m Metric) valid() error {
	if !validName(strings.ReplaceAll(m.Name, ":", "_")) {
		return errors.New(`invalid name, expected letters, digits, "_" and ":"`)
	}
	for i, label := range m.Labels {
		switch {
		case !validName(label) || strings.HasPrefix(label, "__"):
			return fmt.Errorf(`invalid label %q, expected letters, digits and "_"`, label)
		case slices.Contains(m.Labels[:i], label):
			return fmt.Errorf("label %q is there twice", label)
		}
	}
	switch {
	case m.Type != Counter && m.Type != Gauge && m.Type != Histogram:
		return fmt.Errorf("unknown type %q", m.Type)
	case m.Type == Histogram && len(m.Labels) > 0:
		return fmt.Errorf("a histogram with labels %q, expected none", m.Labels)
	case !utf8.ValidString(m.Help):
		return fmt.Errorf("help %q is not UTF-8", m.Help)
	}
	return nil
}

func validName(s string) bool {
	for i, c := range []byte(s) {
		letter := c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if !letter && (i == 0 || c < '0' || '9' < c) {
			return false
		}
	}
	return s != ""
}

// A scrape has the values of one page.
type scrape struct {
	layout layout
	values map[string]*values
	errs   []error // of values that were left out
}

// values are the values of one metric.
type values struct {
	*family
	samples []sample
	ended   bool // the sum of a histogram, its last part, is there
}

type sample struct {
	labels []string // their values, in the order of the labels' names; the part of a histogram
	value  float64
}

func newScrape(l layout) *scrape {
	s := &scrape{layout: l, values: make(map[string]*values, len(l))}
	for _, f := range l {
		s.values[f.Name] = &values{family: f}
	}
	return s
}

// emit is the Emit of the scrape.
func (s *scrape) emit(name string, value float64, labels ...string) {
	v, known := s.values[name]
	if !known {
		s.refuse(name, errors.New("not in the table"))
		return
	}
	if err := v.add(value, labels); err != nil {
		s.refuse(name, err)
	}
}

func (s *scrape) refuse(name string, err error) {
	s.errs = append(s.errs, fmt.Errorf("collecting metric %q: %w", name, err))
}

// add takes a value with labels in the order of the table.
func (v *values) add(value float64, labels []string) error {
	if v.Type == Histogram {
		return v.addPart(value, labels)
	}
	if len(labels) != len(v.Labels) {
		return fmt.Errorf("expected the labels %q, found the values %q", v.Labels, labels)
	}
	ordered := make([]string, len(labels))
	for i, from := range v.order {
		if ordered[i] = labels[from]; !utf8.ValidString(ordered[i]) {
			return fmt.Errorf("label %q has the value %q, expected UTF-8", v.Labels[from], ordered[i])
		}
	}
	v.samples = append(v.samples, sample{ordered, value})
	return nil
}

// addPart takes a part of a histogram; see Emit.Distribution.
func (v *values) addPart(value float64, labels []string) error {
	if v.ended {
		return errors.New("it was collected before")
	}
	if len(labels) != 1 {
		return fmt.Errorf("found the values %q of labels, expected the one of a histogram's part", labels)
	}
	if v.ended = labels[0] == sumPart; !v.ended {
		if bound, err := strconv.ParseFloat(labels[0], 64); err != nil || math.IsInf(bound, 0) || math.IsNaN(bound) {
			return fmt.Errorf("found the part %q of a histogram, expected a finite bound or %s", labels[0], sumPart)
		}
	}
	v.samples = append(v.samples, sample{labels, value})
	return nil
}

// text returns the page: all metrics that have values, in the order of their names, and
// the values of each in the order of their labels. It adds errors to errs.
func (s *scrape) text() []byte {
	var text bytes.Buffer
	for _, f := range s.layout {
		v := s.values[f.Name]
		if len(v.samples) == 0 {
			continue
		}
		text.WriteString(f.head)
		if f.Type == Histogram {
			v.writeHistogram(&text)
			continue
		}
		slices.SortStableFunc(v.samples, func(a, b sample) int { return slices.Compare(a.labels, b.labels) })
		for i, sample := range v.samples {
			if i > 0 && slices.Equal(sample.labels, v.samples[i-1].labels) {
				s.refuse(f.Name, fmt.Errorf("a value with the labels %q was collected before", sample.labels))
				continue
			}
			v.writeSample(&text, sample)
		}
	}
	return text.Bytes()
}

// writeSample writes one line: the name, the labels in braces, the value.
func (v *values) writeSample(text *bytes.Buffer, s sample) {
	text.WriteString(v.Name)
	separator := byte('{')
	for i, from := range v.order {
		text.WriteByte(separator)
		text.WriteString(v.Labels[from])
		text.WriteString(`="`)
		_, _ = labelEscapes.WriteString(text, s.labels[i]) // a buffer takes everything
		text.WriteByte('"')
		separator = ','
	}
	if len(s.labels) > 0 {
		text.WriteByte('}')
	}
	writeValue(text, s.value)
}

func writeValue(text *bytes.Buffer, value float64) {
	if value == 0 {
		value = 0 // not -0
	}
	text.WriteByte(' ')
	text.Write(strconv.AppendFloat(text.AvailableBuffer(), value, 'g', -1, 64))
	text.WriteByte('\n')
}

// writeHistogram writes the number of values up to each bound, the sum and the number of
// all values.
func (v *values) writeHistogram(text *bytes.Buffer) {
	count, sum := 0.0, 0.0
	bucket := func(bound string) {
		fmt.Fprintf(text, `%s_bucket{le="%s"}`, v.Name, bound)
		writeValue(text, count)
	}
	for _, part := range v.samples {
		if part.labels[0] == sumPart {
			sum = part.value
			continue
		}
		count += part.value
		bucket(part.labels[0])
	}
	bucket("+Inf")
	text.WriteString(v.Name + "_sum")
	writeValue(text, sum)
	text.WriteString(v.Name + "_count")
	writeValue(text, count)
}
