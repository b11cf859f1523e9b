# Every target runs from a clean clone on a machine that has Go and make. A target
# installs the programs that it needs first (as root, or with sudo), and prints their
# names.

export CGO_ENABLED = 0
# go.mod pins a toolchain without known vulnerabilities, which Go downloads. The go.env of
# an installation may default to "local", which would ignore it; a value in the environment
# counts.
export GOTOOLCHAIN ?= auto
GO      ?= go
# The version comes from git: with -buildvcs, a clone of another user does not build.
# It is empty if git fails.
VERSION := $(shell git describe --always --dirty 2>/dev/null)
# The program does not use HTTP/2, which would add 530 KB to it.
TAGS     = nethttpomithttp2
LDFLAGS  = -s -w -buildid= -X github.com/egress-router/egress-router/internal/cli.version=$(VERSION)
export GOFLAGS += -buildvcs=false

# gotestsum prints a package when it ends: go test holds it back until all packages
# before it have ended. Tests wait more than they compute: more packages, and more tests of
# each, than processors run at a time. "make lint" runs vet, of all its kinds. A test
# binary without debugging information links in half the time.
GOTEST   = $(GO) tool -modfile=$(CURDIR)/.ci/tools/go.mod gotestsum --format pkgname-and-test-fails --format-hide-empty-pkg -- -p 4 -parallel $(PARALLEL) -vet=off -ldflags='-s -w'
PARALLEL = 8
# Some of their tests flood the kernel: fewer at a time lose no packets of others.
test-long cover race: PARALLEL = 4
# The longest first, those that wait among those that compute.
PACKAGES = ./internal/router ./internal/lab/faults ./cmd/egress-router ./internal/iptables ./internal/nft ./internal/cni ./... ./.ci

.PHONY: help demo test test-long test-iptables test-operator race cover build plugin lint tidy vulnerabilities fuzz golden golden-operator bench bench-proxies faults image e2e e2e-page e2e-kubernetes kernels clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 17

demo: build iptables ## run a router in a lab of namespaces and show the answers that a client gets
	$(GO) run ./cmd/egress-lab demo bin/egress-router

test: programs ## run all tests on the real kernel, in the short variant
	$(GOTEST) -timeout 30m $(PACKAGES)

test-long: programs ## run all tests, with 1,300 random damages and whole measurements
	EGRESS_TEST_LONG=1 $(GOTEST) -timeout 60m $(PACKAGES)

test-iptables: programs ## test with iptables of two other Debian releases, downloaded to bin/iptables
	.ci/iptables-versions bin/iptables bullseye trixie
	EGRESS_TEST_IPTABLES=$(CURDIR)/bin/iptables $(GO) test -count=1 -v -timeout 30m -run Version ./internal/iptables

test-operator: ## test the operator with the API server of KUBEBUILDER_ASSETS, or one that it builds (as root)
	.ci/operator

# Without the measurements, the suites of single iptables calls, and a test of the
# program's memory. A process ends at its first race, which fails its test, and not a
# second later than without the detector.
race: programs gcc ## run the tests with the race detector, in a random order
	CGO_ENABLED=1 GORACE='halt_on_error=1 atexit_sleep_ms=0' $(GOTEST) -timeout 30m -race -shuffle=on -skip IdleClients \
		$$($(GO) list ./... | grep -v -e /cmd/egress-lab$$ -e /internal/iptables$$)

cover: programs ## run the tests and print the coverage of each package
	.ci/cover $(GOTEST) -timeout 60m $(PACKAGES)

build: ## build bin/egress-router, static
	$(GO) build -trimpath -tags $(TAGS) -ldflags '$(LDFLAGS)' -o bin/egress-router ./cmd/egress-router

plugin: ## build bin/egress-router-cni, the CNI plugin, static
	$(GO) build -trimpath -ldflags '-s -w -buildid= -X github.com/egress-router/egress-router/internal/cni.number=$(VERSION)' -o bin/egress-router-cni ./cmd/egress-router-cni

lint: ## run gofmt, go vet and golangci-lint
	.ci/lint

