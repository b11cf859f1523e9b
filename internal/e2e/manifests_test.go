package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/egress-router/egress-router/internal/manual"
)

// A NetworkAttachmentDefinition follows the specification of the Network Plumbing
// Working Group, which defines config as text.
type NetworkAttachmentDefinition struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Config string `json:"config"`
	} `json:"spec"`
}

// A macvlanConfig has the fields of the CNI plugin macvlan that the manifests use.
type macvlanConfig struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	Type       string `json:"type"`
	Master     string `json:"master"`
	Mode       string `json:"mode"`
}

// kinds are the types of the objects in manifests.
var kinds = map[string]func() any{
	"v1 ConfigMap":                             func() any { return new(corev1.ConfigMap) },
	"v1 Namespace":                             func() any { return new(corev1.Namespace) },
	"v1 Pod":                                   func() any { return new(corev1.Pod) },
	"v1 Secret":                                func() any { return new(corev1.Secret) },
	"v1 Service":                               func() any { return new(corev1.Service) },
	"v1 ServiceAccount":                        func() any { return new(corev1.ServiceAccount) },
	"apps/v1 DaemonSet":                        func() any { return new(appsv1.DaemonSet) },
	"apps/v1 Deployment":                       func() any { return new(appsv1.Deployment) },
	"apps/v1 StatefulSet":                      func() any { return new(appsv1.StatefulSet) },
	"policy/v1 PodDisruptionBudget":            func() any { return new(policyv1.PodDisruptionBudget) },
	"rbac.authorization.k8s.io/v1 Role":        func() any { return new(rbacv1.Role) },
	"rbac.authorization.k8s.io/v1 RoleBinding": func() any { return new(rbacv1.RoleBinding) },
	"k8s.cni.cncf.io/v1 NetworkAttachmentDefinition": func() any { return new(NetworkAttachmentDefinition) },
}

// A manifest is one file, decoded.
type manifest struct {
	file    string
	text    string
	objects []any
}

// decode reads all manifests. An unknown or duplicate field is an error.
func decode(t *testing.T) []manifest {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(manifests, "*.yaml"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no manifests in %s: %v", manifests, err)
	}
	var all []manifest
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		m := manifest{file: filepath.Base(name), text: string(text)}
		for i, document := range bytes.Split(text, []byte("\n---\n")) {
			var meta metav1.TypeMeta
			if err := yaml.Unmarshal(document, &meta); err != nil {
				t.Fatalf("%s, document %d: %v", m.file, i+1, err)
			}
			kind, known := kinds[meta.APIVersion+" "+meta.Kind]
			if !known {
				t.Fatalf("%s, document %d: unknown kind %q", m.file, i+1, meta)
			}
			object := kind()
			if err := yaml.UnmarshalStrict(document, object); err != nil {
				t.Errorf("%s, document %d: %v", m.file, i+1, err)
			}
			m.objects = append(m.objects, object)
		}
		all = append(all, m)
	}
	return all
}

// pods returns the pods of a manifest, including the templates of Deployments, DaemonSets and
// StatefulSets.
func (m manifest) pods() []corev1.PodTemplateSpec {
	var found []corev1.PodTemplateSpec
	for _, o := range m.objects {
		switch o := o.(type) {
		case *corev1.Pod:
			found = append(found, corev1.PodTemplateSpec{ObjectMeta: o.ObjectMeta, Spec: o.Spec})
		case *appsv1.DaemonSet:
			found = append(found, o.Spec.Template)
		case *appsv1.Deployment:
			found = append(found, o.Spec.Template)
		case *appsv1.StatefulSet:
			found = append(found, o.Spec.Template)
		}
	}
	return found
}

