"""Pools: which experts stand on which hardware; from manifests, or drawn at random."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pointsman_common.data_folder import checkout
from pointsman_core.batching import BLOCK_TOKENS
from pointsman_core.capacity import capacity as endpoints_capacity
from pointsman_core.cost import CostModel
from pointsman_core.manifests import compile_manifests, parse_manifests
from pointsman_core.resources import (
    Admission,
    Algorithm,
    Backend,
    DomainScore,
    ExpertLimits,
    LLMExpert,
    LLMExpertSpec,
    ObjectMeta,
    PerformanceProfile,
    QualityPriors,
)
from pointsman_core.snapshot import NO_VERSION, Candidate, Snapshot, compile_snapshot
from pointsman_core.state import FloatArray, IntArray
from pointsman_core.workload import WorkloadError
from pointsman_learning.workloads.corpus import Corpus
from pointsman_learning.workloads.folder import read_text

EDGE_SITE = Path("examples") / "edge-site"

_POLICY = """
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {name: auto}
spec: {models: [auto]}
"""


@dataclass(frozen=True, slots=True)
class Blend:
    """An expert that is none of the corpus: its score is a mixture of two that are. Ours.

    On a share of the prompts, told by a hash of the prompt, it answers as ``second`` does,
    else as ``first``; its predicted quality is the mixture of theirs.
    """

    first: str
    second: str
    share: float


@dataclass(frozen=True, slots=True)
class Pool:
    """A set of experts on hardware, and where their scores come from."""

    snapshot: Snapshot
    blends: Mapping[str, Blend]
    """Expert's name -> what it is mixed from; the others have scores of their own."""
    name: str


# --- From manifests --------------------------------------------------------------------


def edge_site(
    *, algorithm: Algorithm | None = None, admission: Admission | None = None
) -> Snapshot:
    """Return the default pool: the six experts of examples/edge-site on unequal boards.

    Raises WorkloadError where examples/ is not at hand, as in an installed wheel.
    """
    return with_policy(_edge_site(), algorithm=algorithm, admission=admission)


@lru_cache(maxsize=1)
def _edge_site() -> Snapshot:
    folder = checkout() / EDGE_SITE
    if not folder.is_dir():
        raise WorkloadError(
            "is not here; it comes with a checkout: name manifests of your own", source=str(folder)
        )
    return load_pool(folder)


def load_pool(path: Path, *, policy: str | None = None) -> Snapshot:
    """Compile a snapshot from a manifest file, or all of a folder.

    Of several policies ``policy`` counts, else the one that answers ``auto``, else the first
    by name; without any policy all experts take part. Raises ManifestErrors for errors in
    the manifests and WorkloadError when there is nothing to route to.
    """
    files = (
        sorted(f for f in path.iterdir() if f.suffix in {".yaml", ".yml"} and f.is_file())
        if (path.is_dir())
        else [path]
    )
    sources = {str(file): read_text(file) for file in files}
    declared = [parse_manifests(text, source=name) for name, text in sources.items()]
    if not any(each.located_policies for each in declared):
        sources["a policy for all"] = _POLICY
    snapshots = compile_manifests(sources).snapshots
    known = [s for s in snapshots if policy is None or s.policy == policy]
    if not known:
        names = ", ".join(s.policy for s in snapshots)
        raise WorkloadError(f"has no policy {policy}; it has {names}", source=str(path))
    chosen = min(known, key=lambda s: ("auto" not in s.models, s.full_name))
    if not chosen.candidates:
        raise WorkloadError("has no expert with an address to route to", source=str(path))
    return chosen


def with_policy(
    snapshot: Snapshot, *, algorithm: Algorithm | None = None, admission: Admission | None = None
) -> Snapshot:
    """The same pool under another algorithm or admission, with a version of its own."""
    update: dict[str, object] = {}
    if algorithm is not None:
        update["algorithm"] = algorithm
    if admission is not None:
        update["admission"] = admission
    if all(getattr(snapshot, name) == value for name, value in update.items()):
        return snapshot
    draft = snapshot.model_copy(update={**update, "version": NO_VERSION})
    version = hashlib.sha256(draft.model_dump_json().encode()).hexdigest()[:16]
    return draft.model_copy(update={"version": version})


def names_of(candidate: Candidate) -> tuple[str, ...]:
    """Names under which a corpus may know the expert."""
    return (*candidate.served_models, candidate.expert)


