package election

import "time"

// standby probes and claims if no router holds the address.
func (m *Machine) standby() {
	m.due = m.askDue()
	if m.leaving {
		m.due = m.leaveBy
		if m.now >= m.leaveBy {
			m.end("leaving")
		}
		return
	}
	at := m.candidate()
	if m.now < at {
		m.phase = idle
		m.due = min(m.due, at)
		return
	}
	if m.phase == idle {
		m.phase, m.count, m.step = probing, 0, m.now
	}
	if m.now >= m.step {
		if m.count == probes {
			m.claim("no router holds the address")
			m.open()
			return
		}
		m.do(Probe)
		m.count++
		m.step = m.now + claimGap
		if m.count == probes {
			m.step = m.now + probeEnd
		}
	}
	m.due = min(m.due, m.step)
}

// candidate returns when a router in standby may start to probe.
func (m *Machine) candidate() time.Duration {
	if !m.fit() {
		return never
	}
	silent := m.awake
	for i := range m.peers {
		if p := &m.peers[i]; p.State.holds() {
			silent = max(silent, p.heard)
		}
	}
	return max(silent+m.s.Detection()+m.skew(), m.notBefore+m.skew(), m.away)
}

// skew delays the takeover by half an interval for each better candidate, so that the best
// one is claiming before the next one probes. It has the purpose of Skew_Time in VRRP (RFC
// 9568, section 6.1), which delays a single router of priority 100 too.
func (m *Machine) skew() time.Duration { return time.Duration(m.rank()) * m.s.Interval / 2 }

// rank returns the number of better candidates.
func (m *Machine) rank() int {
	n := 0
	for i := range m.peers {
		if p := &m.peers[i]; m.candidates(p) && p.State == Standby && m.better(p) {
			n++
		}
	}
	return n
}

// candidates reports whether a peer could take over.
func (m *Machine) candidates(p *peer) bool { return p.Healthy && !p.Resigned && m.alive(p) }

// alive reports whether a peer was heard lately.
func (m *Machine) alive(p *peer) bool { return m.now-p.heard < m.s.Detection() }

// better reports whether a peer goes before this router.
func (m *Machine) better(p *peer) bool {
	if p.Priority != m.s.Priority {
		return p.Priority > m.s.Priority
	}
	return p.ID > m.s.ID
}

// hasCandidate reports whether a peer could take over.
func (m *Machine) hasCandidate() bool {
	for i := range m.peers {
		if m.candidates(&m.peers[i]) {
			return true
		}
	}
	return false
}

// claim begins to claim, or claims again. Shut comes first: an arm must not see a claim.
func (m *Machine) claim(reason string) {
	m.do(Shut)
	if m.state != Claiming {
		m.become(Claiming, reason)
	}
	m.seek()
}

// seek begins the phase in which the gateway does not answer yet.
func (m *Machine) seek() {
	m.phase, m.begun, m.step, m.count, m.claimed, m.stable = seeking, m.now, m.now, 0, 0, never
	m.first = m.number + 1
}

// resume begins to open again after the permit has ended, without a claim: the gateway
// still answers this router if no other one claimed.
func (m *Machine) resume(reason string) {
	m.become(Resuming, reason)
	m.fast(m.held + m.safe)
}

// fast begins the phase quick: no other gate can open before the deadline.
func (m *Machine) fast(deadline time.Duration) {
	m.phase, m.deadline, m.step, m.begun = quick, deadline, m.now, m.now
}

// open does the work of claiming and resuming.
func (m *Machine) open() {
	switch m.phase {
	case quick:
		if m.now >= m.step {
			m.arm()
		}
		m.due = m.step
	case seeking:
		m.seeking()
	case waiting:
		m.waiting()
	case opening:
		if m.silent() {
			m.lost()
			return
		}
		if m.now >= m.begun+m.s.Detection() {
			m.yield("gateway answers too late")
			return
		}
		if m.now >= m.step {
			m.arm()
		}
		m.due = min(m.step, m.replied+m.s.Detection(), m.begun+m.s.Detection())
	}
}

// seeking claims, or pings only, until the gateway answers.
func (m *Machine) seeking() {
	limit := m.begun + m.s.Detection()
	if m.state == Claiming {
		limit = m.begun + m.s.GiveUp()
	}
	if m.now >= limit {
		m.yield("gateway does not answer")
		return
	}
	if m.now >= m.step {
		m.letOut()
		gap := m.s.Interval
		if m.state == Claiming {
			gap = min(claimGap<<max(0, m.count-quickClaims+1), maxClaimGap)
			m.count++
			m.do(Announce)
			m.first = m.number + 1
		}
		m.ping()
		m.step = m.now + gap
	}
	m.due = min(m.step, limit)
}

// apart returns how long a router that failed leaves the address to a candidate.
func (m *Machine) apart() time.Duration {
	if m.hasCandidate() {
		return m.s.Detection()
	}
	return m.s.Interval
}

// letOut keeps the gate open for pings and claims.
func (m *Machine) letOut() {
	if m.claimed-m.now < m.s.Permit() {
		m.claimed = m.now + 2*m.s.Permit()
		m.actions = append(m.actions, Action{Kind: Claim, For: 2 * m.s.Permit()})
	}
}

