// Package object reads the resource EgressRouter and says which router it describes, with a
// fault for each field that is wrong. It is pure.
package object
