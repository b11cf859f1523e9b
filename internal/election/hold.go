package election

import "time"

// activate begins to hold the address.
func (m *Machine) activate(reason string) {
	m.become(Active, reason)
	m.mayPromise, m.promised, m.defences = false, past, 0
	m.announce, m.takeBack, m.pinging = m.now, m.now, m.now
}

// hold does the work of the active router.
func (m *Machine) hold() {
	lapse := m.replied + m.s.Permit()
	switch {
	case m.isolated():
		m.resign("no peer and no reference")
		m.standby()
		return
	case m.leaving && (m.now >= m.leaveBy || !m.hasCandidate() || m.mixed):
		m.end("leaving")
		return
	case m.resigned() && m.mixed:
		// Nobody asks for a promise.
		m.resign("not ready")
		m.standby()
		return
	case m.now >= lapse:
		m.read()
		return
	}
	if m.now >= m.announce {
		m.do(Announce)
		m.announce = m.now + announceEvery
	}
	// A ping was not answered. If a router that did not hear this one claimed, the gateway
	// answers it instead; if the gateway lost its entry it may not ask. The permit lives, so
	// no other gate is open.
	overdue := m.replied + m.s.Interval + m.s.Ticket()
	if m.now >= overdue && m.now >= m.takeBack {
		m.do(Announce)
		m.takeBack = m.now + m.s.Interval
	}
	if m.now >= m.pinging {
		m.ping()
		m.pinging = m.now + m.s.Interval
	}
	m.due = min(m.pinging, lapse, m.announce, max(overdue, m.takeBack), m.isolatedAt())
	if m.leaving {
		m.due = min(m.due, m.leaveBy)
	}
}

// kept notes the reply to a ping sent at the time sent.
func (m *Machine) kept(sent time.Duration) {
	// No other gate was open at the ping before nor could open since, so none is open now.
	if m.now-m.held <= m.safe {
		m.held = max(m.held, sent)
		m.replied = m.now
	}
}

// resign shuts the gate of the active router and leaves the address to its peers.
func (m *Machine) resign(reason string) {
	m.retreat(reason, m.apart())
	m.mayPromise, m.shutAt = true, m.now
}
