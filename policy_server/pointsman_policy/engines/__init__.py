"""Reading the load of inference engines from their Prometheus pages.

Each engine names its gauges its own way; an :class:`Adapter` maps one engine's names to
an :class:`EngineLoad`. Ollama and plain OpenAI servers publish no such page and have no
adapter.
"""

from pointsman_core.state import EngineLoad
from pointsman_policy.engines.adapter import (
    ADAPTERS,
    LLAMACPP,
    SGLANG,
    VLLM,
    Adapter,
    adapter_for,
)
from pointsman_policy.engines.errors import MetricsError

__all__ = [
    "ADAPTERS",
    "LLAMACPP",
    "SGLANG",
    "VLLM",
    "Adapter",
    "EngineLoad",
    "MetricsError",
    "adapter_for",
]
