"""Joins what the two ext_proc filters tell of one request.

``decide`` knows where a request was sent, ``observe`` when it arrived, which endpoint
really served it, how many tokens came and when it ended. They are two gRPC streams, so
either may speak first; the request's id joins them.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto

from pointsman_core.router import Decision
from pointsman_core.state import SURPLUS_AFTER_S, Admitted, LiveState
from pointsman_policy.answers import TokenCounter, WholeCounter, counter_for
from pointsman_policy.metrics import Metrics
from pointsman_policy.stats import PolicyStatistics

REMEMBERED_ENDS = 4096
"""Ended requests that are remembered, so that a decision that comes late adds nothing."""


class End(Enum):
    """How a request's ``observe`` stream ended."""

    WHOLE = auto()
    """With the end of the answer."""
    EARLY = auto()
    """Closed before: the client went away, or the engine died."""
    UNSEEN = auto()
    """Lost: the connection to Envoy, or Envoy itself. The answer may go on."""


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    """The whole answer passed."""
    ERROR = "error"
    """The answer was an error status, or its stream carried an error."""
    ABORTED = "aborted"
    """The client went away, or the engine died in the middle."""
    UNKNOWN = "unknown"
    """It was lost sight of: counted in no average."""


@dataclass(slots=True)
class Tracked:
    """One request on its way."""

    arrival_s: float
    decision: Decision | None = None
    served_by: str | None = None
    """Address that answered, once the response headers tell."""
    served_expert: str | None = None
    expert: str | None = None
    """Expert under which the request is counted: the chosen one, or the one that answered."""
    status: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    counter: TokenCounter = field(default_factory=WholeCounter)

    @property
    def address(self) -> str | None:
        """Where it is: where it was answered, or where it was sent."""
        chosen = self.decision.chosen if self.decision is not None else None
        return self.served_by or (chosen.address if chosen is not None else None)

    @property
    def heard_s(self) -> float:
        """When there was last a sign of it."""
        return self.last_token_s or self.arrival_s


