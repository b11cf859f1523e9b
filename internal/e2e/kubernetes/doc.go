// Package kubernetes runs the router's images on a cluster and shows what clients
// and servers see. It holds tests only:
//
//	make e2e-kubernetes
//
// They need root on the machine of the node, Go, podman and kubectl, and these
// variables:
//
//	KUBECONFIG           the cluster: one node, Multus, the CNI plugins macvlan, bridge and static, and
//	                     CoreDNS as kube-system/coredns
//	E2E_LOAD             command that brings an image of podman's into the cluster, called with its name
//	E2E_RESTART_KUBELET  command that kills the node's kubelet and starts it again
//	E2E_NODE_PID         process in the node's network namespace; by default 1, this machine's own
//	E2E_NIC              name of the NIC that the node gets; by default eth1, as in the manifests
//
// .ci/kubernetes starts a cluster and sets them. For kind, whose node is a
// container of docker's (which was not tried):
//
//	E2E_LOAD='sh -c "podman save $0 | docker load && kind load docker-image $0"'
//	E2E_RESTART_KUBELET='docker exec kind-control-plane systemctl kill --signal=KILL kubelet'
//	E2E_NODE_PID=$(docker inspect --format '{{.State.Pid}}' kind-control-plane)
//
// The physical network is made of two network namespaces and the NIC, a veth. The
// tests use the namespace egress of the cluster, and add two zones to CoreDNS. All
// of that goes again. After SIGKILL, or a test that takes too long, the namespace and
// the zones stay until the next run.
package kubernetes
