package manual_test

// A command is either run by a test or not run for a reason.
type command struct {
	test   string // name of a test, or FILE: TEXT for a line of a script
	notRun string
}

// commands lists every command of the READMEs, as [manual.Page.Commands] returns it.
var commands = map[string]command{
	// Quick start: the text itself is run.
	"kubectl apply -f testdata/manifests/namespace.yaml":                                                                         {test: "TestQuickStart"},
	"kubectl apply -n egress -f testdata/manifests/multus.yaml":                                                                  {test: "TestQuickStart"},
	"kubectl logs -n egress egress-1 -c egress-router":                                                                           {test: "TestQuickStart"},
	"sed 's,localhost/egress-router$,REGISTRY/egress-router:TAG,' testdata/manifests/multus.yaml | kubectl apply -n egress -f -": {test: "TestQuickStart"},
	"kubectl wait -n egress --for=condition=Ready pod/egress-1":                                                                  {test: "TestQuickStart"},
	`kubectl annotate -n egress --overwrite pod egress-1 changed="$(date)"`:                                                      {test: "TestQuickStart"},
	"podman network create -d macvlan -o parent=eth1 --ipam-driver none egress":                                                  {test: "TestQuickStartPodman"},
	"podman run -d --name egress-1 --privileged --network podman --network egress:interface_name=macvlan0 -e EGRESS_SOURCE=192.168.12.99/24 -e EGRESS_GATEWAY=192.168.12.1 -e EGRESS_DESTINATION=203.0.113.27 localhost/egress-router": {test: "TestQuickStartPodman"},
	"podman exec egress-1 /usr/bin/egress-router health": {test: "TestQuickStartPodman"},
	"podman info --format '{{.Host.NetworkBackend}}'":    {test: "TestQuickStartPodman"},
	`sed 's/^spec:$/spec:\n  restartPolicy: OnFailure/' testdata/manifests/redirect-pod.yaml | podman play kube --network podman --network egress:interface_name=macvlan0 -`: {test: "TestQuickStartPodman"},
	"podman play kube": {test: "TestQuickStartPodman"},
	"docker network create -d macvlan -o parent=eth1 --subnet 192.168.12.0/24 --ip-range 192.168.12.192/28 egress":                                                                                                                                            {test: "TestQuickStartDocker"},
	"docker create --name egress-1 --cap-add NET_ADMIN --cap-add NET_RAW --sysctl net.ipv4.ip_forward=1 -e EGRESS_INTERFACE=eth1 -e EGRESS_SOURCE=192.168.12.99/24 -e EGRESS_GATEWAY=192.168.12.1 -e EGRESS_DESTINATION=203.0.113.27 localhost/egress-router": {test: "TestQuickStartDocker"},
	"podman save localhost/egress-router | docker load":                                                                                                                                        {test: "TestQuickStartDocker"},
	"docker network connect egress egress-1 && docker start egress-1":                                                                                                                          {test: "TestQuickStartDocker"},
	"docker inspect --format '{{.State.Pid}}' CONTAINER":                                                                                                                                       {test: "TestQuickStartDocker"},
	"ip netns add egress && ip link add egress-1 type veth peer name eth0 netns egress && ip -n egress link set lo up":                                                                         {test: "TestQuickStartNamespace"},
	"ip address add 10.128.0.1/24 dev egress-1 && ip link set egress-1 up && ip -n egress address add 10.128.0.98/24 dev eth0 && ip -n egress link set eth0 up":                                {test: "TestQuickStartNamespace"},
	"ip netns exec egress env EGRESS_ROUTER_MODE=init EGRESS_MACVLAN_PARENT=eth1 EGRESS_SOURCE=192.168.12.99/24 EGRESS_GATEWAY=192.168.12.1 EGRESS_DESTINATION=203.0.113.27 bin/egress-router": {test: "TestQuickStartNamespace"},

	"curl http://10.128.0.98/": {test: "TestQuickStartNamespace"},
	"ip netns delete egress":   {test: "TestQuickStartNamespace"},

	// The same commands, with other names and options that are a test's own.
	"kubectl exec -n egress CLIENT -- curl http://egress-1:8080/": {test: "TestQuickStart"},
	"kubectl describe pod":                               {test: "TestWrongManifests"},
	"kubectl rollout restart":                            {test: "TestDeployment"},
	"kubectl delete pod":                                 {test: "TestDeployment"},
	"nsenter -n -t PID ip a":                             {test: "TestWalkThrough"},
	"nsenter -n -t PID ip route":                         {test: "TestWalkThrough"},
	"nsenter -n -t PID iptables-save":                    {test: "TestWalkThrough"},
	"nsenter -n -t PID arping -I macvlan0 -c 2 GATEWAY":  {test: "TestWalkThrough"},
	"nsenter -n -t PID ping -c 3 GATEWAY":                {test: "TestWalkThrough"},
	"nsenter -n -t PID curl http://SERVER":               {test: "TestWalkThrough"},
	"ip neigh show dev NIC":                              {test: "TestWalkThrough"},
	"tcpdump -i NIC -e -n tcp port 80":                   {test: "TestWalkThrough"},
	"curl http://SERVICE":                                {test: "TestWalkThrough"},
	"podman inspect --format '{{.State.Pid}}' CONTAINER": {test: "TestWalkThrough"},
	"nsenter -n -t PID nft list table ip egress-router":  {test: "TestRun"},
	"egress-router help":                                 {test: "testdata/script/commands.txt: egress-router help"},
	"egress-router help plan":                            {test: "testdata/script/commands.txt: exec egress-router help plan"},
	"egress-router plan --help":                          {test: "testdata/script/commands.txt: exec egress-router plan --help"},
	"egress-router version":                              {test: "testdata/script/commands.txt: egress-router version"},
	"egress-router plan":                                 {test: "testdata/script/commands.txt: egress-router plan"},
	"egress-router plan --kernel":                        {test: "TestInitRepairsDamage"},
	"egress-router remove":                               {test: "TestRemoveLeavesNothing"},
	"egress-router wait":                                 {test: "TestWait"},
	"egress-router health":                               {test: "testdata/script/health.txt: exec nsenter --net=$ROUTER egress-router health"},
	"egress-router health -o json":                       {test: "testdata/script/health.txt: exec nsenter --net=$ROUTER egress-router health -o json"},
	"egress-router diagnose":                             {test: "TestDiagnoseNamesFault"},
	"egress-router diagnose 8080":                        {test: "TestDiagnoseOne"},
	"egress-router diagnose --pid PID":                   {test: "TestDiagnoseProcess"},
	"egress-router connections":                          {test: "TestConnections"},
	"egress-router connections --follow":                 {test: "TestConnectionsAreFollowed"},
	"egress-router http-proxy":                           {test: "testdata/script/http-proxy.txt: exec egress-router http-proxy"},
	"egress-router dns-proxy":                            {test: "testdata/script/dns-proxy.txt: exec egress-router dns-proxy"},

	// The CNI plugin.
	"egress-router-cni install --dir /opt/cni/bin":   {test: "TestInstall"},
	"egress-router-cni uninstall --dir /opt/cni/bin": {test: "TestInstall"},
	"egress-router-cni version":                      {test: "TestManageFaults"},

	// The operator.
	"kubectl apply -k cmd/egress-operator": {test: "TestKubectl"},
	"kubectl get egressrouter":             {test: "TestKubectl"},
	"kubectl describe egressrouter":        {test: "TestKubectl"},
	"helm install egress-operator cmd/egress-operator/chart --namespace egress-operator --create-namespace": {test: "TestHelm"},

	"kubectl create namespace egress":                                                      {test: "TestReadmeWalkThrough"},
	"kubectl apply -n egress -f router.yaml":                                               {test: "TestReadmeWalkThrough"},
	"kubectl delete -n egress -f router.yaml":                                              {test: "TestReadmeWalkThrough"},
	"kubectl wait -n egress --for=condition=Available egressrouter/egress-router-redirect": {test: "TestReadmeWalkThrough"},
	"kubectl get -n egress egressrouter -o wide":                                           {test: "TestReadmeWalkThrough"},
	"kubectl describe -n egress egressrouter egress-router-redirect":                       {test: "TestReadmeWalkThrough"},
	"kubectl rollout status -n egress deployment/egress-router-cni-deployment":             {test: "TestReadmeWalkThrough"},
	`kubectl patch -n egress egressrouter egress-router-redirect --type merge -p '{"spec":{"redirect":{"fallbackIP":"203.0.113.28"}}}'`: {test: "TestReadmeWalkThrough"},
	`kubectl patch -n egress egressrouter egress-router-redirect --type merge -p '{"spec":{"redirect":{"fallbackIP":"2001:db8::28"}}}'`: {test: "TestReadmeWalkThrough"},
	"kubectl delete egressrouter --all --all-namespaces":                                                           {test: "TestReadmeUninstall"},
	"kubectl wait --for=delete pod -l app.kubernetes.io/managed-by=egress-operator --all-namespaces --timeout=10m": {test: "TestReadmeUninstall"},
	"kubectl delete -k cmd/egress-operator":                                                                        {test: "TestReadmeUninstall"},
	"kubectl delete crd egressrouters.network.operator.openshift.io":                                               {test: "TestReadmeUninstall"},
	"kubectl delete namespace egress-operator":                                                                     {test: "TestReadmeUninstall"},
	"/opt/cni/bin/egress-router uninstall --dir /opt/cni/bin":                                                      {test: "TestInstall"},
	"helm uninstall egress-operator --namespace egress-operator":                                                   {notRun: "TestHelm makes the objects of the chart without a cluster"},

	// Targets.
	"make plugin":             {test: ".ci/run: make plugin"},
	"make demo":               {test: ".ci/run: make demo"},
	"make build":              {test: "Makefile: demo: build"},
	"make test":               {test: ".ci/run: make cover"},
	"make lint":               {test: ".ci/run: make lint"},
	"make e2e":                {test: ".ci/run: make e2e"},
	"make e2e-page":           {test: ".ci/run: make e2e-page"},
	"make e2e-kubernetes":     {test: ".ci/kubernetes: make e2e-kubernetes"},
	"make image":              {test: "TestImages"},
	"make bench":              {test: "TestMeasure"},
	"make bench-proxies":      {test: "TestMeasureProxies"},
	"make bench PART=standby": {test: "TestMeasureStandby"},
	"make faults":             {test: "TestInjectFaults"},

	// Not run.
	"make kernels":        {notRun: "it boots kernels, which takes minutes"},
	".ci/run":             {notRun: "it runs these tests"},
	".ci/image list":      {notRun: "TestImages reads the files of the images itself"},
	"podman system reset": {notRun: "it deletes the containers and images of the machine"},
	"podman push localhost/egress-router REGISTRY/egress-router:TAG":                     {notRun: "it needs a registry"},
	"openstack port set --allowed-address ip-address=192.168.12.99,mac-address=MAC PORT": {notRun: "it needs OpenStack"},
	"kubectl port-forward -n egress egress-1 9465":                                       {notRun: "it needs a cluster; the tests of the page forward a port themselves"},
	"crictl inspect": {notRun: "it needs a node with crictl"},
}
