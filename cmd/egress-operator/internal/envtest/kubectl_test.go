package envtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// kubeconfig writes a file for an API server and a user.
func kubeconfig(t *testing.T, c *rest.Config) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	err := clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters: map[string]*clientcmdapi.Cluster{"c": {Server: c.Host, CertificateAuthorityData: c.CAData}},
		AuthInfos: map[string]*clientcmdapi.AuthInfo{"u": {
			ClientCertificateData: c.CertData, ClientKeyData: c.KeyData,
			Impersonate: c.Impersonate.UserName, ImpersonateGroups: c.Impersonate.Groups,
		}},
		Contexts:       map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}},
		CurrentContext: "x",
	}, file)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// The commands of the README and of the platform's manual, with kubectl itself.
func TestKubectl(t *testing.T) {
	namespace := newNamespace(t)
	startOperator(t, namespace)
	file := kubeconfig(t, admin)
	kubectl := func(stdin string, args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(os.Getenv("KUBEBUILDER_ASSETS"), "kubectl"), append([]string{"--kubeconfig", file, "-n", namespace}, args...)...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("kubectl %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	// The namespace of the manifests is their own.
	if out := kubectl("", "apply", "-k", root, "-n", "", "--server-side", "--force-conflicts"); strings.Count(out, "serverside-applied") < 10 {
		t.Errorf("apply -k:\n%s", out)
	}
	if out := kubectl(example, "apply", "-f", "-"); !strings.HasSuffix(out, "egressrouter.network.operator.openshift.io/egress-router-redirect created\n") || strings.Contains(out, "Warning") {
		t.Errorf("apply -f:\n%s", out)
	}
	exists(t, namespace, deployment)
	status(t, namespace, "egress-router-redirect", "FTF", "")
	for _, test := range []struct {
		args string
		want string
	}{
		{"get egressrouter", "NAME                     CONDITION   STATUS\negress-router-redirect   Available   False\n"},
		{"get egressrouter -o wide", "NAME                     CONDITION   STATUS   DEGRADED   REASON\negress-router-redirect   Available   False    False      AsExpected\n"},
		{"get network-attachment-definition -o name", "networkattachmentdefinition.k8s.cni.cncf.io/egress-router-cni-nad\n"},
		{"get deployment -o name", "deployment.apps/egress-router-cni-deployment\n"},
	} {
		if out := kubectl("", strings.Fields(test.args)...); out != test.want {
			t.Errorf("kubectl %s: want\n%sfound\n%s", test.args, test.want, out)
		}
	}
	if out := kubectl("", "describe", "egressrouter"); !strings.Contains(out, "Reason:                AsExpected\n") {
		t.Errorf("describe:\n%s", out)
	}
}
