package election

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"
	"time"
)

var sampleBeat = Heartbeat{
	ID: 0x0102030405060708, MAC: [6]byte{2, 0x11, 0x22, 0x33, 0x44, 0x55}, State: Active, Priority: 100, Healthy: true, Resigned: true,
	Sequence: 0x0a0b0c0d, Interval: 20 * time.Millisecond, Ask: 0x10111213, Promise: 0x20212223, PromiseTo: 0x3031323334353637,
}

const sampleBytes = "457201" + "02" + "03" + "64" + "0102030405060708" + "021122334455" + "0a0b0c0d" + "0014" + "10111213" + "20212223" + "3031323334353637"

func TestHeartbeatBytes(t *testing.T) {
	b := sampleBeat.Append(nil, nil)
	if got := hex.EncodeToString(b); got != sampleBytes {
		t.Errorf("Append:\n%s, want\n%s", got, sampleBytes)
	}
	if len(b) != HeartbeatSize {
		t.Errorf("%d bytes, want %d", len(b), HeartbeatSize)
	}
	if got, err := Parse(b, nil); err != nil || got != sampleBeat {
		t.Errorf("Parse: %+v, %v", got, err)
	}
}

func TestHeartbeatKey(t *testing.T) {
	key, other := []byte("key"), []byte("another key")
	signed := sampleBeat.Append([]byte("before"), key)[len("before"):]
	if len(signed) != AuthenticatedSize {
		t.Errorf("%d bytes, want %d", len(signed), AuthenticatedSize)
	}
	if got, err := Parse(signed, key); err != nil || got != sampleBeat {
		t.Errorf("Parse: %+v, %v", got, err)
	}
	for i := range signed {
		changed := bytes.Clone(signed)
		changed[i] ^= 1
		if _, err := Parse(changed, key); err == nil {
			t.Errorf("byte %d changed: accepted", i)
		}
	}
	plain := sampleBeat.Append(nil, nil)
	for _, test := range []struct {
		name   string
		b, key []byte
		want   error
	}{
		{"another key", signed, other, ErrKey},
		{"key expected", plain, key, ErrKey},
		{"no key expected", signed, nil, ErrKey},
		{"empty", nil, nil, ErrFormat},
		{"short", plain[:HeartbeatSize-1], nil, ErrFormat},
		{"long", append(bytes.Clone(plain), 0), nil, ErrFormat},
		{"long with a key", append(bytes.Clone(signed), 0), key, ErrFormat},
		{"version", with(plain, 2, 2), nil, ErrFormat},
		{"state", with(plain, 3, byte(Resuming)+1), nil, ErrFormat},
		{"flag", with(plain, 4, 4), nil, ErrFormat},
		{"interval", with(plain, 25, 9), nil, ErrFormat},
	} {
		if _, err := Parse(test.b, test.key); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", test.name, err, test.want)
		}
	}
}

// A range of ports follows a heartbeat, within what the key authenticates.
func TestHeartbeatPorts(t *testing.T) {
	beat := sampleBeat
	beat.FirstPort, beat.LastPort = 1024, 33279
	for _, key := range [][]byte{nil, []byte("key")} {
		b := beat.Append(nil, key)
		if got := hex.EncodeToString(b[:HeartbeatSize+PortsSize]); got != sampleBytes+"0400"+"81ff" {
			t.Errorf("Append: %s", got)
		}
		if got, err := Parse(b, key); err != nil || got != beat {
			t.Errorf("Parse: %+v, %v", got, err)
		}
		changed := with(b, HeartbeatSize, 5)
		if _, err := Parse(changed, key); len(key) > 0 && !errors.Is(err, ErrKey) {
			t.Errorf("another port: %v, want %v", err, ErrKey)
		}
		if _, err := Parse(b[:len(b)-1], key); !errors.Is(err, ErrFormat) {
			t.Errorf("short: %v, want %v", err, ErrFormat)
		}
	}
	plain := beat.Append(nil, nil)
	if _, err := Parse(plain, []byte("key")); !errors.Is(err, ErrKey) {
		t.Errorf("key expected: %v, want %v", err, ErrKey)
	}
	for _, wrong := range [][]byte{with(plain, HeartbeatSize, 0xff), with(with(plain, HeartbeatSize, 0), HeartbeatSize+1, 0)} {
		if _, err := Parse(wrong, nil); !errors.Is(err, ErrFormat) {
			t.Errorf("range %x: %v, want %v", wrong[HeartbeatSize:], err, ErrFormat)
		}
	}
}

func with(b []byte, i int, v byte) []byte {
	b = bytes.Clone(b)
	b[i] = v
	return b
}

func FuzzParse(f *testing.F) {
	f.Add(sampleBeat.Append(nil, nil), []byte(nil))
	f.Add(sampleBeat.Append(nil, []byte("key")), []byte("key"))
	ports := sampleBeat
	ports.FirstPort, ports.LastPort = 1024, 33279
	f.Add(ports.Append(nil, nil), []byte(nil))
	f.Add(ports.Append(nil, []byte("key")), []byte("key"))
	f.Add([]byte{}, []byte("key"))
	f.Fuzz(func(t *testing.T, b, key []byte) {
		h, err := Parse(b, key)
		if err != nil {
			if h != (Heartbeat{}) {
				t.Errorf("error and %+v", h)
			}
			return
		}
		if got := h.Append(nil, key); !bytes.Equal(got, b) {
			t.Errorf("%x encodes as %x", b, got)
		}
	})
}
