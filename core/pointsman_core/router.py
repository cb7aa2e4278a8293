"""One policy at work: from a request to a decision."""

import copy
from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum

import numpy as np

from pointsman_core.deciders import ADMISSION_MARGINS, Decider, Scores, make_decider
from pointsman_core.latency import forecast
from pointsman_core.observation import Observation, Request, RoutingTable, observe
from pointsman_core.prediction import Predictor
from pointsman_core.records import record
from pointsman_core.resources import Admission, Algorithm
from pointsman_core.snapshot import Candidate, Snapshot
from pointsman_core.state import Admitted, BoolArray, FloatArray, StateView


class Rejection(StrEnum):
    """Why no endpoint was chosen."""

    NO_READY_ENDPOINT = "no endpoint is ready"
    OVER_LIMIT = "the chosen endpoint cannot keep the latency limit"


MAX_RETRY_TARGETS = 2
"""Endpoints named after the chosen one, for retries on connection failure."""


@record
class Decision:
    """The endpoint chosen for one request, or why there is none."""

    snapshot: Snapshot
    algorithm: Algorithm
    """The one that decided: the policy's, or its fallback."""
    chosen: Candidate | None
    retry_on: tuple[Candidate, ...]
    """Next best, in order, for when the chosen one cannot be reached."""
    why: str
    """One line for people: of an endpoint, or of the rejection."""
    scores: FloatArray
    """(E,) of the algorithm that decided."""
    eligible: BoolArray
    """(E,) candidates that could be chosen at all."""
    in_time: BoolArray | None
    """(E,) predicted to keep all limits; None: the algorithm does not look."""
    quality: FloatArray
    """(E,) predicted quality."""
    parts: Mapping[str, FloatArray] = field(default_factory=dict)
    """(E,) what the scores are made of, by name; empty where the algorithm does not tell."""
    learned: bool = False
    """Whether the chosen one's quality was learned from data; else it was declared."""
    rejection: Rejection | None = None
    """Set exactly when nothing was chosen."""
    fallback_reason: str | None = None
    """Why the policy's own algorithm did not decide; None when it did."""
    admitted: Admitted | None = None
    """What the in-flight table is to know of the request."""


class Router:
    """Decides requests of one snapshot on a shared live state."""

    def __init__(
        self,
        snapshot: Snapshot,
        state: StateView,
        *,
        predictor: Predictor | None = None,
        decider: Decider | None = None,
        seed: int | None = None,
    ) -> None:
        """``decider`` stands in for the one that the policy's algorithm has by itself."""
        self.snapshot = snapshot
        self.table = RoutingTable(snapshot, state, predictor)
        self._state = state
        self._rng = np.random.default_rng(seed)
        self._decider = decider or make_decider(snapshot.algorithm, self._rng)
        self._fallback = make_decider(snapshot.fallback, self._rng)

    def observe(self, request: Request, *, now_s: float) -> Observation:
        """What the decider would see of the request now."""
        return observe(self.table, self._state, request, now_s=now_s)

    def decide(self, request: Request, *, now_s: float) -> Decision:
        """Choose an endpoint. Does not change the in-flight table."""
        seen = self.observe(request, now_s=now_s)
        algorithm, scores, failure = self._score(seen)
        in_time, acceptable = self._admission(algorithm, seen, scores)
        best, next_best = self._rank(seen, scores, acceptable)
        rejection = _rejection(best, acceptable)
        chosen = None if rejection or best is None else self.table.candidates[best]
        if rejection or best is None:
            why = str(rejection)
        else:
            why = _explain(algorithm, seen, scores, best)
        return Decision(
            snapshot=self.snapshot,
            algorithm=algorithm,
            chosen=chosen,
            retry_on=() if chosen is None else next_best,
            why=why if failure is None else f"{why} (fallback: {failure})",
            scores=scores.values,
            eligible=seen.eligible,
            in_time=in_time,
            quality=seen.quality,
            parts=scores.parts,
            learned=chosen is not None and _is_learned(seen, best),
            rejection=rejection,
            fallback_reason=failure,
            admitted=None if chosen is None or best is None else _admitted(request, seen, best),
        )

    def preview(self, request: Request, *, now_s: float) -> Decision:
        """What `decide` would answer, without advancing any decider's own state."""
        twin = copy.copy(self)
        twin._rng, twin._decider, twin._fallback = copy.deepcopy(  # noqa: SLF001
            (self._rng, self._decider, self._fallback)
        )
        return twin.decide(request, now_s=now_s)

    def _score(self, seen: Observation) -> tuple[Algorithm, Scores, str | None]:
        """Score by the policy's algorithm, by its fallback when that one fails."""
        # Then there is nothing to decide, and no decider need cope with it.
        if not np.count_nonzero(seen.eligible):
            return self.snapshot.algorithm, Scores(np.zeros_like(seen.quality)), None
        try:
            scores = self._decider.score(seen)
            _check(scores, seen)
        # A broken decider must never cost a request: whatever it raises, the fallback decides.
        except Exception as error:  # noqa: BLE001
            # One line: it ends up in a response header.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            failure = f"{self.snapshot.algorithm} failed: {reason}"
            return self.snapshot.fallback, self._fallback.score(seen), failure
        return self.snapshot.algorithm, scores, None

    def _rank(
        self, seen: Observation, scores: Scores, acceptable: BoolArray | None
    ) -> tuple[int | None, tuple[Candidate, ...]]:
        """Best eligible candidate, and those to be named after it.

        Equals are drawn by lot, among the acceptable ones if there are any: a full replica
        must not cost a request that another one of the same score could take.
        """
        eligible = seen.eligible.nonzero()[0]
        if not len(eligible):
            return None, ()
        values = scores.values[eligible]
        order = (-values).argsort(kind="stable")[: 1 + MAX_RETRY_TARGETS]
        leading = eligible[order].tolist()
        best, ranked = leading[0], values[order].tolist()
        if len(ranked) > 1 and ranked[0] == ranked[1]:
            ties = eligible[values == ranked[0]]
            if acceptable is not None and acceptable[ties].any():
                ties = ties[acceptable[ties]]
            # The same draw as `choice` would make, at a tenth of its time.
            best = int(ties[0] if len(ties) == 1 else ties[self._rng.integers(len(ties))])
        others = [self.table.candidates[i] for i in leading if i != best]
        return best, tuple(others[:MAX_RETRY_TARGETS])

    def _admission(
        self, algorithm: Algorithm, seen: Observation, scores: Scores
    ) -> tuple[BoolArray | None, BoolArray | None]:
        """(E,) in time, and (E,) acceptable: as the decider says, else by the forecast.

        The forecast is asked only under Reject, so admission has one rule for all deciders.
        """
        if self.snapshot.admission is not Admission.REJECT:
            return scores.in_time, None
        in_time = scores.in_time
        if in_time is None:
            margin = ADMISSION_MARGINS.get(algorithm, 1.0)
            in_time = forecast(seen).keeps_limits(seen, margin=margin)
        return in_time, in_time if scores.acceptable is None else scores.acceptable

    def replace_decider(self, decider: Decider) -> None:
        """Swap the algorithm's implementation between two requests."""
        self._decider = decider


