"""Generated gRPC stubs of pointsman.v1."""
