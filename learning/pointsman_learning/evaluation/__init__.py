"""Deciders compared on held-out workloads."""
