package httpproxy

import (
	"bufio"
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestFraming(t *testing.T) {
	for name, test := range map[string]struct {
		stream string
		fault  error
		after  string // the rest behind the fault
	}{
		"no body":                         {"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\n\r\n", nil, ""},
		"a length":                        {"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n", nil, ""},
		"chunks":                          {"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nT: x\r\n\r\nGET / HTTP/1.1\r\n\r\n", nil, ""},
		"length 0 twice apart":            {"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", nil, ""},
		"a body that looks bad":           {"POST / HTTP/1.1\r\nContent-Length: 23\r\n\r\nContent-Length: 1\r\n\r\n\r\n\r\n", nil, ""},
		"a tunnel that looks bad":         {"CONNECT a:1 HTTP/1.1\r\n\r\nG\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", nil, ""},
		"both":                            {"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc", errTwoFramings, "\nabc"},
		"both the other way round":        {"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n", errTwoFramings, "\n"},
		"both, one of them nonsense":      {"POST / HTTP/1.1\nTransfer-Encoding: x\nContent-Length: y\n\nz", errTwoFramings, "\nz"},
		"two lengths":                     {"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", errTwoLengths, "\n"},
		"two lengths that are equal":      {"POST / HTTP/1.1\r\nContent-Length: 3\r\nX: y\r\nCONTENT-LENGTH: 3\r\n\r\n", errTwoLengths, "\n"},
		"chunks in HTTP/1.0":              {"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", errOldChunked, "\n"},
		"chunks in HTTP/1.0, a long line": {"POST /" + strings.Repeat("x", 300) + " HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", errOldChunked, "\n"},
		"behind a length of many digits": {"POST / HTTP/1.1\r\nContent-Length: " + strings.Repeat("0", 301) + "2\r\n\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
			errTwoLengths, "\n"},
		"a folded header":    {"POST / HTTP/1.1\r\nTransfer-Encoding:\r\n chunked\r\n\r\n", errFoldedHeader, "\n\r\n"},
		"the second request": {"GET / HTTP/1.1\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", errTwoLengths, "\n"},
		"behind a length": {"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
			errTwoLengths, "\n"},
		"behind chunks": {"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
			errTwoLengths, "\n"},
		"behind long lines": {"GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 5000) + "\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
			errTwoLengths, "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{1, 2, 3, 7, 64, len(test.stream)} {
				var f framing
				var err error
				read := 0
				for read < len(test.stream) && err == nil {
					piece := []byte(test.stream[read:min(read+size, len(test.stream))])
					var n int
					if n, err = f.scan(piece); err == nil {
						n = len(piece) // empty lines are removed
					}
					read += n
				}
				if err != test.fault || test.stream[read:] != test.after {
					t.Errorf("in pieces of %d: %v before %q; want %v before %q", size, err, test.stream[read:], test.fault, test.after)
				}
			}
		})
	}
}

// Empty lines before a request are removed, other data are not.
func TestEmptyLines(t *testing.T) {
	const get, post = "GET / HTTP/1.1\r\n\r\n", "POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\n\r\n\r\n"
	for stream, want := range map[string]string{
		"\r\n" + get:                                get,
		"\n\r\n\r\n" + get + "\n":                   get,
		get + "\r\n" + get:                          get + get,
		post + "\r\n\r\n" + post:                    post + post,
		"CONNECT a:1 HTTP/1.1\r\n\r\n\r\nx":         "CONNECT a:1 HTTP/1.1\r\n\r\n\r\nx",
		"GET / HTTP/1.1\r\nUpgrade: x\r\n\r\n\r\nx": "GET / HTTP/1.1\r\nUpgrade: x\r\n\r\n\r\nx",
	} {
		for _, size := range []int{1, 2, 3, 7, len(stream)} {
			var f framing
			var got []byte
			for i := 0; i < len(stream); i += size {
				piece := []byte(stream[i:min(i+size, len(stream))])
				n, err := f.scan(piece)
				check(t, err)
				got = append(got, piece[:n]...)
			}
			if string(got) != want {
				t.Errorf("%q in pieces of %d: %q, want %q", stream, size, got, want)
			}
		}
	}
}

// FuzzFraming compares the scan of a stream with net/http: the scan finds no fault in
// valid requests, and begins each request at the same byte.
func FuzzFraming(f *testing.F) {
	for _, seed := range []string{
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3 ;x=y\r\nabc\r\n0\r\nT: x\r\n\r\nGET / HTTP/1.0\n\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		source := &counted{Reader: strings.NewReader(string(stream))}
		r := bufio.NewReaderSize(source, 16)
		var scan framing
		for {
			begin := source.n - r.Buffered()
			request, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			header := source.n - r.Buffered()
			_, bodyErr := io.Copy(io.Discard, request.Body)
			end := source.n - r.Buffered()
			if scan.phase != inRequestLine {
				t.Fatalf("a request at %d of %q begins in phase %d", begin, stream, scan.phase)
			}
			n, fault := scan.scan(stream[begin:header])
			if fault != nil {
				return // net/http is more lenient
			}
			if n != header-begin {
				t.Fatalf("%d of the header %q were scanned", n, stream[begin:header])
			}
			if len(request.TransferEncoding) > 0 && len(request.Header["Content-Length"]) > 0 {
				t.Fatalf("two framings in %q", stream[begin:header])
			}
			if request.Method == http.MethodConnect || bodyErr != nil {
				return
			}
			if n, fault := scan.scan(stream[header:end]); fault != nil || n != end-header {
				t.Fatalf("the body %q: %d scanned, %v", stream[header:end], n, fault)
			}
		}
	})
}

type counted struct {
	io.Reader
	n int
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += n
	return n, err
}
