// Package kubernetes tests the router's images on a cluster, from the side of clients
// and servers. It contains tests only:
//
//	make e2e-kubernetes
//
// They need root on the machine of the nodes, Go, podman and kubectl, and these
// variables:
//
//	KUBECONFIG           the cluster: three nodes with both families of addresses, of which one is not cordoned,
//	                     Multus, the CNI plugin macvlan, and CoreDNS as kube-system/coredns
//	E2E_LOAD             command that loads an image of podman into all nodes, called with its name
//	E2E_RESTART_KUBELET  command that kills the first node's kubelet and starts it again
//	E2E_NODE_PID         number of a process in the first node's namespaces, which are not this machine's
//	E2E_NODE             command for faults, called with kill, start, partition or heal, and the name of a node
//	E2E_NODE_INIT        command that prints the number of a process in a node's namespaces, called with its name
//	E2E_NIC              name of the NIC that this node gets; by default eth1, as in the manifests
//
// .ci/kubernetes starts a cluster and sets them. For kind, whose nodes are docker
// containers (not tried):
//
//	E2E_LOAD='sh -c "podman save $0 | docker load && kind load docker-image $0"'
//	E2E_RESTART_KUBELET='docker exec kind-worker systemctl kill --signal=KILL kubelet'
//	E2E_NODE_PID=$(docker inspect --format '{{.State.Pid}}' kind-worker)
//	E2E_NODE_INIT='docker inspect --format {{.State.Pid}}'
//
// The physical network consists of two network namespaces and the NIC, a veth. The
// tests use the namespaces egress and egress-restricted of the cluster, install the operator
// and the CNI plugin, and add two zones to CoreDNS. They remove all of it at the end. After SIGKILL or the timeout of go test the namespace
// and the zones remain until the next run.
package kubernetes