// waiting pings without ARP until the gates of all others are shut.
func (m *Machine) waiting() {
	if m.silent() {
		m.lost()
		return
	}
	if m.stable != never && m.now >= m.stable+m.wait {
		m.phase, m.step, m.begun = opening, m.now, m.now
		m.open()
		return
	}
	if m.now >= m.step {
		m.letOut()
		m.ping()
		m.step = m.now + m.s.Interval
	}
	m.due = min(m.step, m.replied+m.s.Detection())
	if m.stable != never {
		m.due = min(m.due, m.stable+m.wait)
	}
}

// silent reports whether the gateway stopped answering.
func (m *Machine) silent() bool { return m.now-m.replied >= m.s.Detection() }

// lost handles a gateway that stopped answering during the wait: it answers another
// router, or nobody.
func (m *Machine) lost() {
	if m.state == Claiming && !m.isContested() {
		m.claim("")
		m.open()
		return
	}
	m.yield("gateway does not answer")
}

// yield leaves the address to others. A router that lost to a host whose heartbeats it does
// not hear stays away for long: both would claim in turn.
func (m *Machine) yield(reason string) {
	if m.isContested() {
		m.away = max(m.away, m.now+awayTime)
		m.retreat("another host claimed the address", 0)
	} else {
		m.retreat(reason, min(m.apart()<<m.failures, maxApart))
		m.failures = min(m.failures+1, 10)
	}
	m.standby()
}

// isContested reports whether a host without heartbeats claimed the address lately.
func (m *Machine) isContested() bool { return m.now-m.contested < m.s.GiveUp() }

// arm arms the gate. In the phase quick the arm has to end before the deadline.
func (m *Machine) arm() {
	life := m.s.Ticket()
	if m.phase == quick {
		life = m.s.quickArm()
		if m.now+lives(life) > m.deadline || m.mixed {
			m.slow()
			return
		}
	}
	m.letOut()
	m.actions = append(m.actions, Action{Kind: Arm, For: life})
	m.first = m.number + 1
	m.step = m.now + life
	m.pending = true
}

// slow goes on with the whole wait when the deadline is over. Shut comes first.
func (m *Machine) slow() {
	if m.state == Claiming {
		m.claim("")
	} else {
		m.do(Shut)
		m.seek()
	}
	m.open()
}

// armed sends the ping whose reply opens the gate. The arm began before now, so that it
// ends before the deadline, however late the ping leaves.
func (m *Machine) armed() {
	switch m.phase {
	case quick:
		if m.now+lives(m.s.quickArm()) > m.deadline {
			m.slow()
			return
		}
		if m.state == Claiming {
			m.do(Announce)
		}
	case opening:
	default:
		return
	}
	m.ping()
}

// echoed processes an echo reply.
func (m *Machine) echoed(number uint32) {
	sent, counts := m.pinged(number)
	if sent == past {
		return // A ping of another router.
	}
	m.failures = 0
	switch m.phase {
	case idle:
		if m.state == Active && counts && m.now-sent <= m.s.Ticket() {
			m.kept(sent)
		}
	case quick, opening:
		if counts {
			m.replied = m.now
			m.read()
		}
	case seeking:
		// The gateway answers: no more claims. If the ping left before the last claim, another
		// one begins the wait.
		m.phase, m.replied, m.step = waiting, m.now, m.now+m.s.Interval
		if counts {
			m.stable = m.now
		} else {
			m.step = m.now
		}
	case waiting:
		m.replied = m.now
		if counts && m.stable == never {
			m.stable = m.now
		}
	}
}

// permitted processes the rest of the permit.
func (m *Machine) permitted(left time.Duration) {
	// The kernel answered after the question, so that this is not after the end.
	end := m.reading + left
	starting := m.starting
	m.starting = false
	switch {
	case left == 0 || end <= m.now:
		if starting {
			m.do(Shut)
		}
		if m.state == Active {
			m.resume("gateway did not answer")
		}
	case m.state == Active:
		m.extended(end)
	case m.phase == quick, m.phase == opening:
		m.extended(end)
		m.activate("gateway answers")
	case starting && m.link && m.state == Standby:
		m.extended(end)
		m.activate("permit of the process before")
	default:
		m.do(Shut)
	}
}

// extended notes until when a permit lives. No other gate opens before: the ping that
// extended it was answered a ticket earlier at most.
func (m *Machine) extended(end time.Duration) {
	m.replied = end - m.s.Permit()
	m.held = max(m.held, end-m.safe)
}

// defended processes that another host uses the address.
func (m *Machine) defended(mac [6]byte) {
	if mac == m.s.MAC {
		return
	}
	switch m.state {
	case Standby:
		// The holder is alive, only its heartbeats are lost. It can lose its permit at any
		// time: the next probe follows soon, and later ones less often.
		if m.phase == probing {
			m.notBefore = m.now + min(m.s.Interval<<m.defences, m.s.GiveUp())
			m.defences = min(m.defences+1, 5)
		} else {
			m.notBefore = max(m.notBefore, m.now+m.s.Interval)
		}
	default:
		for i := range m.peers {
			if p := &m.peers[i]; p.MAC == mac && m.alive(p) {
				return // Heartbeats decide.
			}
		}
		m.contested = m.now
	}
}
