# Everything here runs from a clean clone on a machine that has Go and make.
# What else a target needs, it installs first (as root, or with sudo).

export CGO_ENABLED = 0
GO      ?= go
# The version is the source's own: without it (-buildvcs) a clone of another user
# does not build. Empty where git cannot tell.
VERSION := $(shell git describe --always --dirty 2>/dev/null)
# Nothing here speaks HTTP/2, which would be 530 KB of the program.
TAGS     = nethttpomithttp2
LDFLAGS  = -s -w -buildid= -X github.com/egress-router/egress-router/internal/cli.version=$(VERSION)
export GOFLAGS += -buildvcs=false

.PHONY: help demo test build lint fuzz golden bench bench-proxies image e2e e2e-kubernetes clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 17

demo: build iptables ## run the main job in a lab of namespaces and show what a client sees
	$(GO) run ./cmd/egress-lab demo bin/egress-router

test: iptables nft curl squid haproxy strace ## run all tests, on the real kernel
	$(GO) test ./...

build: ## build bin/egress-router, static
	$(GO) build -trimpath -tags $(TAGS) -ldflags '$(LDFLAGS)' -o bin/egress-router ./cmd/egress-router

lint: ## gofmt, vet and golangci-lint
	.ci/lint

fuzz: ## fuzz the grammars, the framing of requests and ARP, 30 s each
	$(GO) test -fuzz FuzzParse -fuzztime 30s ./rules
	$(GO) test -fuzz FuzzLines -fuzztime 30s ./rules
	$(GO) test -fuzz FuzzParse -fuzztime 30s ./internal/tcpproxy
	$(GO) test -fuzz FuzzParse -fuzztime 30s ./internal/httpproxy
	$(GO) test -fuzz FuzzFraming -fuzztime 30s ./internal/httpproxy
	$(GO) test -fuzz FuzzParse -fuzztime 30s ./internal/arp

golden: ## rewrite testdata/golden and script after a change that is meant
	$(GO) test ./internal/cli -run Golden -update
	$(GO) test ./cmd/egress-router -run Scripts -update

bench: build iptables nft ## measure what it costs, as ratios; PART=load, connections or throughput for less
	$(GO) run ./cmd/egress-lab bench bin/egress-router $(PART)

bench-proxies: build squid haproxy ## measure the proxies beside squid and haproxy; PART=http or dns for less
	$(GO) run ./cmd/egress-lab bench-proxies bin/egress-router $(PART)

image: ## build the container images, and print their sizes
	.ci/image

e2e: ## run the images as pods and containers with podman (as root)
	cd internal/e2e && $(GO) test -count=1 .

e2e-kubernetes: ## run them on the cluster of KUBECONFIG, with E2E_LOAD to load images (as root)
	cd internal/e2e && $(GO) test -count=1 -v -timeout 20m ./kubernetes

clean: ## remove what was built
	rm -rf bin

.PHONY: iptables nft curl squid haproxy strace
iptables curl squid haproxy strace:
	@.ci/install $@
nft:
	@.ci/install nftables:nft