def columns_of(pool: Pool, corpus: Corpus) -> tuple[IntArray, IntArray, FloatArray]:
    """Where each candidate's scores are: (first column, second column, share of the second).

    Each is (E,); without a blend both columns are the same and the share is 0. Raises
    WorkloadError for an expert of which the corpus has no scores.
    """
    first, second, share = [], [], []
    for candidate in pool.snapshot.candidates:
        blend = pool.blends.get(candidate.expert)
        if blend is None:
            first.append(corpus.column(*names_of(candidate)))
            second.append(first[-1])
            share.append(0.0)
        else:
            first.append(corpus.column(blend.first))
            second.append(corpus.column(blend.second))
            share.append(blend.share)
    return np.array(first, np.int64), np.array(second, np.int64), np.array(share)


def room_of(snapshot: Snapshot) -> IntArray:
    """(E,) tokens of prompt and answer together that one request may have at each endpoint."""
    costs = (CostModel.from_profile(c.profile, c.limits) for c in snapshot.candidates)
    cached = [cost.kv_capacity_tokens // BLOCK_TOKENS * BLOCK_TOKENS for cost in costs]
    contexts = [c.limits.context_tokens for c in snapshot.candidates]
    return np.minimum(np.array(contexts, np.int64), np.array(cached, np.int64))


def capacity(
    snapshot: Snapshot,
    *,
    input_tokens: float,
    output_tokens: float | Sequence[float] | FloatArray,
    limit_s: float = math.inf,
) -> float:
    """Requests per second that the pool can sustain: the definition of a load of 1.

    Every endpoint runs its largest batch all the time on requests of mean lengths, in tokens;
    those of answers may differ by endpoint, (E,). Loads are measured without a limit, so that
    they mean the same rate for tight limits and loose ones; with ``limit_s`` only batches count
    that keep it. See `pointsman_core.capacity`.
    """
    costs = [CostModel.from_profile(c.profile, c.limits) for c in snapshot.candidates]
    lengths = np.broadcast_to(np.asarray(output_tokens, np.float64), (len(costs),))
    endpoints = tuple(zip(costs, map(float, lengths), strict=True))
    return _capacity(endpoints, float(input_tokens), limit_s)


@lru_cache(maxsize=1024)
def _capacity(
    endpoints: tuple[tuple[CostModel, float], ...], input_tokens: float, limit_s: float
) -> float:
    return endpoints_capacity(endpoints, input_tokens=input_tokens, limit_s=limit_s)


# --- Random pools ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Board:
    """Hardware that experts run on, by data sheet: dense FP16 with FP32 accumulation."""

    name: str
    tflops: float
    bandwidth_gbps: float
    memory_gib: float
    """For the model and its cache: all of the board's, or half of what a SoC shares."""
    source: str
    overhead_ms: float = 2.0
    max_batched_tokens: int = 512


_ADA = "NVIDIA Ada GPU architecture whitepaper"
_GA102 = "NVIDIA GA102 GPU architecture whitepaper"
_TWICE = "NVIDIA product page; twice its FP32"

BOARDS: tuple[Board, ...] = (
    Board("rtx-4090", 165.2, 1008.0, 24.0, _ADA),
    Board("rtx-4080", 97.5, 716.8, 16.0, _ADA),
    Board("rtx-4070-ti", 80.2, 504.0, 12.0, _TWICE),
    Board("rtx-4060-ti-16gb", 44.1, 288.0, 16.0, _TWICE),
    Board("rtx-3090", 71.0, 936.0, 24.0, _GA102),
    Board("rtx-3080", 59.5, 760.0, 10.0, _GA102),
    Board("rtx-3060", 25.5, 360.0, 12.0, _TWICE, max_batched_tokens=256),
    Board("rtx-a4000", 76.7, 448.0, 16.0, "NVIDIA RTX A4000 data sheet, half of its sparse 153.4"),
    Board("l4", 121.0, 300.0, 24.0, "NVIDIA L4 data sheet, half of its sparse 242"),
    Board("a10", 125.0, 600.0, 24.0, "NVIDIA A10 data sheet"),
    Board("a2", 18.0, 200.0, 16.0, "NVIDIA A2 data sheet", max_batched_tokens=256),
    Board("t4", 65.0, 320.0, 16.0, "NVIDIA T4 data sheet"),
    Board(
        "agx-orin-64gb",
        42.5,
        204.8,
        32.0,
        "NVIDIA Jetson AGX Orin technical brief, a quarter of 170 sparse INT8 TOPS",
        overhead_ms=5.0,
        max_batched_tokens=256,
    ),
    Board(
        "orin-nx-16gb",
        15.0,
        102.4,
        11.0,
        "NVIDIA Jetson Orin NX data sheet, a quarter of the GPU's 60 sparse INT8 TOPS",
        overhead_ms=5.0,
        max_batched_tokens=256,
    ),
)
"""Boards of edge sites, as commonly published, none measured here."""

UNSEEN_BOARDS: tuple[Board, ...] = (
    Board("l40s", 362.05, 864.0, 48.0, "NVIDIA L40S data sheet"),
    Board("rtx-a6000", 154.8, 768.0, 48.0, "NVIDIA RTX A6000 data sheet, half of its sparse 309.7"),
    Board("rtx-a5000", 111.1, 768.0, 24.0, "NVIDIA RTX A5000 data sheet, half of its sparse 222.2"),
    Board("a30", 165.0, 933.0, 24.0, "NVIDIA A30 data sheet"),
    Board("v100-pcie-16gb", 112.0, 900.0, 16.0, "NVIDIA V100 data sheet"),
    Board(
        "rtx-a2000-12gb",
        31.95,
        288.0,
        12.0,
        "NVIDIA RTX A2000 data sheet, half of its sparse 63.9",
        max_batched_tokens=256,
    ),
)
"""Boards that no training draws, for evaluation on hardware never seen; from data sheets too."""

SMALL_SHARE = 0.15
"""Of a random pool's endpoints that are models of which no scores are known. Ours."""

BYTES_PER_PARAMETER = (2.0, 1.0, 0.55)
"""Of 16, 8 and 4 bit weights."""
MAX_CONTEXT = 8192
MIN_CONTEXT = 4096
"""A board whose cache holds less than this is not used for a model."""
SLOWEST_S = 0.075
"""Latency per token, alone, above which no one would run a model on a board. Ours."""


@dataclass(frozen=True, slots=True)
class SmallModel:
    """A model of 3 to 4 billion parameters, of which the corpus has no scores."""

    name: str
    parameters_billions: float
    kv_bytes_per_token: int


SMALL_MODELS = (
    SmallModel("small-llama-3b", 3.21, 114_688),  # 28 layers, 8 KV heads of 128
    SmallModel("small-qwen-3b", 3.09, 36_864),  # 36 layers, 2 KV heads of 128
    SmallModel("small-phi-4b", 3.82, 393_216),  # 32 layers, 32 KV heads of 96
)
"""Sizes of common small models; their scores are `Blend`s of two larger ones."""


def random_pool(
    rng: np.random.Generator,
    endpoints: int | None = None,
    *,
    small_share: float = 0.0,
    boards: tuple[Board, ...] = BOARDS,
    algorithm: Algorithm | None = None,
    admission: Admission | None = None,
) -> Pool:
    """Draw a pool for domain randomisation: the edge site's models on boards of all kinds.

    Without ``endpoints`` there are 2 to 16. A model may stand on several boards, at 16, 8 or 4
    bit as it fits; at least two models occur. ``small_share`` of the endpoints, in the mean,
    are `SMALL_MODELS`, whose scores are blends: give the pool itself to `make_scenario` then.
    ``boards`` are what models are put on; each model must fit one of them.
    """
    count = int(rng.integers(2, 17)) if endpoints is None else endpoints
    if count < 1:
        raise WorkloadError(f"needs at least 1 endpoint (got {count})", source="random pool")
    models = _models()
    experts: list[LLMExpert] = []
    blends: dict[str, Blend] = {}
    order = rng.permutation(len(models))
    for index in range(count):
        # The first ones differ, so that no pool has one model only.
        at = order[index] if index < 2 else rng.integers(len(models))
        model = models[int(at)]
        name = f"e{index:02d}-{model.expert}"
        blend = None
        if rng.random() < small_share:
            name, model, blend = _small(rng, index, models)
            blends[name] = blend
        experts.append(_place(rng, index, name, model, boards))
    return Pool(_compiled(experts, algorithm, admission), blends, f"random pool of {count}")


def _models() -> tuple[Candidate, ...]:
    """Return the edge site's experts, one candidate each."""
    return tuple({c.expert: c for c in _edge_site().candidates}.values())


def _small(
    rng: np.random.Generator, index: int, models: Sequence[Candidate]
) -> tuple[str, Candidate, Blend]:
    small = SMALL_MODELS[int(rng.integers(len(SMALL_MODELS)))]
    first, second = (models[int(i)] for i in rng.permutation(len(models))[:2])
    share = round(float(rng.uniform(0.2, 0.8)), 2)
    update = {"parameters_billions": small.parameters_billions}
    profile = first.profile.model_copy(
        update=update | {"kv_bytes_per_token": small.kv_bytes_per_token}
    )
    name = f"e{index:02d}-{small.name}"
    candidate = first.model_copy(
        update={
            "model": small.name,
            "profile": profile,
            "quality": _blended(first.quality, second.quality, share),
        }
    )
    return name, candidate, Blend(first.model, second.model, share)


def _blended(first: QualityPriors, second: QualityPriors, share: float) -> QualityPriors:
    other = {d.name: d.score for d in second.domains}

    def mix(a: float, b: float) -> float:
        return round((1 - share) * a + share * b, 3)

    return QualityPriors(
        default=mix(first.default, second.default),
        domains=[
            DomainScore(name=d.name, score=mix(d.score, other.get(d.name, second.default)))
            for d in first.domains
        ],
    )


def _place(
    rng: np.random.Generator,
    index: int,
    name: str,
    model: Candidate,
    boards: tuple[Board, ...],
) -> LLMExpert:
    """Put a model on a board that can run it."""
    profile = model.profile
    kv_bytes_per_token = float(profile.kv_bytes_per_token)
    choices = _placements(profile.parameters_billions, kv_bytes_per_token, boards)
    able = sorted({board.name for board, _, _ in choices})
    wanted = able[int(rng.integers(len(able)))]
    own = [choice for choice in choices if choice[0].name == wanted]
    board, size, cache_gib = own[int(rng.integers(len(own)))]
    room = int(cache_gib * 2**30 / model.profile.kv_bytes_per_token) // 256 * 256
    concurrency = int(rng.choice([8, 16, 32, 48, 64]))
    return LLMExpert(
        metadata=ObjectMeta(name=name, labels={"board": board.name}),
        spec=LLMExpertSpec(
            model=model.model,
            backend=Backend(addresses=[f"10.0.0.{index + 1}:8000"]),
            engine=model.engine,
            limits=ExpertLimits(context_tokens=min(MAX_CONTEXT, room), concurrency=concurrency),
            profile=_profile(board, model.profile, size, cache_gib),
            quality=model.quality,
            expected_output_tokens=model.expected_output_tokens,
        ),
    )


def _profile(
    board: Board, model: PerformanceProfile, bytes_per_parameter: float, cache_gib: float
) -> PerformanceProfile:
    return PerformanceProfile(
        peak_tflops=board.tflops,
        memory_bandwidth_gbps=board.bandwidth_gbps,
        parameters_billions=model.parameters_billions,
        bytes_per_parameter=bytes_per_parameter,
        kv_bytes_per_token=model.kv_bytes_per_token,
        kv_cache_gib=cache_gib,
        iteration_overhead_ms=board.overhead_ms,
        max_batched_tokens=board.max_batched_tokens,
    )


@lru_cache(maxsize=64)
def _placements(
    parameters_billions: float, kv_bytes_per_token: float, boards: tuple[Board, ...]
) -> tuple[tuple[Board, float, float], ...]:
    """(board, bytes per parameter, GiB for the cache) of all placements that make sense.

    The cache gets 90 % of the memory less the weights and 1 GiB, as in examples/edge-site.
    """
    found = []
    for board in boards:
        for size in BYTES_PER_PARAMETER:
            weights = parameters_billions * 1e9 * size
            cache_gib = round(0.9 * board.memory_gib - weights / 2**30 - 1.0, 1)
            alone_s = weights / (0.7e9 * board.bandwidth_gbps) + board.overhead_ms / 1e3
            if cache_gib * 2**30 >= MIN_CONTEXT * kv_bytes_per_token and alone_s <= SLOWEST_S:
                found.append((board, size, cache_gib))
    return tuple(found)


def _compiled(
    experts: Sequence[LLMExpert], algorithm: Algorithm | None, admission: Admission | None
) -> Snapshot:
    template = parse_manifests(_POLICY, source="random pool").policies[0]
    spec = template.spec.model_copy(
        update={
            "algorithm": algorithm or template.spec.algorithm,
            "admission": admission or template.spec.admission,
            "domains": list(_edge_site().domains),
        }
    )
    return compile_snapshot(
        template.model_copy(update={"spec": spec}),
        experts,
        {e.metadata.name: tuple(e.spec.backend.addresses or ()) for e in experts},
    )
