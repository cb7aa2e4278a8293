"""Makes the scenario of a window from options, in whichever process needs it."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pointsman_core.prediction import DeclaredPriors
from pointsman_core.predictors import Artefact, builtin_artefact, model_key
from pointsman_core.snapshot import Snapshot
from pointsman_core.state import FloatArray
from pointsman_core.workload import WorkloadError
from pointsman_learning.evaluation.plan import Window
from pointsman_learning.simulator.scenario import Scenario
from pointsman_learning.workloads import (
    ArrivalProcess,
    Corpus,
    DataFolder,
    Pool,
    Process,
    Split,
    default_corpus,
    edge_site,
    load_pool,
    make_scenario,
    outages,
    user_arrivals,
    user_corpus,
)
from pointsman_learning.workloads.arrivals import arrival_process
from pointsman_learning.workloads.folder import TEST_SCORES, TRACES
from pointsman_learning.workloads.pools import names_of

PRIORS = "priors"
"""As a predictor: the quality that experts declare, by domain."""
BUILTIN = "builtin"
"""As a predictor: the learned one that is shipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composer:
    """What the scenarios of one evaluation are made of; a `Source` for the runner.

    Held-out parts only: prompts of the test split, and of traces the last part.
    """

    requests: int
    """Requests of each window."""
    predictor: str = PRIORS
    """`PRIORS`, `BUILTIN`, or the file of a predictor."""
    experts: Path | None = None
    """Manifests; None: the edge site of the examples."""
    policy: str | None = None
    """Name of the policy in the manifests."""
    quality_data: Path | None = None
    """A quality table of one's own; all its prompts are asked."""
    arrivals: Path | None = None
    """A trace of one's own."""
    outages: bool = False
    """Whether an endpoint fails, and another joins, within every window."""
    split: Split = "test"

    def __call__(self, window: Window) -> Scenario:
        """Make the scenario.

        Raises:
            WorkloadError: the parts do not fit together.

        """
        return make_scenario(
            pool_snapshot=self.pool(),
            process=self.process(window.workload),
            load=window.load,
            limits=window.limit,
            split=self.split,
            requests=self.requests,
            seed=window.seed,
            corpus=self.corpus(),
            predictor=self.predicted(),
            mishaps=outages if self.outages else None,
        )

    def pool(self) -> Snapshot:
        """The endpoints; raises ManifestErrors and WorkloadError."""
        return _pool(self)

    def corpus(self) -> Corpus:
        """Prompts and scores; raises WorkloadError."""
        return _corpus(self)

    def process(self, workload: str) -> ArrivalProcess:
        """Arrivals of that name; raises WorkloadError."""
        return _process(self, workload)

    def predicted(self) -> FloatArray | None:
        """(P, X) predicted quality of the corpus's prompts; None: declared priors.

        Raises ArtefactError and OSError for a file that cannot be used.
        """
        return None if self.predictor == PRIORS else _predicted(self)

    def disjoint_windows(self, workload: str) -> int | None:
        """How many windows of that workload do not overlap; None: no end of them."""
        return self.process(workload).disjoint_windows(self.requests)


def available_workloads() -> tuple[str, ...]:
    """Names of the arrival processes whose data is at hand."""
    folder = DataFolder.find()
    return tuple(
        process.value
        for process in Process
        if process not in TRACES or (folder is not None and folder.has(TRACES[process]))
    )


def default_predictor(quality_data: Path | None = None) -> str:
    """`BUILTIN` for real prompts, `PRIORS` for synthetic ones, of which it knows nothing."""
    folder = DataFolder.find()
    real = quality_data is not None or (folder is not None and folder.has(TEST_SCORES))
    return BUILTIN if real else PRIORS


@lru_cache(maxsize=2)
def _pool(composer: Composer) -> Snapshot:
    if composer.experts is None:
        return edge_site()
    return load_pool(composer.experts, policy=composer.policy)


@lru_cache(maxsize=2)
def _corpus(composer: Composer) -> Corpus:
    if composer.quality_data is not None:
        corpus = user_corpus(composer.quality_data)
    else:
        pool = Pool(snapshot=composer.pool(), blends={}, name="")
        corpus = default_corpus(composer.split, pool)
    _columns(composer.pool(), corpus)  # raises for an expert without scores
    return corpus


def _columns(snapshot: Snapshot, corpus: Corpus) -> list[int]:
    """(E,) each candidate's column of the scores."""
    return [corpus.column(*names_of(candidate)) for candidate in snapshot.candidates]


@lru_cache(maxsize=16)
def _process(composer: Composer, workload: str) -> ArrivalProcess:
    if composer.arrivals is not None and workload == workload_name(composer.arrivals):
        return user_arrivals(composer.arrivals)
    return arrival_process(workload, split=composer.split)


def workload_name(arrivals: Path) -> str:
    """What the workload of a trace of one's own is called."""
    return arrivals.stem


@lru_cache(maxsize=2)
def _predicted(composer: Composer) -> FloatArray:
    artefact = load_artefact(composer.predictor)
    corpus, snapshot = composer.corpus(), composer.pool()
    said = artefact.predict(corpus.prompts).quality
    column = {model_key(name): number for number, name in enumerate(artefact.info.experts)}
    # Experts that it does not know are judged by what they declare, as in service.
    quality = _declared(corpus, snapshot)
    for x, name in enumerate(corpus.experts):
        known = column.get(model_key(name))
        if known is not None:
            quality[:, x] = said[:, known]
    return quality


def _declared(corpus: Corpus, snapshot: Snapshot) -> FloatArray:
    priors, columns = DeclaredPriors(snapshot), _columns(snapshot, corpus)
    quality = np.zeros((len(corpus), len(corpus.experts)))
    for row, prompt in enumerate(corpus.prompts):
        quality[row, columns] = priors.predict(prompt).quality
    return quality


def load_artefact(name: str) -> Artefact:
    """The predictor of that name or file; one that needs embeddings is refused.

    Raises ArtefactError, OSError, and WorkloadError where it needs embeddings.
    """
    artefact = (
        builtin_artefact() if name == BUILTIN else Artefact(Path(name).read_bytes(), source=name)
    )
    if artefact.info.embedding:
        raise WorkloadError("needs sentence embeddings, which nobody makes here", source=name)
    return artefact
