"""What can be wrong with an engine's metrics page."""


class MetricsError(ValueError):
    """A Prometheus page that cannot be read, or lacks what the engine should publish."""
