package nft

import "time"

// Count returns the number of live elements of a set of the gate.
func (g Gate) Count(set string) (int, error) {
	found, err := g.elements(set)
	return len(found), err
}

// Extend does what an answer to a ping does.
func (g Gate) Extend(d time.Duration) error {
	return g.change("extend permit", permitSet, live{set: permitSet, left: d})
}

// Answered returns the number of answers to live tickets that the gate has handled.
func (g Gate) Answered() (uint64, error) { return g.count(replyChain) }
