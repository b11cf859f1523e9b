// Package election decides which of several routers holds a reserved address: one at most at
// any instant, and again one a fraction of a second after the holder was lost.
//
// A [Machine] is the decision of one router without any input or output. Heartbeats of its
// peers, echo replies of the gateway and the state of its kernel come in as events; changes of
// the gate, pings, claims and heartbeats are returned as actions.
//
// # The gate
//
// A gate in the kernel of each router lets packets with the reserved address out while it has
// a permit. A ping that leaves gets a ticket, which lives L1 = 1.5 intervals. An echo reply to
// a ping with a live ticket extends the permit by L2 = 4 intervals if the permit lives, or if
// the gate is armed. So the gate shuts by itself when the process ends or hangs, when the
// network fails, or when the gateway answers another router, which is what it does after
// another router has claimed the address.
//
// # Invariant
//
// At most one gate is open at any instant, whatever messages and frames are lost, delayed,
// repeated or overtaken, however long processes pause. Assumptions: the rates of two clocks
// differ by at most 1 %; frames from one router to the gateway keep their order; the gateway
// sends an echo reply to the MAC address in its neighbour table, and changes that only by ARP
// (or neighbour discovery) of a router with the address. All pings of all routers have the same
// source and the same destination, so that one entry of one table decides. Proof:
//
//   - Shut in time: if the gateway last answered A at r, A's gate is shut at r + Quiet. The ping
//     left before r, its ticket ends before r + L1, and the reply extends the permit by L2.
//   - By the wait: B claims. A reply to a ping sent after its last claim arrives at t; the gateway
//     answered it at g0 <= t. B sends no ARP from then on, since its gate is shut and it does not
//     claim again, and at t + Opening arms its gate, pings, and the gateway answers at g1. At g0
//     and at g1 the table had B, and no ARP of B arrived between, so that it had B throughout:
//     nobody else was answered from g0 to g1. All other gates are shut at g0 + Quiet, before g1.
//     Opening is Quiet by clocks that differ. A claim after arming begins with Shut.
//   - Until others open: the gateway answered holder A at r. Whoever opens by the wait has g0 > r,
//     so it opens after r + Opening. So each answered ping keeps all others shut until Quiet after
//     it was sent, by A's clock ([Machine].held), while A's replies are no further apart.
//   - Resuming: A opens again after a lapse if its arm ends before held + Quiet. Later it waits as
//     after a claim, but without one: ARP of the time before, still under way, could have made the
//     gateway answer A while another gate is open.
//   - By promise: A held the address, shut its gate, and promises at h on an ask of B sent at q < h.
//     A's last answered ping left at most L1 before h, so nobody else opens by the wait until
//     q - L1 + Quiet, later than q + L2; A itself does not resume after a promise, and promises once.
//     B's arm ends before q + L2. From B's first reply on, all others need a wait after it.
//   - Pauses: an arm that opens early has begun before the event Armed, which checks the time, and
//     the ping that can use it leaves after that. However late the ping is, the arm has ended in
//     time. A reply to a late ping opens nothing without a live ticket and permit.
//
// Heartbeats decide who claims and when. None of them opens a gate, except for a promise.
//
// # Bounds
//
// With the interval I = 20 ms: a lost holder is replaced after detection (3 I) + probe (10 ms) +
// Opening (115 ms). When all faults have ended, one router holds within 8 s: a router that lost
// to a claimant whose heartbeats it did not hear stays away for 5 s, attempts to claim while
// the gateway was silent are up to 2 s apart, and the takeover itself takes less than a second.
package election
