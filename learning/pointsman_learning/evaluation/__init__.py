"""Deciders compared on held-out workloads."""

from pointsman_learning.evaluation.composer import (
    BUILTIN,
    PRIORS,
    Composer,
    available_workloads,
    default_predictor,
    workload_name,
)
from pointsman_learning.evaluation.drawn import SITE, DrawnPools
from pointsman_learning.evaluation.metrics import Metrics, measure
from pointsman_learning.evaluation.models import TrainedModel, load_models
from pointsman_learning.evaluation.plan import Plan, Task, Window
from pointsman_learning.evaluation.plots import draw_all
from pointsman_learning.evaluation.registry import (
    BOUND,
    LOOKAHEAD,
    Contender,
    contenders,
    from_decider,
    register,
    registered,
)
from pointsman_learning.evaluation.report import as_markdown, print_report
from pointsman_learning.evaluation.results import (
    BEST_BASELINE,
    Results,
    as_document,
    collect,
    summarise,
    write_parquet,
)
from pointsman_learning.evaluation.runner import Pace, Run, run_all
from pointsman_learning.evaluation.statistics import Interval, mean_intervals, paired_differences
from pointsman_learning.simulator import DeciderFailedError

__all__ = [
    "BEST_BASELINE",
    "BOUND",
    "BUILTIN",
    "LOOKAHEAD",
    "PRIORS",
    "SITE",
    "Composer",
    "Contender",
    "DeciderFailedError",
    "DrawnPools",
    "Interval",
    "Metrics",
    "Pace",
    "Plan",
    "Results",
    "Run",
    "Task",
    "TrainedModel",
    "Window",
    "as_document",
    "as_markdown",
    "available_workloads",
    "collect",
    "contenders",
    "default_predictor",
    "draw_all",
    "from_decider",
    "load_models",
    "mean_intervals",
    "measure",
    "paired_differences",
    "print_report",
    "register",
    "registered",
    "run_all",
    "summarise",
    "workload_name",
    "write_parquet",
]
