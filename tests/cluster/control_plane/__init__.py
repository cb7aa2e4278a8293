"""A real Kubernetes control plane for tests: etcd and the API server, on loopback."""
