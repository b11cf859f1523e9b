package election

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// A State is the role of a router.
type State uint8

// The states. The gate is shut in Standby and Claiming, and in Resuming once the permit
// has ended.
const (
	Standby State = iota
	Claiming
	Active
	Resuming
)

var stateNames = [...]string{Standby: "standby", Claiming: "claiming", Active: "active", Resuming: "resuming"}

// String returns the name of the state in logs and metrics.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// holds reports whether a router in this state has the reserved address or is about to.
func (s State) holds() bool { return s != Standby }

// A Heartbeat is the message that each router sends to its peers every interval and at
// each change.
type Heartbeat struct {
	// ID identifies the process, MAC the router.
	ID    uint64
	MAC   [6]byte
	State State
	// Priority is that of [Settings].
	Priority uint8
	// Healthy means that the router could take over: rules, network and link are right.
	Healthy bool
	// Resigned means that the router wants a peer to take over, or has just shut its gate
	// and can promise to stay shut.
	Resigned bool
	// Sequence grows by one with each heartbeat of a process.
	Sequence uint32
	// Interval is that of [Settings], in whole milliseconds.
	Interval time.Duration
	// Ask is a number that a promise repeats, or 0.
	Ask uint32
	// Promise is the number of the ask of router PromiseTo, which may open without the
	// wait, or 0. The sender's gate is shut.
	Promise   uint32
	PromiseTo uint64
	// FirstPort and LastPort are the range of source ports of the connections that enter by
	// the sender, whose packets others carry. Zero: its connections are not carried.
	FirstPort, LastPort uint16
}

const (
	heartbeatMagic   = 0x4572 // "Er"
	heartbeatVersion = 1
	// HeartbeatSize is the length of a heartbeat without a key in bytes.
	HeartbeatSize = 42
	// AuthenticatedSize is the length of a heartbeat with a key: HMAC-SHA256 (RFC 2104)
	// over the rest follows.
	AuthenticatedSize = HeartbeatSize + sha256.Size
	// PortsSize is the length of the range of ports, which follows the rest of a heartbeat
	// whose sender has one.
	PortsSize = 4

	flagHealthy  = 1 << 0
	flagResigned = 1 << 1
	flagsKnown   = flagHealthy | flagResigned
)

// Errors of [Parse].
var (
	ErrFormat = errors.New("no heartbeat of this version")
	ErrKey    = errors.New("heartbeat of another key")
)

// Append appends the encoded heartbeat, which is authenticated if key is not empty.
//
//	offset, length, big endian:
//	 0 2 magic     3 1 state      6 8 ID        20 4 sequence   26 4 ask        34 8 promise to
//	 2 1 version   4 1 flags     14 6 MAC       24 2 interval   30 4 promise
//	               5 1 priority                      (ms)
//
// The first and the last port follow, two bytes each, unless they are zero. A version without
// them refuses a heartbeat with them.
func (h Heartbeat) Append(b, key []byte) []byte {
	start := len(b)
	var flags uint8
	if h.Healthy {
		flags |= flagHealthy
	}
	if h.Resigned {
		flags |= flagResigned
	}
	b = binary.BigEndian.AppendUint16(b, heartbeatMagic)
	b = append(b, heartbeatVersion, byte(h.State), flags, h.Priority)
	b = binary.BigEndian.AppendUint64(b, h.ID)
	b = append(b, h.MAC[:]...)
	b = binary.BigEndian.AppendUint32(b, h.Sequence)
	b = binary.BigEndian.AppendUint16(b, uint16(h.Interval/time.Millisecond))
	b = binary.BigEndian.AppendUint32(b, h.Ask)
	b = binary.BigEndian.AppendUint32(b, h.Promise)
	b = binary.BigEndian.AppendUint64(b, h.PromiseTo)
	if h.LastPort != 0 {
		b = binary.BigEndian.AppendUint16(b, h.FirstPort)
		b = binary.BigEndian.AppendUint16(b, h.LastPort)
	}
	if len(key) == 0 {
		return b
	}
	mac := hmac.New(sha256.New, key)
	mac.Write(b[start:])
	return mac.Sum(b)
}

// Parse decodes a heartbeat. With a key it accepts only heartbeats of that key, without one
// only those without a key: [ErrKey], or [ErrFormat] for everything else.
//
// A recorded heartbeat stays valid. [Machine] ignores those of a process whose sequence
// number it has seen, so that a replay has an effect only on a router that started later,
// or after the MAC address had another ID: it can delay or cause a takeover. It cannot open
// two gates, since no heartbeat but a promise shortens the wait, and a promise repeats the
// number of an ask, which no process uses twice, and the random ID of the process.
func Parse(b, key []byte) (Heartbeat, error) {
	switch {
	case len(b) < HeartbeatSize, binary.BigEndian.Uint16(b) != heartbeatMagic, b[2] != heartbeatVersion:
		return Heartbeat{}, ErrFormat
	}
	size := HeartbeatSize // without what authenticates it
	if len(b) == HeartbeatSize+PortsSize || len(b) == AuthenticatedSize+PortsSize {
		size += PortsSize
	}
	switch authenticated := len(b) == size+sha256.Size; {
	case !authenticated && len(b) != size:
		return Heartbeat{}, ErrFormat
	case authenticated != (len(key) > 0):
		return Heartbeat{}, ErrKey
	case authenticated:
		mac := hmac.New(sha256.New, key)
		mac.Write(b[:size])
		if !hmac.Equal(mac.Sum(nil), b[size:]) {
			return Heartbeat{}, ErrKey
		}
	}
	h := Heartbeat{
		State:     State(b[3]),
		Healthy:   b[4]&flagHealthy != 0,
		Resigned:  b[4]&flagResigned != 0,
		Priority:  b[5],
		ID:        binary.BigEndian.Uint64(b[6:]),
		MAC:       [6]byte(b[14:20]),
		Sequence:  binary.BigEndian.Uint32(b[20:]),
		Interval:  time.Duration(binary.BigEndian.Uint16(b[24:])) * time.Millisecond,
		Ask:       binary.BigEndian.Uint32(b[26:]),
		Promise:   binary.BigEndian.Uint32(b[30:]),
		PromiseTo: binary.BigEndian.Uint64(b[34:]),
	}
	if size > HeartbeatSize {
		h.FirstPort, h.LastPort = binary.BigEndian.Uint16(b[HeartbeatSize:]), binary.BigEndian.Uint16(b[HeartbeatSize+2:])
		if h.FirstPort == 0 || h.LastPort < h.FirstPort {
			return Heartbeat{}, ErrFormat
		}
	}
	if h.State > Resuming || b[4]&^flagsKnown != 0 || h.ID == 0 || h.Interval < MinInterval || h.Interval > MaxInterval {
		return Heartbeat{}, ErrFormat
	}
	return h, nil
}
