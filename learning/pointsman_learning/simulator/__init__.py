"""Endpoints with continuous batching, in simulated time."""