// Every manifest matches the Kubernetes API types, and the router accepts its
// variables.
func TestManifests(t *testing.T) {
	variables := run(t, "podman", "run", "--rm", "--network", "none", image, "help")
	all := decode(t)
	attachments := map[string]bool{}
	for _, m := range all {
		for _, o := range m.objects {
			if a, ok := o.(*NetworkAttachmentDefinition); ok {
				attachments[a.Name] = true
			}
		}
	}
	for _, m := range all {
		t.Run(m.file, func(t *testing.T) {
			maps, secrets := map[string]*corev1.ConfigMap{}, map[string]*corev1.Secret{}
			for _, o := range m.objects {
				switch o := o.(type) {
				case *corev1.ConfigMap:
					maps[o.Name] = o
				case *corev1.Secret:
					secrets[o.Name] = o
				case *appsv1.Deployment:
					checkDeployment(t, o)
				case *appsv1.StatefulSet:
					checkStatefulSet(t, o)
				case *NetworkAttachmentDefinition:
					checkAttachment(t, o)
				case *corev1.Service:
					if o.Spec.Type != corev1.ServiceTypeExternalName && m.file != "service.yaml" && !m.sets("EGRESS_STANDBY_ENDPOINTS", o.Name) && !slices.ContainsFunc(m.pods(), func(p corev1.PodTemplateSpec) bool { return selects(o.Spec.Selector, p.Labels) }) {
						t.Errorf("Service %s selects no pod of its file", o.Name)
					}
				}
			}
			for _, p := range m.pods() {
				if network := p.Annotations["k8s.v1.cni.cncf.io/networks"]; network != "" {
					if name, link, _ := strings.Cut(network, "@"); !attachments[name] || link != "macvlan0" {
						t.Errorf("pod %s: its network %q is not macvlan0 from one of the manifests", p.Name, network)
					}
				}
				for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
					if !slices.Contains(images, strings.TrimPrefix(c.Image, "localhost/")) {
						t.Errorf("container %s: image %q is none of ours", c.Name, c.Image)
					}
					switch {
					case slices.Equal(c.Args, []string{"wait"}):
						if s := c.SecurityContext; s != nil && s.Privileged != nil && *s.Privileged {
							t.Errorf("container %s waits with privilege", c.Name)
						}
					case c.Image == image:
						checkRouter(t, c, p.Spec, maps, secrets, variables)
					case strings.HasSuffix(c.Image, "-proxy"):
						checkProxy(t, c, variables)
					}
				}
			}
		})
	}
}

func selects(selector, labels map[string]string) bool {
	for key, value := range selector {
		if labels[key] != value {
			return false
		}
	}
	return len(selector) > 0
}

// value returns the value of a variable of the router in a pod; empty: it is not set.
func value(p corev1.PodSpec, variable string) string {
	for _, c := range p.Containers {
		for _, e := range c.Env {
			if e.Name == variable {
				return e.Value
			}
		}
	}
	return ""
}

// sets reports whether a pod of the manifest has a variable with a value.
func (m manifest) sets(variable, to string) bool {
	return slices.ContainsFunc(m.pods(), func(p corev1.PodTemplateSpec) bool { return value(p.Spec, variable) == to })
}

// checkDeployment checks that one pod at a time has the reserved address, or that the pods
// stand by for each other, on different nodes.
func checkDeployment(t *testing.T, d *appsv1.Deployment) {
	t.Helper()
	if value(d.Spec.Template.Spec, "EGRESS_STANDBY") == "true" {
		if !apart(d.Spec.Template) {
			t.Errorf("Deployment %s could run two routers on one node", d.Name)
		}
	} else if d.Spec.Replicas == nil || *d.Spec.Replicas != 1 || d.Spec.Strategy.Type != appsv1.RecreateDeploymentStrategyType {
		t.Errorf("Deployment %s could run two routers at once", d.Name)
	}
	if d.Spec.Selector == nil || !selects(d.Spec.Selector.MatchLabels, d.Spec.Template.Labels) {
		t.Errorf("Deployment %s does not select its pods", d.Name)
	}
}

// apart reports whether the pods of a template run on different nodes.
func apart(pod corev1.PodTemplateSpec) bool {
	a := pod.Spec.Affinity
	return a != nil && a.PodAntiAffinity != nil && slices.ContainsFunc(a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution, func(term corev1.PodAffinityTerm) bool {
		return term.TopologyKey == "kubernetes.io/hostname" && selects(term.LabelSelector.MatchLabels, pod.Labels)
	})
}

