"""The gRPC policy server around pointsman_core."""
