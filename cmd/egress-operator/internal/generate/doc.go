// Package generate generates the definition of the resource EgressRouter and the deep
// copies of its types by the packages of controller-gen. It is a test, which compares the
// files with the types and rewrites them if -update is set (make golden), so that no
// generator has to be installed.
package generate
