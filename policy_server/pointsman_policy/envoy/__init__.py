"""The Envoy in front of the experts: its settings, its bootstrap, its process.

`docs/envoy.md` explains the filter chain and how it behaves when something is away.
"""

from pointsman_policy.envoy._bootstrap import envoy_binary, render_bootstrap
from pointsman_policy.envoy._settings import EnvoySettings
from pointsman_policy.envoy.process import EnvoyStartError, RunningEnvoy, running_envoy

__all__ = [
    "EnvoySettings",
    "EnvoyStartError",
    "RunningEnvoy",
    "envoy_binary",
    "render_bootstrap",
    "running_envoy",
]
