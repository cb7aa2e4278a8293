"""A simulated OpenAI-compatible inference engine."""
