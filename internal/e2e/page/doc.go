// Package page shows the status page of a running router to a real browser: Debian's
// chromium, without a window. It contains tests only:
//
//	make e2e-page
//
// installs chromium, and axe-core, which judges accessibility, and leaves screenshots of
// every state in bin/page. A router runs in a lab of namespaces; the browser reaches its
// page by a port of its own loopback, as with kubectl port-forward.
package page