class RequestTracker:
    """The requests on their way, by id; keeps `LiveState` in step with them."""

    def __init__(self, state: LiveState, metrics: Metrics, statistics: PolicyStatistics) -> None:
        self._state = state
        self._metrics = metrics
        self._statistics = statistics
        self._tracked: dict[str, Tracked] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tracked)

    def opened(self, request_id: str, *, now_s: float) -> bool:
        """A request's headers passed ``observe``; False when one of that id has ended."""
        known = self._tracked.get(request_id)
        if known is not None:  # the decision came first
            known.arrival_s = min(known.arrival_s, now_s)
            return True
        if request_id in self._ended:
            return False
        self._tracked[request_id] = Tracked(arrival_s=now_s)
        return True

    def arrival_s(self, request_id: str | None, *, now_s: float) -> float:
        """When the request arrived, as far as is known."""
        known = self._tracked.get(request_id) if request_id is not None else None
        return now_s if known is None else known.arrival_s

    def decided(self, request_id: str | None, decision: Decision) -> None:
        """Put a decided request into the in-flight table, unless it has ended already."""
        chosen, admitted = decision.chosen, decision.admitted
        if chosen is None or admitted is None:
            return
        if request_id is None or request_id in self._state:
            self._metrics.untracked.inc()
            return
        if request_id in self._ended:
            return
        known = self._tracked.setdefault(request_id, Tracked(arrival_s=admitted.arrival_s))
        known.decision = decision
        known.expert = chosen.expert
        self._state.begin(request_id, chosen.address, admitted)
        # A decision that missed its time limit comes after the first answer's bytes.
        self._state.add_tokens(request_id, known.counter.total)
        self._follow(request_id, known)

    def chosen(self, request_id: str) -> str | None:
        """Address that was chosen for a request on its way, as far as is known."""
        known = self._tracked.get(request_id)
        decision = known.decision if known is not None else None
        return None if decision is None or decision.chosen is None else decision.chosen.address

    def responded(
        self,
        request_id: str,
        *,
        status: int,
        content_type: str,
        served_by: str | None,
        expert: str | None,
    ) -> None:
        """The response headers passed: note who really serves the request."""
        known = self._tracked.get(request_id)
        if known is None:
            return
        known.status = status
        known.counter = counter_for(content_type)
        known.served_by, known.served_expert = served_by, expert
        self._follow(request_id, known)

    def _follow(self, request_id: str, known: Tracked) -> None:
        """Count the request where it is really served, once both filters have told."""
        decision = known.decision
        if decision is None or decision.chosen is None or not known.served_by:
            return
        if known.served_by != decision.chosen.address:
            known.expert = known.served_expert or known.expert
            self._state.move(request_id, known.served_by)
            self._metrics.retries.labels(decision.snapshot.full_name).inc()

    def received(self, request_id: str, chunk: bytes, *, now_s: float) -> None:
        """A piece of the answer passed."""
        known = self._tracked.get(request_id)
        if known is None:
            return
        new = known.counter.feed(chunk)
        if new:
            known.first_token_s = known.first_token_s or now_s
            known.last_token_s = now_s
            self._state.add_tokens(request_id, new)

    def ended(self, request_id: str, end: End, *, now_s: float) -> None:
        """The request is over, or out of sight; a second call changes nothing.

        Also in the latter case nothing stays in the table: engines' gauges tell of such load.
        """
        known = self._tracked.pop(request_id, None)
        if known is None:
            return
        self._state.finish(request_id)
        self._ended[request_id] = None
        if len(self._ended) > REMEMBERED_ENDS:
            self._ended.popitem(last=False)
        if known.decision is not None:
            self._count(known, known.decision, end, now_s=now_s)
        elif known.served_by:
            self._metrics.undecided.inc()

    def expire(self, *, before_s: float) -> int:
        """Drop what arrived before ``before_s``: its end was missed. Returns how many."""
        old = [i for i, known in self._tracked.items() if known.arrival_s < before_s]
        for request_id in old:
            del self._tracked[request_id]
            self._state.finish(request_id)
        self._metrics.expired.labels("too_old").inc(len(old))
        return len(old)

    def reconcile(self, *, now_s: float) -> int:
        """Take out of the table what the engines' own gauges say is not there any more.

        For each endpoint that long has fewer requests than the table, the oldest ones from
        which nothing was heard lately. Returns how many. Their ends, if they still come,
        are counted as ever.
        """
        quiet_before = now_s - SURPLUS_AFTER_S
        dropped = 0
        for address in self._state.addresses:
            surplus = self._state.surplus(address, now_s=now_s)
            if not surplus:
                continue
            quiet = sorted(
                (known.arrival_s, request_id)
                for request_id, known in self._tracked.items()
                if known.address == address and known.heard_s < quiet_before
            )
            dropped += sum(self._state.finish(i) for _, i in quiet[:surplus])
        self._metrics.expired.labels("not_at_engine").inc(dropped)
        return dropped

    def _count(self, known: Tracked, decision: Decision, end: End, *, now_s: float) -> None:
        policy = decision.snapshot.full_name
        labels = (policy, known.expert or "")
        outcome = _outcome(known, end)
        self._metrics.completions.labels(*labels, outcome).inc()
        if outcome is Outcome.UNKNOWN:
            return
        if outcome is not Outcome.OK:
            self._statistics.failed(policy, now_s=now_s)
            self._metrics.count_qos(policy, 0.0)
            return
        tokens = known.counter.total
        if not tokens or decision.admitted is None:
            return  # its latency per token is not known
        last = known.last_token_s or now_s
        per_token = (last - known.arrival_s) / tokens
        self._metrics.latency_per_token.labels(*labels).observe(per_token)
        self._metrics.output_tokens.labels(*labels).inc(tokens)
        if known.first_token_s is not None:
            first = known.first_token_s - known.arrival_s
            self._metrics.time_to_first_token.labels(*labels).observe(first)
        in_time = per_token <= decision.admitted.limit_s
        # Zero is counted too: rates need to see a counter before it moves.
        self._metrics.violations.labels(*labels).inc(0 if in_time else 1)
        quality = _predicted_quality(known, decision, decision.admitted)
        self._statistics.completed(policy, quality=quality, in_time=in_time, now_s=now_s)
        self._metrics.count_qos(policy, quality if in_time else 0.0)


def _outcome(known: Tracked, end: End) -> Outcome:
    if end is End.UNSEEN:
        return Outcome.UNKNOWN
    if end is End.EARLY:
        return Outcome.ABORTED
    return Outcome.ERROR if known.status >= 400 or known.counter.failed else Outcome.OK


def _predicted_quality(known: Tracked, decision: Decision, admitted: Admitted) -> float:
    """What was predicted of the endpoint that served, which need not be the chosen one."""
    if decision.chosen is None or known.served_by in (None, "", decision.chosen.address):
        return admitted.quality
    experts = (known.expert or "").split(",")  # several where they share an address
    for i, candidate in enumerate(decision.snapshot.candidates):
        if candidate.address == known.served_by and candidate.expert in experts:
            return float(decision.quality[i])
    return admitted.quality
