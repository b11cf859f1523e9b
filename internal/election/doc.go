// Package election decides which of several routers holds a reserved address.
package election
