"""What the command line asks of the demo. Imports little: ``pointsman --help`` reads it."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pointsman_core.resources import Algorithm

TELLING_DECIDERS = "RoundRobin,ShortestQueue,QualityGreedy,LatencyQualityGreedy,ImpactGreedy,HanDrl"
"""From blind by way of one-sided and greedy to learned: what a first look should show (ours)."""
MAX_LIMIT_MS = 600_000.0
"""As a RoutingPolicy allows."""


class WorkloadName(StrEnum):
    """Arrivals and prompts to choose from; ``auto`` takes real data where present."""

    AUTO = "auto"
    AZURE_CONV = "azure-conv"
    AZURE_CODE = "azure-code"
    SYNTHETIC = "synthetic"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Options of one call."""

    seconds: float
    """Length of the arrivals of one run."""
    rate: float | None
    """Requests per second; None takes a share of the site's capacity."""
    deciders: "tuple[Algorithm, ...]"
    manifests: Path
    output_dir: Path
    workload: WorkloadName
    limit_ms: float | None
    """Limit on the latency per token; None takes the policy's."""
    seed: int
    keep_running: bool
    compare: bool = False
    """Whether the laboratory's simulator gets the same requests."""