// checkStatefulSet checks that the pods stand by for each other on different nodes, each with
// source ports of its own.
func checkStatefulSet(t *testing.T, s *appsv1.StatefulSet) {
	t.Helper()
	if value(s.Spec.Template.Spec, "EGRESS_STANDBY") != "true" || !apart(s.Spec.Template) {
		t.Errorf("StatefulSet %s could run two routers at once, or on one node", s.Name)
	}
	if ports, want := value(s.Spec.Template.Spec, "EGRESS_STANDBY_PORTS"), fmt.Sprintf("$(INDEX)/%d", *s.Spec.Replicas); ports != want {
		t.Errorf("StatefulSet %s: EGRESS_STANDBY_PORTS is %q, want %q", s.Name, ports, want)
	}
	if s.Spec.Selector == nil || !selects(s.Spec.Selector.MatchLabels, s.Spec.Template.Labels) {
		t.Errorf("StatefulSet %s does not select its pods", s.Name)
	}
}

func checkAttachment(t *testing.T, a *NetworkAttachmentDefinition) {
	t.Helper()
	decoder := json.NewDecoder(strings.NewReader(a.Spec.Config))
	decoder.DisallowUnknownFields()
	var config macvlanConfig
	if err := decoder.Decode(&config); err != nil {
		t.Errorf("NetworkAttachmentDefinition %s: %v", a.Name, err)
	}
	if config.Type != "macvlan" || config.Master == "" || config.CNIVersion == "" {
		t.Errorf("NetworkAttachmentDefinition %s: %+v", a.Name, config)
	}
}

// placeholder is the key of heartbeats in the manifests. The router refuses it.
const placeholder = "CHANGE-ME"

// The objects of routers that stand by fit together: the names in their variables, in the
// rules of the Role and in the references of one object to another.
func TestStandbyManifests(t *testing.T) {
	found := 0
	for _, m := range decode(t) {
		if !m.sets("EGRESS_STANDBY", "true") {
			continue
		}
		found++
		services := map[string]*corev1.Service{}
		var role *rbacv1.Role
		var binding *rbacv1.RoleBinding
		for _, o := range m.objects {
			switch o := o.(type) {
			case *corev1.Service:
				services[o.Name] = o
			case *rbacv1.Role:
				role = o
			case *rbacv1.RoleBinding:
				binding = o
			case *policyv1.PodDisruptionBudget:
				if !selects(o.Spec.Selector.MatchLabels, m.pods()[0].Labels) {
					t.Errorf("%s: PodDisruptionBudget %s selects no pod", m.file, o.Name)
				}
			}
		}
		pod := m.pods()[0].Spec
		if !strings.Contains(m.text, "\n  key: "+placeholder+"\n") {
			t.Errorf("%s: a key that everybody knows is not too short", m.file)
		}
		peers := services[value(pod, "EGRESS_STANDBY_PEERS")]
		if peers == nil || peers.Spec.ClusterIP != corev1.ClusterIPNone || !peers.Spec.PublishNotReadyAddresses || len(peers.Spec.Ports) != 1 || peers.Spec.Ports[0].Port != 9467 {
			t.Errorf("%s: no headless Service of all peers with the port of heartbeats: %+v", m.file, peers)
		}
		name := value(pod, "EGRESS_STANDBY_ENDPOINTS")
		if name == "" {
			if role != nil || pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
				t.Errorf("%s: the router has access to the API server that it does not use", m.file)
			}
			continue
		}
		if s := services[name]; s == nil || len(s.Spec.Selector) != 0 || slices.ContainsFunc(s.Spec.Ports, func(p corev1.ServicePort) bool { return p.TargetPort.StrVal != "" }) {
			t.Errorf("%s: Service %s has a selector or a targetPort with a name: %+v", m.file, name, s)
		}
		slicesOf := []string{name + "-egress-router", name + "-egress-router-ipv6"}
		want := []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"services"}, ResourceNames: []string{name}, Verbs: []string{"get"}},
			{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, ResourceNames: slicesOf, Verbs: []string{"get", "patch", "create"}},
			{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices/restricted"}, Verbs: []string{"create"}},
		}
		if role == nil || !reflect.DeepEqual(role.Rules, want) {
			t.Errorf("%s: Role %+v, want the rules %+v", m.file, role, want)
		}
		if binding == nil || binding.RoleRef.Name != role.Name || len(binding.Subjects) != 1 || binding.Subjects[0].Name != pod.ServiceAccountName || binding.Subjects[0].Namespace != "egress" {
			t.Errorf("%s: RoleBinding %+v does not bind the Role to the pod's service account %s", m.file, binding, pod.ServiceAccountName)
		}
	}
	if found == 0 {
		t.Error("no manifest with EGRESS_STANDBY")
	}
}

