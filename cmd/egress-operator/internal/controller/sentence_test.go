package controller

import "testing"

func TestSentence(t *testing.T) {
	const id = "3f2b8e0c4d5a69788f1e2d3c4b5a69783f2b8e0c4d5a69788f1e2d3c4b5a6978"
	const plugin = `looking for NIC "eth7" of the node: not found; set spec.networkInterface.macvlan.master`
	for _, test := range []struct{ name, message, want string }{
		{"containerd and Multus", `Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox "` + id + `": plugin type="multus" name="multus-cni-network" failed (add): [egress/egress-router-cni-deployment-575465c75c-qkq6m/0b1c:egress-router-cni-nad]: error adding container to network "egress-router-cni-nad": ` + plugin, plugin},
		{"combined from similar events", `(combined from similar events): Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox "` + id + `": plugin type="multus" name="multus-cni-network" failed (add): [a/b/c:net]: error adding container to network "net": ` + plugin, plugin},
		{"Multus as a daemon", `Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox "` + id + `": plugin type="multus-shim" name="multus-cni-network" failed (add): CmdAdd (shim): CNI request failed with status 400: 'ContainerID:"` + id + `" Netns:"/var/run/netns/cni-1" IfName:"eth0" [a/b/c:net]: error adding container to network "net": ` + plugin + "\n': StdinData: {\"a\":1}", plugin},
		{"CRI-O", `Failed to create pod sandbox: rpc error: code = Unknown desc = failed to create pod network sandbox k8s_p_egress(` + id + `): error adding pod egress_p to CNI network "multus-cni-network": plugin type="multus" name="multus-cni-network" failed (add): [a/b/c:net]: error adding container to network "net": ` + plugin, plugin},
		{"the cluster's own plugin", `Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox "` + id + `": plugin type="bridge" failed (add): open /run/netns/cni-1234: no such file`, "open …: no such file"},
		{"no plugin", `Failed to create pod sandbox: rpc error: code = DeadlineExceeded desc = sandbox ` + id + ` took too long`, "sandbox … took too long"},
		{"other text", "something else", "something else"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if found := sentence(test.message); found != test.want {
				t.Errorf("want  %s\nfound %s", test.want, found)
			}
		})
	}
}
