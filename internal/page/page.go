// Package page renders the status page of a running program for a browser.
//
// It is pure: a program makes a Page for each request, and this package makes HTML of
// it. html/template would add 3 MB to the program, a fifth of its size, since the linker
// can then drop no method; instead, a type keeps markup and text apart (see writer).
package page

import (
	"time"

	"github.com/egress-router/egress-router/internal/health"
)

// A Page is what the page shows.
type Page struct {
	Report health.Report
	Host   string // name of the pod
	// Standby is set for a router whose addresses another one holds: it is not ready,
	// and nothing is wrong.
	Standby bool
	// Advice returns what to do about a check that is not OK; empty: nothing is known.
	Advice func(health.Check) string

	Path   []Hop // of a packet from the clients to the servers
	Tables []Table
	Events []Event // newest first
	Now    time.Time
}

// A Hop is a place on the path of a packet.
type Hop struct {
	Name  string
	Lines []string // what is there, each a few words
	State health.State
}

// A Table is one section of the page.
type Table struct {
	ID       string // of the section, a word
	Title    string
	Note     string // one sentence about all of it; may be empty
	Columns  []Column
	Rows     []Row
	None     string // text if there is no row
	Searches bool   // its rows are chosen by the query, and Matching is valid
	Matching int    // number of rows of all pages
}

// A Column is a column of a table. Numbers are aligned to the right.
type Column struct {
	Title  string
	Number bool
}

// A Row is a row of a table.
type Row struct {
	State health.State
	Cells []string // one for each column
}

// RowsPerPage is the number of rows of a table that are shown at a time. More are faster to
// search than to read, on a phone above all.
const RowsPerPage = 50

// A Query is what the reader of the page asks for.
type Query struct {
	Search string // part of the text of rows; empty: all
	Number int    // number of the page, from 1
}

// Window returns the rows of the query's page, of a number of rows.
func (q Query) Window(rows int) (from, to int) {
	last := max(1, (rows+RowsPerPage-1)/RowsPerPage)
	from = (min(max(q.Number, 1), last) - 1) * RowsPerPage
	return from, min(rows, from+RowsPerPage)
}