// checkRouter checks a container that runs the router: its variables are known, plan
// accepts them, and it has the privilege that the router needs.
func checkRouter(t *testing.T, c corev1.Container, pod corev1.PodSpec, configMaps map[string]*corev1.ConfigMap, secrets map[string]*corev1.Secret, variables string) {
	t.Helper()
	mounts := map[string]map[string]string{} // directory -> file -> text
	for _, m := range c.VolumeMounts {
		for _, v := range pod.Volumes {
			if v.Name == m.Name && v.ConfigMap != nil && configMaps[v.ConfigMap.Name] != nil {
				mounts[m.MountPath] = configMaps[v.ConfigMap.Name].Data
			}
			if v.Name == m.Name && v.Secret != nil && secrets[v.Secret.SecretName] != nil {
				mounts[m.MountPath] = maps.Clone(secrets[v.Secret.SecretName].StringData)
				for file, text := range mounts[m.MountPath] {
					mounts[m.MountPath][file] = strings.Replace(text, placeholder, "a key of 16 bytes or more", 1)
				}
			}
		}
		if mounts[m.MountPath] == nil {
			t.Errorf("container %s mounts %s, which is from no ConfigMap or Secret of the file", c.Name, m.Name)
		}
	}
	args := []string{"podman", "run", "--rm", "--network", "none", "--cap-drop", "all"}
	fields := strings.NewReplacer() // of a pod, in the values of later variables
	for _, e := range c.Env {
		if e.ValueFrom != nil && e.ValueFrom.FieldRef != nil {
			const index = "metadata.labels['apps.kubernetes.io/pod-index']"
			if e.Name != "INDEX" || e.ValueFrom.FieldRef.FieldPath != index {
				t.Errorf("container %s: %s is the field %s, want INDEX and %s", c.Name, e.Name, e.ValueFrom.FieldRef.FieldPath, index)
			}
			fields = strings.NewReplacer("$("+e.Name+")", "0")
			continue
		}
		if !strings.Contains(variables, "\n  "+e.Name+" ") {
			t.Errorf("container %s sets the unknown variable %s of the router", c.Name, e.Name)
		}
		value := fields.Replace(e.Value)
		if e.ValueFrom != nil {
			key := e.ValueFrom.ConfigMapKeyRef
			if key == nil || configMaps[key.Name] == nil || configMaps[key.Name].Data[key.Key] == "" {
				t.Errorf("container %s: %s comes from no ConfigMap of the file", c.Name, e.Name)
				continue
			}
			value = configMaps[key.Name].Data[key.Key]
		}
		if strings.HasSuffix(e.Name, "_FILE") {
			text, there := mounts[filepath.Dir(value)][filepath.Base(value)]
			if !there {
				t.Errorf("container %s: nothing mounts %s", c.Name, value)
			}
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, filepath.Base(value)), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			args = append(args, "--volume", dir+":"+filepath.Dir(value)+":ro")
		}
		args = append(args, "--env", e.Name+"="+value)
	}
	if err := command(append(args, image, "plan")...).run(); err != nil {
		t.Errorf("container %s: %v", c.Name, err)
	}
	s := c.SecurityContext
	if s == nil || (s.Privileged == nil || !*s.Privileged) &&
		(s.Capabilities == nil || !slices.Contains(s.Capabilities.Add, "NET_ADMIN") || !slices.Contains(s.Capabilities.Add, "NET_RAW")) {
		t.Errorf("container %s has neither privilege nor capabilities", c.Name)
	}
}

