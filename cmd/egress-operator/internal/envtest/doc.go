// Package envtest tests the operator with a real API server: the schema of the resource,
// the admission policy, the objects and their reconciliation, and the rights and the
// memory of the program. All tests share one API server, and each has a namespace of its
// own. Only a kubelet, the controllers of Kubernetes and its garbage collector are
// missing: a test writes what they would.
//
// The programs etcd and kube-apiserver come from the directory in KUBEBUILDER_ASSETS.
package envtest