def _rejection(best: int | None, acceptable: BoolArray | None) -> Rejection | None:
    """Whether the one chosen may be had; that another one could do better is no excuse."""
    if best is None:
        return Rejection.NO_READY_ENDPOINT
    if acceptable is None or acceptable[best]:
        return None
    return Rejection.OVER_LIMIT


def _check(scores: Scores, seen: Observation) -> None:
    if scores.values.shape != seen.quality.shape:
        raise ValueError(f"{scores.values.shape[0]} scores for {len(seen.quality)} candidates")
    for name, said in (("in_time", scores.in_time), ("acceptable", scores.acceptable)):
        if said is not None and said.shape != seen.quality.shape:
            raise ValueError(f"{name} has the shape {said.shape}")
    for name, values in scores.parts.items():
        if values.shape != seen.quality.shape:
            raise ValueError(f"{name!r} has the shape {values.shape}")
    if not np.isfinite(scores.values[seen.eligible]).all():
        raise ValueError("a score is not a finite number")


def _admitted(request: Request, seen: Observation, best: int) -> Admitted:
    return Admitted(
        arrival_s=request.arrival_s,
        prompt_tokens=float(request.prompt_tokens),
        expected_output_tokens=float(seen.output_tokens[best]),
        limit_s=request.limit_s,
        quality=float(seen.quality[best]),
        streams=request.streams,
    )


def _source(seen: Observation, best: int) -> str:
    """Where the quality comes from, told where candidates differ in it or it was learned."""
    if seen.learned is None or not np.count_nonzero(seen.learned):
        return ""
    return " (learned)" if seen.learned[best] else " (declared)"


def _is_learned(seen: Observation, best: int | None) -> bool:
    return best is not None and seen.learned is not None and bool(seen.learned[best])


def _explain(algorithm: Algorithm, seen: Observation, scores: Scores, best: int) -> str:
    # As Python's own numbers: NumPy's take several times as long to format and to add up.
    parts = "".join([f", {name} {values.item(best):.3f}" for name, values in scores.parts.items()])
    text = (
        f"{algorithm}: score {scores.values.item(best):.3f},"
        f" expected quality {seen.quality.item(best):.2f}{_source(seen, best)}{parts},"
        f" {np.count_nonzero(seen.eligible)} of {len(seen.eligible)} endpoints eligible"
    )
    if scores.in_time is None:
        return text
    return f"{text}, {np.count_nonzero(scores.in_time & seen.eligible)} in time"
