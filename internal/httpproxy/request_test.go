package httpproxy

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// readOne reads a request and its body.
func readOne(r *bufio.Reader) (*request, *body, error) {
	c := &clientConn{proxy: &Proxy{config: Config{MaxHeaderBytes: 64 << 10}}, reader: r}
	got := new(request)
	if err := c.readRequest(got); err != nil {
		return nil, nil, err
	}
	b := &body{r: r, left: got.length}
	if got.length < 0 {
		b.setChunks()
	}
	if got.method == http.MethodConnect {
		return got, b, nil
	}
	_, err := io.Copy(io.Discard, b)
	return got, b, err
}

// Requests on whose end programs could disagree are refused, and the ends of others are
// found, however the data arrive.
func TestFraming(t *testing.T) {
	for name, test := range map[string]struct {
		stream string
		fault  error // io.EOF: all requests are read
	}{
		"no body":                         {"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", io.EOF},
		"a length":                        {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n", io.EOF},
		"chunks":                          {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nT: x\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", io.EOF},
		"length 0 twice apart":            {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", io.EOF},
		"a body that looks bad":           {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 23\r\n\r\nContent-Length: 1\r\n\r\n\r\n\r\n", io.EOF},
		"a tunnel that looks bad":         {"CONNECT a:1 HTTP/1.1\r\n\r\nG\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", io.EOF},
		"both":                            {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc", errTwoFramings},
		"both the other way round":        {"POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n", errTwoFramings},
		"both, one of them nonsense":      {"POST / HTTP/1.1\nTransfer-Encoding: x\nContent-Length: y\n\nz", errTwoFramings},
		"two lengths":                     {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", errTwoLengths},
		"two lengths that are equal":      {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nX: y\r\nCONTENT-LENGTH: 3\r\n\r\n", errTwoLengths},
		"chunks in HTTP/1.0":              {"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", errOldChunked},
		"chunks in HTTP/1.0, a long line": {"POST /" + strings.Repeat("x", 300) + " HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", errOldChunked},
		"behind a length of many digits": {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + strings.Repeat("0", 301) + "2\r\n\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
			errTwoLengths},
		"a folded header":    {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n", errFoldedHeader},
		"the second request": {"GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", errTwoLengths},
		"behind a length": {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
			errTwoLengths},
		"behind chunks": {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
			errTwoLengths},
		"behind long lines": {"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 5000) + "\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
			errTwoLengths},
	} {
		t.Run(name, func(t *testing.T) {
			for name, source := range map[string]io.Reader{
				"whole": strings.NewReader(test.stream), "in bytes": iotest.OneByteReader(strings.NewReader(test.stream)),
			} {
				r := bufio.NewReader(source)
				var err error
				for err == nil {
					var got *request
					if got, _, err = readOne(r); err == nil && got.method == http.MethodConnect {
						err = io.EOF
					}
				}
				if !errors.Is(err, test.fault) {
					t.Errorf("%s: %v; want %v", name, err, test.fault)
				}
			}
		})
	}
}

// Characters that only Unicode takes for letters of ASCII make no protocol word.
func TestProtocolWords(t *testing.T) {
	for _, word := range []string{"chunked", "close", "keep-alive", "100-continue", "Upgrade", "NTLM", "@[`{", "\x80\xa0"} {
		for i := range len(word) {
			for b := range 256 {
				other := word[:i] + string([]byte{byte(b)}) + word[i+1:]
				lower := func(s string) string {
					return strings.Map(func(r rune) rune {
						if 'A' <= r && r <= 'Z' {
							return r + 'a' - 'A'
						}
						return r
					}, latin1(s))
				}
				if got, want := equalFold(word, other), lower(word) == lower(other); got != want {
					t.Errorf("%q and %q: equal is %t", word, other, got)
				}
			}
		}
	}
	for _, fold := range []struct{ word, other string }{{"chunked", "chun\u212aed"}, {"keep-alive", "\u212aeep-alive"}, {"close", "clo\u017fe"}} {
		if equalFold(fold.word, fold.other) || hasToken("x, "+fold.other, fold.word) {
			t.Errorf("%q is %s", fold.other, fold.word)
		}
	}
	var r response
	if err := r.parse("HTTP/1.1 200 OK", fields{{"Transfer-Encoding", "chun\u212aed"}}, "GET"); err == nil {
		t.Error("a response of chun\u212aed is accepted")
	}
	if (fields{{"Authorization", "\u212aerberos x"}}).connectionScheme("Authorization") {
		t.Error("\u212aerberos is a scheme")
	}
}

// latin1 returns a string with a character for each byte.
func latin1(s string) string {
	runes := make([]rune, len(s))
	for i := range len(s) {
		runes[i] = rune(s[i])
	}
	return string(runes)
}

// Empty lines before a request are skipped.
func TestEmptyLines(t *testing.T) {
	const get, post = "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n\r\n\r\n"
	for stream, want := range map[string]int{
		"\r\n" + get: 1, "\n\r\n\r\n" + get + "\n": 1, get + "\r\n" + get: 2, post + "\r\n\r\n" + post: 2, post + post + get: 3,
	} {
		r := bufio.NewReader(strings.NewReader(stream))
		n := 0
		var err error
		for {
			if _, _, err = readOne(r); err != nil {
				break
			}
			n++
		}
		if n != want || err != io.EOF {
			t.Errorf("%q: %d requests, %v; want %d", stream, n, err, want)
		}
	}
}

// Trailers have the forms that net/http accepts, with its errors.
func TestTrailerForms(t *testing.T) {
	const next = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	for _, trailers := range []string{
		"\r\n", "\n", "\n\r\n", "\r\n\r\n", "", "\r", "A", "A: b\r\n\r\n", "A: b\n\r\n", "A: b\r\n\n", "A: b\n\n", "A: b\r\n c\r\n\r\n", "A: b\n\tc\n\n", "A: b\r\n \r\n\r\n",
		"A:\r\n c\r\n\r\n", " A: b\r\n\r\n", "A : b\r\n\r\n", "nothing\r\n\r\n", ": b\r\n\r\n", "A: \x00\r\n\r\n", "A: b\r\n",
		"A: " + strings.Repeat("b", 4081) + "\r\n\r\n", "A: " + strings.Repeat("b", 4089) + "\r\n\r\n", "A: " + strings.Repeat("b", 4090) + "\r\n\r\n",
		"A: " + strings.Repeat("b", 4100) + "\r\n\r\n",
	} {
		for _, behind := range []string{"", next} {
			stream := "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + trailers + behind
			r, standard := bufio.NewReader(strings.NewReader(stream)), bufio.NewReader(strings.NewReader(stream))
			_, b, err := readOne(r)
			want, wantErr := http.ReadRequest(standard)
			if wantErr == nil {
				_, wantErr = io.Copy(io.Discard, want.Body)
			}
			if (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
				t.Errorf("%.60q: %v; net/http: %v", trailers+behind, err, wantErr)
				continue
			}
			rest, _ := io.ReadAll(r)
			wantRest, _ := io.ReadAll(standard)
			if err == nil && (string(rest) != string(wantRest) || len(b.trailers) != len(want.Trailer)) {
				t.Errorf("%.60q: %v, then %.60q; net/http: %v, then %.60q", trailers+behind, b.trailers, rest, want.Trailer, wantRest)
			}
			for name, values := range want.Trailer {
				if err == nil && !slices.Equal(b.trailers.all(name), values) {
					t.Errorf("%.60q: %q; net/http: %q", trailers+behind, b.trailers, want.Trailer)
				}
			}
		}
	}
}

// FuzzRequest compares a stream of requests with net/http: each request that net/http
// refuses is refused, and the others have the same parts and end at the same byte.
func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3 ;x=y\r\nabc\r\n0\r\nT: x\r\n\r\nGET / HTTP/1.0\n\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"GET http://user@[::1]:80/a%2Fb?c=%zz#d HTTP/1.1\r\nHost: a\r\nconnection: close, x\r\nx: \ty \r\n\r\n",
		"GET http://a.example:8080//b HTTP/1.0\r\nConnection: keep-alive\r\nPragma: no-cache\r\n\r\nCONNECT a:1 HTTP/1.1\r\n\r\n",
		"OPTIONS http://a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: a, Content-Md5\r\n\r\n0\r\na: 1\r\n\r\n",
		"POST http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chun\u212aed\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
		"GET http://a/ HTTP/1.0\r\nConnection: \u212aeep-alive, clo\u017fe\r\n\r\nGET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: clo\u017fe\r\n\r\n",
		"POST http://a/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: b\n c\r\n\t\r\nB:\n\nGET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"GET HTTP://A:/?x HTTP/1.1\nHost: a\nB C: d\n\nGET http://a/\x80 HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		source, other := &counted{Reader: strings.NewReader(string(stream))}, &counted{Reader: strings.NewReader(string(stream))}
		r, standard := bufio.NewReader(source), bufio.NewReader(other)
		for {
			got, b, err := readOne(r)
			if err != nil && !errors.Is(err, errFoldedHeader) && got == nil {
				return // net/http is more lenient, or not
			}
			if got == nil {
				return
			}
			for { // the proxy skips empty lines
				if first, err := standard.Peek(1); err != nil || first[0] != '\r' && first[0] != '\n' {
					break
				}
				_, _ = standard.Discard(1)
			}
			want, wantErr := http.ReadRequest(standard)
			if wantErr != nil {
				t.Fatalf("%q: accepted, but by net/http %v", stream, wantErr)
			}
			if got.isPreface() { // net/http takes the rest for its body
				return
			}
			compare(t, got, want)
			if got.method == http.MethodConnect {
				return
			}
			_, bodyErr := io.Copy(io.Discard, want.Body)
			if bodyErr != nil && err == nil {
				t.Fatalf("%q: the body is accepted, but by net/http %v", stream, bodyErr)
			}
			if err != nil {
				return
			}
			if at, wantAt := source.n-r.Buffered(), other.n-standard.Buffered(); at != wantAt {
				t.Fatalf("%q: a request ends at %d, by net/http at %d", stream, at, wantAt)
			}
			for _, one := range b.trailers {
				if !slices.Contains(want.Trailer[one.name], one.value) {
					t.Fatalf("%q: trailer %v, by net/http %v", stream, one, want.Trailer)
				}
			}
		}
	})
}

func compare(t *testing.T, got *request, want *http.Request) {
	t.Helper()
	chunked := len(want.TransferEncoding) > 0
	if got.method != want.Method || got.uri != want.RequestURI || got.major != want.ProtoMajor || got.minor != want.ProtoMinor ||
		got.closes != want.Close || got.length != want.ContentLength || (got.length < 0) != chunked {
		t.Fatalf("%+v\nby net/http %+v", got, want)
	}
	if got.method != http.MethodConnect {
		u := *want.URL
		u.Opaque = got.pathAsWritten()
		if got.scheme != u.Scheme || got.host != u.Host || got.path != u.RequestURI() {
			t.Fatalf("%q: %q, %q, %q\nby net/http %q, %q, %q", got.uri, got.scheme, got.host, got.path, u.Scheme, u.Host, u.RequestURI())
		}
		if _, err := url.ParseRequestURI(got.uri); err != nil {
			t.Fatalf("%q: %v", got.uri, err)
		}
	}
	for name, values := range want.Header {
		if name == "Host" || name == "Content-Length" {
			continue
		}
		var ours []string
		for _, one := range got.fields {
			if one.name == name {
				ours = append(ours, one.value)
			}
		}
		for i := range values {
			values[i] = trim(values[i])
		}
		if strings.Join(ours, "\n") != strings.Join(values, "\n") {
			t.Fatalf("%s: %q, by net/http %q", name, ours, values)
		}
	}
	for _, one := range got.fields {
		if _, ok := want.Header[one.name]; !ok {
			t.Fatalf("%v is unknown to net/http: %v", one, want.Header)
		}
	}
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
