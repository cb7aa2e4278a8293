"""Makes the scenario of a window from options, in whichever process needs it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pointsman_common.data_folder import TEST_SCORES, TRACES
from pointsman_core.prediction import DeclaredPriors
from pointsman_core.predictors import Artefact, builtin_artefact, model_key
from pointsman_core.snapshot import Snapshot
from pointsman_core.state import BoolArray, FloatArray
from pointsman_core.workload import WorkloadError
from pointsman_learning.evaluation.drawn import DrawnPools
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
    limits_of,
    load_pool,
    make_scenario,
    outages,
    user_arrivals,
    user_corpus,
)
from pointsman_learning.workloads.arrivals import arrival_process
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
    """A quality table of one's own; of the test split all its prompts are asked."""
    arrivals: Path | None = None
    """A trace of one's own."""
    base_limits_ms: tuple[float, ...] | None = None
    """Base limits in ms per token; None: those that go with each workload."""
    outages: bool = False
    """Whether an endpoint fails, and another joins, within every window."""
    drawn: DrawnPools | None = None
    """Random pools in place of the site, one for each seed; its experts are what they draw."""
    split: Split = "test"

    @property
    def own_part(self) -> Split | None:
        """Which part of one's own data; None, all of it, to be evaluated."""
        return None if self.split == "test" else self.split

    def __call__(self, window: Window) -> Scenario:
        """Make the scenario.

        Raises:
            WorkloadError: the parts do not fit together.

        """
        said = self.said()
        pool = self.pool() if self.drawn is None else self.drawn.draw(window.seed)
        scenario = make_scenario(
            pool_snapshot=pool,
            process=self.process(window.workload),
            load=window.load,
            limits=replace(limits_of(window.limit), base_ms=self.base_limits_ms),
            split=self.split,
            requests=self.requests,
            seed=window.seed,
            corpus=self.corpus(),
            predictor=None if said is None else said.quality,
            predictor_name=self.predictor_note(),
            predicted_tokens=None if said is None else said.output_tokens,
            mishaps=outages if self.outages else None,
        )
        if self.drawn is None:
            return scenario
        note = f"{self.drawn.name}, drawn anew by each seed ({scenario.endpoints} here)"
        return replace(scenario, description=f"{scenario.description}; endpoints: {note}")

    def pool(self) -> Snapshot:
        """The site; raises ManifestErrors, and WorkloadError, also where both are given."""
        if self.drawn is not None and self.experts is not None:
            raise WorkloadError(
                "has experts of its own: random pools are drawn from those of the edge site",
                source=str(self.experts),
            )
        return _pool(self)

    def corpus(self) -> Corpus:
        """Prompts and scores; raises WorkloadError."""
        return _corpus(self)

    def process(self, workload: str) -> ArrivalProcess:
        """Arrivals of that name; raises WorkloadError."""
        return _process(self, workload)

    def said(self) -> "Said | None":
        """What the predictor says of the corpus's prompts; None: declared priors.

        Raises ArtefactError, WorkloadError and OSError for a file that cannot be used.
        """
        return None if self.predictor == PRIORS else _said(self)

    @property
    def predictor_file(self) -> Path | None:
        """The predictor's, where it is one's own."""
        return None if self.predictor in (PRIORS, BUILTIN) else Path(self.predictor)

    def predictor_note(self) -> str:
        """Predictor's name, and how many of the site's experts it knows."""
        said = self.said()
        if said is None:
            return "declared priors"
        experts = {c.expert: names_of(c) for c in self.pool().candidates}
        corpus = self.corpus()
        learned = sum(bool(said.learned[corpus.column(*names)]) for names in experts.values())
        rest = "" if learned == len(experts) else ", declared priors for the others"
        if self.drawn is not None:
            rest += ", mixtures for models without scores"
        return f"{self.predictor} ({learned} of {len(experts)} experts learned{rest})"

    def setting(self) -> Mapping[str, Any]:
        """What was run, for the files: everything that a result depends on but the plan."""
        setting = {
            "requests": self.requests,
            "site": str(self.experts or "examples/edge-site"),
            "policy": self.pool().full_name,
            "endpoints": len(self.pool().candidates),
            "experts": len({c.expert for c in self.pool().candidates}),
            "predictor": self.predictor_note(),
            "prompts": len(self.corpus()),
            "quality_data": self.corpus().source,
            "arrivals": None if self.arrivals is None else str(self.arrivals),
            "base_limits_ms": self.base_limits_ms,
            "outages": self.outages,
            "split": self.split,
        }
        return setting if self.drawn is None else setting | self.drawn.setting()

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
        corpus = user_corpus(composer.quality_data, composer.own_part)
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
        return user_arrivals(composer.arrivals, composer.own_part)
    return arrival_process(workload, split=composer.split)


def workload_name(arrivals: Path) -> str:
    """What the workload of a trace of one's own is called."""
    return arrivals.stem


class Said(NamedTuple):
    """What a predictor says of P prompts and X experts of a corpus."""

    quality: FloatArray
    """(P, X); of experts that it does not know what they declare, as in service."""
    output_tokens: FloatArray
    """(P, X) learned lengths of answers, NaN where none was learned."""
    learned: BoolArray
    """(X,) whether it knows the expert."""


@lru_cache(maxsize=2)
def _said(composer: Composer) -> Said:
    artefact = load_artefact(composer.predictor)
    corpus, snapshot = composer.corpus(), composer.pool()
    answers = artefact.predict(corpus.prompts)
    column = {model_key(name): number for number, name in enumerate(artefact.info.experts)}
    quality = _declared(corpus, snapshot)
    tokens = np.full_like(quality, np.nan)
    learned = np.zeros(len(corpus.experts), np.bool_)
    for x, name in enumerate(corpus.experts):
        known = column.get(model_key(name))
        if known is not None:
            learned[x] = True
            quality[:, x] = answers.quality[:, known]
            tokens[:, x] = answers.output_tokens[:, known]
    return Said(quality, tokens, learned)


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