tidy: ## check that go mod tidy would not change go.mod and go.sum of any module
	for module in . internal/e2e cmd/egress-operator .ci/tools; do (cd $$module && $(GO) mod tidy -diff) || exit 1; done

vulnerabilities: ## check all modules for known vulnerabilities, with govulncheck
	.ci/vulnerabilities

FUZZTIME = 30s
fuzz: ## fuzz every grammar, and each format that comes from outside, for FUZZTIME=30s each
	@grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9]+' rules internal | while IFS=: read -r file function; do \
		set -x; $(GO) test -run '^$$' -fuzz "^$${function#func }$$" -fuzztime $(FUZZTIME) "./$${file%/*}" </dev/null || exit 1; \
	done

golden: ## rewrite testdata/golden, script and the READMEs' tables after an intended change
	$(GO) test ./internal/cli -run Golden -update
	$(GO) test ./rules -run Sources -update
	$(GO) test ./cmd/egress-router -run Scripts -update
	$(GO) test ./internal/config ./internal/metrics -run Documentation -update
	cd cmd/egress-operator && $(GO) test ./internal/generate -update && $(GO) test ./internal/operator -run Documentation -update

golden-operator: ## rewrite the golden files of the operator, with an API server as in test-operator
	.ci/operator ./internal/envtest -run 'Objects|Several' -update

# The tables of the README come from a run.
TABLES = $(if $(README),-readme cmd/egress-lab/README.md)

bench: build iptables nft keepalived plugin ## measure the router, as ratios, and the CNI plugin; PART=load, connections, throughput or standby for one part, README=1 for the tables of the README
	$(GO) run ./cmd/egress-lab bench $(TABLES) bin/egress-router $(PART)
	$(if $(PART),,$(GO) test -run '^$$' -bench . -benchtime 25x ./cmd/egress-router-cni)

bench-proxies: build squid haproxy ## measure the proxies and squid or haproxy; PART=http or dns for one part, README=1 as for bench
	$(GO) run ./cmd/egress-lab bench-proxies $(TABLES) bin/egress-router $(PART)

faults: build nft ## inject COUNT=20 rounds of random faults into routers that stand by for each other; SEED repeats a run
	$(GO) run ./cmd/egress-lab faults bin/egress-router $(or $(COUNT),20) $(SEED)

image: ## build the container images and print their sizes
	.ci/image

e2e: ## run the images as pods and containers with podman and docker (as root)
	cd internal/e2e && $(GO) test -count=1 -v -timeout 30m .

# The npm package of axe-core is one file for browsers.
AXE = $(CURDIR)/bin/axe/node_modules/axe-core/axe.min.js
e2e-page: programs ## show the status page to chromium, and leave screenshots in bin/page
	@.ci/install chromium
	@[ -e $(AXE) ] || { .ci/install npm && npm install --prefix bin/axe --no-save --no-audit --no-fund axe-core@4.14.1; }
	mkdir -p bin/page
	cd internal/e2e && EGRESS_TEST_AXE=$(AXE) EGRESS_TEST_SCREENSHOTS=$(CURDIR)/bin/page $(GO) test -count=1 -v -timeout 30m ./page

e2e-kubernetes: ## run the images on the cluster of KUBECONFIG, with E2E_LOAD to load images (as root)
	cd internal/e2e && $(GO) test -count=1 -v -timeout 30m ./kubernetes

# VERSION is that of the program, unless the command line has it.
kernels: ## run a test of each feature on other kernels, with the scripts of KERNELS (as root); VERSION=6.1 for one, FEATURE=name for one
	.ci/kernels $(if $(filter command,$(origin VERSION)),$(VERSION))

clean: ## remove bin
	rm -rf bin

.PHONY: programs iptables nft squid haproxy keepalived gcc
programs:
	@.ci/install iptables nftables:nft curl squid haproxy keepalived strace prometheus:promtool
iptables squid haproxy keepalived:
	@.ci/install $@
nft:
	@.ci/install nftables:nft
gcc: # the race detector is a library in C
	@.ci/install gcc libc6-dev:/usr/include/stdlib.h