// checkProxy checks a container that runs a proxy: its variables are known, its
// destinations are valid, and it has no privilege.
func checkProxy(t *testing.T, c corev1.Container, variables string) {
	t.Helper()
	if s := c.SecurityContext; s != nil && (s.Privileged != nil || s.Capabilities == nil || len(s.Capabilities.Add) != 0) {
		t.Errorf("container %s has more privilege than the default: %v", c.Name, s)
	}
	args := []string{"podman", "run", "--rm", "--network", "none", "--cap-drop", "all"}
	for _, e := range c.Env {
		if !strings.Contains(variables, "\n  "+e.Name+" ") {
			t.Errorf("container %s sets the unknown variable %s of the proxy", c.Name, e.Name)
		}
		args = append(args, "--env", e.Name+"="+e.Value)
	}
	mode := strings.ToUpper(strings.NewReplacer("localhost/", "", "-", "_").Replace(c.Image)) + "_MODE"
	if err := command(append(args, "--env", mode+"=unit-test", c.Image)...).run(); err != nil {
		t.Errorf("container %s: %v", c.Name, err)
	}
}

// applied are the pages whose YAML a test on a cluster applies as it stands, by that test's
// file.
var applied = map[string]string{
	"cmd/egress-operator/README.md":   "../../cmd/egress-operator/internal/envtest/readme_test.go",
	"cmd/egress-router-cni/README.md": "kubernetes/plugin_test.go",
}

// The YAML in the READMEs is in the manifests: one of them contains the lines of each
// block, in the same order. Other YAML a test applies from the page.
func TestREADME(t *testing.T) {
	pages, err := manual.Pages("../..")
	if err != nil {
		t.Fatal(err)
	}
	all, blocks := decode(t), 0
	for _, page := range pages {
		if file := applied[page.Path]; file != "" {
			if code, err := os.ReadFile(file); err != nil || !strings.Contains(string(code), page.Path) {
				t.Errorf("%s does not apply the YAML of %s: %v", file, page.Path, err)
			}
			continue
		}
		for _, block := range page.Blocks() {
			if block.Language != "yaml" {
				continue
			}
			blocks++
			longest, where := 0, ""
			lines := strings.Split(strings.TrimSuffix(block.Text, "\n"), "\n")
			for _, m := range all {
				if n := inOrder(lines, strings.Split(m.text, "\n")); n > longest {
					longest, where = n, m.file
				}
			}
			if longest < len(lines) {
				t.Errorf("%s: a line is not in %s, which fits best:\n%s", page.Path, where, lines[longest])
			}
		}
	}
	if blocks == 0 {
		t.Fatal("the READMEs contain no manifest")
	}
}

// inOrder returns how many lines, counted from the first, text contains in this order.
func inOrder(lines, text []string) int {
	n := 0
	for _, line := range text {
		if n < len(lines) && line == lines[n] {
			n++
		}
	}
	return n
}

// Every manifest is run by a test, here or on a cluster.
func TestManifestsAreRun(t *testing.T) {
	code := map[string]bool{}
	tests, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	onCluster, err := filepath.Glob("kubernetes/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(tests, onCluster...) {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if name != "manifests_test.go" {
			for _, quoted := range regexp.MustCompile(`"[a-z-]+\.yaml"`).FindAllString(string(text), -1) {
				code[strings.Trim(quoted, `"`)] = true
			}
		}
	}
	for _, m := range decode(t) {
		if !code[m.file] {
			t.Errorf("no test runs %s; those that are run: %v", m.file, fmt.Sprint(slices.Sorted(maps.Keys(code))))
		}
	}
}
