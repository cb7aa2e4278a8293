"""Where the demo's workload comes from: the data folder, else the synthetic generator."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pointsman_cli.demo.errors import DemoError
from pointsman_cli.demo.options import WorkloadName
from pointsman_cli.demo.site import Site, declared_score
from pointsman_common.data_folder import (
    DATA_VARIABLE,
    TEST_SCORES,
    TRACES,
    NoDataFolderError,
    find_data_folder,
)
from pointsman_common.files import reason
from pointsman_core.resources import LLMExpert
from pointsman_core.workload import (
    DOMAINS,
    Arrivals,
    QualityTable,
    Workload,
    compose,
    parse_arrivals,
    parse_quality,
    synthetic,
)
from pointsman_core.workload import column_of as column_of_names


@dataclass(frozen=True, slots=True)
class TraceData:
    """Real arrivals, and prompts with real scores."""

    arrivals: Arrivals
    table: QualityTable


def data_folder() -> Path | None:
    """The folder of public data, found as the laboratory finds it; raises DemoError."""
    try:
        return find_data_folder()
    except NoDataFolderError as error:
        raise DemoError(str(error)) from None


def load_traces(name: WorkloadName) -> TraceData | None:
    """Read the trace and the scores; None means synthetic.

    ``auto`` takes the Azure chat trace where it is and the generator where it is not.
    """
    if name is WorkloadName.SYNTHETIC:
        return None
    folder = data_folder()
    trace = TRACES[WorkloadName.AZURE_CONV if name is WorkloadName.AUTO else name]
    missing = [
        file for file in (trace, TEST_SCORES) if folder is None or not (folder / file).is_file()
    ]
    if missing and name is WorkloadName.AUTO:
        return None
    if folder is None or missing:
        where = folder or f"no data folder (run `pointsman data fetch`, or set {DATA_VARIABLE})"
        raise DemoError(f"--workload {name} needs {', '.join(missing)}: {where}")
    return TraceData(
        arrivals=parse_arrivals(_read(folder / trace), source=Path(trace).name),
        table=parse_quality(_read(folder / TEST_SCORES), source=TEST_SCORES),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"{path} cannot be read: {reason(error)}") from error


def make_workload(
    traces: TraceData | None, site: Site, *, requests: int, rate: float, seed: int
) -> Workload:
    """The requests that every decider gets."""
    if traces is not None:
        return compose(traces.arrivals, traces.table, requests=requests, rate=rate, seed=seed)
    means = {expert.metadata.name: _domain_means(expert) for expert in site.experts}
    return synthetic(requests=requests, rate=rate, seed=seed, means=means)


def mean_input_tokens(workload: Workload, max_input_tokens: int) -> float:
    """Mean length of the prompts as they are sent."""
    return float(np.minimum(workload.arrivals.input_tokens, max_input_tokens).mean())


def _domain_means(expert: LLMExpert) -> dict[str, float]:
    quality = expert.spec.quality
    declared = {domain.name: domain.score for domain in quality.domains}
    return {domain: declared.get(domain, quality.default) for domain in DOMAINS}


class SiteGrader:
    """Scores by the workload's table; by an expert's declared prior where it has none."""

    def __init__(self, site: Site, workload: Workload) -> None:
        self._site = site
        self._prompts = workload.prompts
        self._scores = workload.scores
        self._column = {
            expert.metadata.name: column_of(expert, workload.table.experts)
            for expert in site.experts
        }

    @property
    def unscored_experts(self) -> list[str]:
        """Experts that the table does not know at all."""
        return [name for name, column in self._column.items() if column is None]

    def score(self, index: int, expert: str) -> tuple[float, bool]:
        """Score from 0 to 1 of the expert's answer to a request, and whether it was measured."""
        column = self._column.get(expert)
        if column is not None and not np.isnan(self._scores[index, column]):
            return float(self._scores[index, column]), True
        known = self._site.expert(expert)
        prior = 0.0 if known is None else declared_score(self._site, known, self._prompts[index])
        return prior, False


def column_of(expert: LLMExpert, names: tuple[str, ...]) -> int | None:
    """Column of a score table that belongs to an expert, by model name, alias or name."""
    own = (expert.spec.model, *expert.spec.aliases, expert.metadata.name)
    return column_of_names(own, names)
