package envtest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/egress-router/egress-router/cmd/egress-operator/api"
	"github.com/egress-router/egress-router/cmd/egress-operator/internal/controller"
)

// patience ends a test that hangs. No test measures time by it.
const patience = 10 * time.Minute

var (
	environment *envtest.Environment
	admin       *rest.Config  // may do everything
	cluster     client.Client // of admin, without a cache
	scheme      = runtime.NewScheme()
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run starts etcd and the API server, with the resource and that of Multus.
func run(m *testing.M) int {
	ctrl.SetLogger(logr.FromSlogHandler(slog.DiscardHandler))
	if err := errorsOf(clientscheme.AddToScheme(scheme), api.AddToScheme(scheme)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	environment = &envtest.Environment{
		CRDDirectoryPaths:        []string{filepath.Join("..", "..", "chart", "crds"), "testdata"},
		ErrorIfCRDPathMissing:    true,
		ControlPlaneStartTimeout: patience,
		ControlPlaneStopTimeout:  patience,
	}
	var err error
	if admin, err = environment.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "start API server: %v\nset KUBEBUILDER_ASSETS to a directory with etcd and kube-apiserver, or run make test-operator\n", err)
		return 1
	}
	defer func() {
		if err := environment.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	admin.QPS = -1
	if cluster, err = client.New(admin, client.Options{Scheme: scheme}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := install(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// install installs the manifests: the tests run the operator with the rights that they
// give it.
func install() error {
	objects, err := kustomize()
	if err != nil {
		return err
	}
	for _, o := range objects {
		if err := cluster.Apply(context.Background(), client.ApplyConfigurationFromUnstructured(o), client.FieldOwner("install"), client.ForceOwnership); err != nil {
			return fmt.Errorf("apply %s %s: %w", o.GetKind(), o.GetName(), err)
		}
	}
	return nil
}

func errorsOf(all ...error) error {
	for _, err := range all {
		if err != nil {
			return err
		}
	}
	return nil
}

// newNamespace creates a namespace for a test.
func newNamespace(t *testing.T) string {
	t.Helper()
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-", Labels: map[string]string{
		"pod-security.kubernetes.io/enforce": "restricted",
	}}}
	if err := cluster.Create(t.Context(), namespace); err != nil {
		t.Fatal(err)
	}
	return namespace.Name
}

// startOperator starts an operator for a namespace, as the user of its ServiceAccount, and
// returns a function that stops it.
func startOperator(t *testing.T, namespace string, change ...func(*controller.Options)) (stop func()) {
	t.Helper()
	o := controller.Options{
		Image: "localhost/egress-router", Namespace: namespace, DefaultRoute: controller.Auto,
		MetricsListen: "0", HealthListen: "0", Log: testLog(t),
	}
	for _, c := range change {
		c(&o)
	}
	manager, err := controller.New(operatorConfig(), o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- manager.Start(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// operatorConfig is that of the operator's ServiceAccount, whose rights come from the
// manifests.
func operatorConfig() *rest.Config {
	c := rest.CopyConfig(admin)
	c.Impersonate = rest.ImpersonationConfig{
		UserName: "system:serviceaccount:egress-operator:egress-operator",
		Groups:   []string{"system:serviceaccounts", "system:serviceaccounts:egress-operator", "system:authenticated"},
	}
	return c
}

// testLog returns the log of a test, which ends after all that is cleaned up before it.
func testLog(t *testing.T) *slog.Logger {
	w := &testWriter{t: t}
	t.Cleanup(w.end)
	return slog.New(slog.NewTextHandler(w, nil))
}

// A testWriter writes to the log of a test until the test ends. The recorder of events
// may write later, since the manager does not wait for it.
type testWriter struct {
	t *testing.T

	mu    sync.Mutex
	ended bool
}

func (w *testWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		w.t.Log(strings.TrimSuffix(string(p), "\n"))
	}
	return len(p), nil
}

func (w *testWriter) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
}

// eventually waits until a condition holds: found returns what it found instead.
func eventually(t *testing.T, what string, found func() (ok bool, instead any)) {
	t.Helper()
	var last any
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		ok, instead := found()
		if ok {
			return
		}
		last = instead
	}
	t.Fatalf("%s: found %+v", what, last)
}
