package election

import "time"

// heard processes a heartbeat.
func (m *Machine) heard(h Heartbeat) {
	p, before := m.learn(h)
	if p == nil {
		return
	}
	switch {
	case m.state == Standby && h.State.holds():
		m.defences = 0
	case m.state == Claiming && h.State == Active:
		m.retreat("peer is active", 0)
	case m.state == Claiming && h.State == Claiming && m.better(p):
		m.retreat("better peer is claiming", 0)
	case m.state == Claiming && before == Claiming && h.State == Standby:
		// The other one stepped back, and the gateway may answer it.
		m.claim("")
	case m.state == Resuming && h.State == Active:
		m.retreat("peer is active", 0)
	case m.state == Active && before == Claiming && h.State == Standby:
		// It did not hear this router when it claimed, and has stepped back.
		m.announce = m.now
	}
	if h.Promise != 0 && h.PromiseTo == m.s.ID {
		m.receive(h.Promise)
	}
	if h.Ask != 0 {
		m.answer(h)
	}
	if m.leaving && m.now < m.promised && h.State == Active {
		m.end("handed over")
	}
}

// learn notes a heartbeat, and returns its sender and the state before. It returns nil for
// duplicates and for heartbeats that others overtook.
func (m *Machine) learn(h Heartbeat) (*peer, State) {
	if h.ID == m.s.ID {
		return nil, 0
	}
	m.wait = max(m.wait, Settings{Interval: h.Interval}.Opening())
	m.mixed = m.mixed || h.Interval != m.s.Interval
	place := -1
	for i := range m.peers {
		p := &m.peers[i]
		if p.ID == h.ID {
			if int32(h.Sequence-p.Sequence) <= 0 {
				return nil, 0
			}
			before := p.State
			if h.Resigned && !p.Resigned {
				p.resigned = m.now
			}
			p.Heartbeat, p.heard = h, m.now
			return p, before
		}
		if p.MAC == h.MAC {
			place = i // The router has restarted.
		}
	}
	if place < 0 && len(m.peers) < maxPeers {
		m.peers = append(m.peers, peer{})
		place = len(m.peers) - 1
	}
	for i := range m.peers {
		if place < 0 || len(m.peers) == maxPeers && m.peers[i].heard < m.peers[place].heard {
			place = i
		}
	}
	m.peers[place] = peer{Heartbeat: h, heard: m.now, resigned: m.now}
	return &m.peers[place], Standby
}

// resigned reports whether a peer should ask for a promise: this router wants to hand
// over, or has just lost its link.
func (m *Machine) resigned() bool {
	switch m.state {
	case Active:
		return (m.leaving || !m.ready) && m.hasCandidate()
	case Standby:
		return m.mayPromise && m.now-m.shutAt < m.s.Permit()
	}
	return false
}

// askDue asks for a promise if a router has resigned and no better candidate asks, and
// returns when the next ask is due.
func (m *Machine) askDue() time.Duration {
	if !m.fit() || m.mixed {
		return never
	}
	due := never
	for i := range m.peers {
		p := &m.peers[i]
		if !p.Resigned || !m.alive(p) {
			continue
		}
		// A worse candidate asks later: the router that resigned promises once.
		at := max(m.asked+m.s.Permit(), p.resigned+time.Duration(m.rank())*2*m.s.Interval)
		if m.now >= at {
			m.ask++
			m.ask = max(m.ask, 1)
			m.asked, m.beat = m.now, m.now
			at = m.now + m.s.Permit()
		}
		due = min(due, at)
	}
	return due
}

// asking reports whether heartbeats carry an ask.
func (m *Machine) asking() bool {
	return m.state == Standby && m.now < m.asked+m.s.Permit()
}

// answer promises a peer that asks to stay shut, if nobody else can open soon.
//
// The gateway answered a ping that left less than a ticket ago, when this router held the
// address. So no other router opens within [Settings.Quiet] of that ping, even one that
// claims already: its wait begins after the reply to the ping. The ask is younger than
// the ping plus a ticket; who asked counts from the ask and opens within a permit:
// ticket + permit < Quiet. Each time of holding has one promise, since two routers with
// promises would not wait for each other.
func (m *Machine) answer(h Heartbeat) {
	if !m.resigned() || m.mixed || m.now-m.held > m.fresh {
		return
	}
	if m.state == Active {
		m.resign("handed over")
	}
	m.mayPromise = false
	m.promise, m.promisedTo, m.promised = h.Ask, h.ID, m.now+m.s.Promise()
	m.away = max(m.away, m.promised)
	m.beat = m.now
}

// receive uses a promise: the claim needs no wait until the ask is a permit old.
func (m *Machine) receive(number uint32) {
	deadline := m.asked + m.promiseLife
	if number != m.ask || m.now+lives(m.s.quickArm()) > deadline || m.mixed || !m.fit() {
		return
	}
	if m.state != Standby && m.state != Claiming {
		return
	}
	m.asked = past
	m.do(Shut)
	if m.state == Standby {
		m.become(Claiming, "address handed over")
	}
	m.claimed = 0
	m.fast(deadline)
}

// leave hands the address over and ends.
func (m *Machine) leave() {
	if m.leaving {
		return
	}
	m.leaving, m.beat, m.leaveBy = true, m.now, m.now+m.s.Promise()/2
	switch {
	case m.state == Active:
		// hold waits for an ask.
	case m.now < m.promised:
		m.leaveBy = m.promised
	default:
		m.end("leaving")
	}
}

// end shuts the gate for good.
func (m *Machine) end(reason string) {
	m.retreat(reason, 0)
	m.send()
	m.do(Ended)
	m.ended, m.due, m.beat = true, never, never
}

// setLink notes the carrier. The kernel lets nothing out without, and nothing in; the
// gate is shut so that the address can be taken over at once.
func (m *Machine) setLink(up bool) {
	m.link = up
	switch {
	case up:
	case m.state == Active:
		m.resign("link lost")
	case m.state != Standby:
		m.retreat("link lost", 0)
	}
}
