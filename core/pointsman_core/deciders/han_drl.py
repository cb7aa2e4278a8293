"""HanDrl: the learned decider, on ONNX Runtime.

A model is bytes: an ONNX graph that takes what `pointsman_core.graph.encode` makes of an
observation, and metadata that says with which features it was trained, and how. What does not
fit is refused with a `ModelError` before it decides anything; what a model answers is checked
at each decision, so that the router's fallback decides when it is no number.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson

from pointsman_core.deciders.base import Scores
from pointsman_core.deciders.impact import TUNED, ImpactParameters, expected_impact
from pointsman_core.graph import FEATURES, Float32Array, GraphArrays, encode, schema_hash
from pointsman_core.observation import Observation
from pointsman_core.onnx_session import METADATA_KEY, SessionError, open_session
from pointsman_core.records import record
from pointsman_core.state import FloatArray

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FORMAT: Final = "pointsman-han/1"
MAX_BYTES: Final = 16 * 1024 * 1024
"""A larger file is no such model: it is refused before anything parses it."""

SHIPPED: Final = "han_drl.onnx"

INPUTS: Final[Mapping[str, tuple[str, tuple[int | str, ...]]]] = {
    "request": ("float", (1, len(FEATURES["request"]))),
    "endpoint": ("float", ("E", len(FEATURES["endpoint"]))),
    "eligible": ("bool", ("E",)),
    "analytic": ("float", ("E", 3)),
    "running": ("float", ("R1", len(FEATURES["running"]))),
    "running_endpoint": ("int64", ("R1",)),
    "waiting": ("float", ("R2", len(FEATURES["waiting"]))),
    "waiting_endpoint": ("int64", ("R2",)),
}
"""Type and shape of each input: the fields of `GraphArrays`."""

OUTPUTS: Final[Mapping[str, tuple[str, tuple[int | str, ...]]]] = {
    "q": ("float", ("E + 1",)),
    "probability": ("float", ("E + 1",)),
    "chance": ("float", ("E",)),
    "impact": ("float", ("E",)),
}
"""Value and probability of each action, the last being rejection; estimates per endpoint."""


class ModelError(ValueError):
    """Bytes that are no model this release can serve, or none where one is needed."""


@dataclass(frozen=True, slots=True)
class HanInfo:
    """What a model says of itself."""

    impact: ImpactParameters
    """Of the ImpactGreedy whose terms it was trained on; it must be given the same."""
    config: Mapping[str, Any]
    """Sizes of the network."""
    provenance: Mapping[str, Any]
    """Data, seeds and versions it was trained with."""
    metrics: Mapping[str, Any]
    """How it did."""

    @property
    def trained(self) -> bool:
        """Whether it learned anything; a model that did not says so in its provenance."""
        return self.provenance.get("trained", True) is not False

    def to_json(self) -> str:
        """What `METADATA_KEY` holds."""
        body = {
            "format": FORMAT,
            "schema": schema_hash(),
            "features": {kind: list(names) for kind, names in FEATURES.items()},
            "impact": asdict(self.impact),
            "config": self.config,
            "provenance": self.provenance,
            "metrics": self.metrics,
        }
        return orjson.dumps(body, option=orjson.OPT_SORT_KEYS).decode()


@record
class Answer:
    """What a model says of one graph of E endpoints."""

    q: Float32Array
    """(E+1,) value of each choice, in QoS; the last of rejection."""
    probability: Float32Array
    """(E+1,) of the trained policy, 0 where an endpoint cannot be chosen."""
    chance: Float32Array
    """(E,) that the new request is in time."""
    impact: Float32Array
    """(E,) change of the expected QoS of those there."""


class HanModel:
    """A loaded model; immutable, may be shared by policies.

    One thread computes, and none spins: it runs within one event loop.
    """

    def __init__(
        self, content: bytes, *, sha256: str | None = None, source: str = "the model"
    ) -> None:
        """Load and try out; ``sha256`` (hex digits) is what the content must have.

        Raises:
            ModelError: it is not the one that is meant, corrupt, of other features, or answers
                nonsense; says what is wrong with ``source``.

        """
        self.source = source
        self.sha256 = hashlib.sha256(content).hexdigest()
        if sha256 is not None and sha256.lower() != self.sha256:
            raise ModelError(f"{source} has the SHA-256 {self.sha256}, not {sha256.lower()}")
        self._session = _session(content, source)
        self.info = _info(self._session, source)
        try:
            self._check_signature()
        except UnicodeDecodeError:
            raise ModelError(f"{source} is corrupt: its names are no text") from None
        self._try_out()

    def run(self, graph: GraphArrays) -> Answer:
        """Answer for one graph.

        Raises:
            ModelError: an answer is not a number, or of the wrong shape.

        """
        told = self._session.run(
            _OUTPUT_NAMES,
            {
                "request": graph.request,
                "endpoint": graph.endpoint,
                "eligible": graph.eligible,
                "analytic": graph.analytic,
                "running": graph.running,
                "running_endpoint": graph.running_endpoint,
                "waiting": graph.waiting,
                "waiting_endpoint": graph.waiting_endpoint,
            },
        )
        actions = len(graph.endpoint) + 1
        for name, values, size in zip(
            _OUTPUT_NAMES, told, (actions, actions, actions - 1, actions - 1), strict=True
        ):
            if values.shape != (size,):
                raise ModelError(f"{self.source}: {name} has the shape {values.shape}")
        # A sum is a number only where all its terms are: cheaper than looking at each.
        if not math.isfinite(np.add.reduce(np.concatenate(told))):
            for name, values in zip(_OUTPUT_NAMES, told, strict=True):
                if not np.isfinite(values).all():
                    raise ModelError(f"{self.source}: {name} is not a number")
        return Answer(*told)

    def __deepcopy__(self, memo: dict[int, object]) -> "HanModel":
        """Itself: there is nothing in it that deciding changes."""
        return self

    def _check_signature(self) -> None:
        for what, wanted, got in (
            ("takes", INPUTS, self._session.get_inputs()),
            ("answers", OUTPUTS, self._session.get_outputs()),
        ):
            found = {one.name: one for one in got}
            if found.keys() != wanted.keys():
                raise ModelError(
                    f"{self.source} {what} {', '.join(found)}, not {', '.join(wanted)}"
                )
            for name, (kind, shape) in wanted.items():
                if not _fits(found[name], kind, shape):
                    one = found[name]
                    raise ModelError(
                        f"{self.source} {what} {name} as {one.type} of {one.shape},"
                        f" not as tensor({kind}) of {list(shape)}"
                    )

    def _try_out(self) -> None:
        """Weights that were damaged yet parse mostly give themselves away."""
        for graph in _probes():
            try:
                answer = self.run(graph)
            # What ONNX Runtime raises has no common base.
            except Exception as error:  # noqa: BLE001
                raise ModelError(f"{self.source} cannot be computed: {_line(error)}") from None
            chance = answer.chance
            if not (
                abs(answer.probability.sum() - 1.0) < 1e-3 and (chance == chance.clip(0, 1)).all()
            ):
                raise ModelError(f"{self.source} answers chances that are none")


class HanDrl:
    """Highest learned value; under ``Reject`` only where it exceeds that of rejection."""

    def __init__(self, model: HanModel) -> None:
        self.model = model

    def score(self, seen: Observation) -> Scores:
        """Score by the value of each choice, in units of QoS.

        Raises:
            ModelError: the model answers something that is not a number.

        """
        parameters = self.model.info.impact
        impact = expected_impact(seen, parameters)
        answer = self.model.run(encode(seen, impact, parameters=parameters))
        values = answer.q[:-1].astype(np.float64)
        chance = answer.chance.astype(np.float64)
        return Scores(
            values,
            in_time=chance >= 0.5,
            acceptable=values >= answer.q[-1],
            parts={
                "policy probability": answer.probability[:-1].astype(np.float64),
                "chance in time": chance,
                "impact on others": answer.impact.astype(np.float64),
            },
        )


class MissingModel:
    """Stands in for `HanDrl` where no model could be loaded: the fallback decides."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def score(self, seen: Observation) -> Scores:
        """Decline.

        Raises:
            ModelError: always, with the reason.

        """
        del seen
        raise ModelError(self.reason)


@lru_cache(maxsize=1)
def shipped_model() -> HanModel:
    """The model that is shipped with this release.

    Raises:
        ModelError: there is none, or ONNX Runtime is not installed.

    """
    file = resources.files("pointsman_core") / "models" / SHIPPED
    if not file.is_file():
        raise ModelError("no model is shipped with this release")
    return HanModel(file.read_bytes(), source="the shipped model")


def shipped_decider() -> HanDrl | MissingModel:
    """`HanDrl` on the shipped model, or what says why there is none."""
    try:
        return HanDrl(shipped_model())
    except ModelError as error:
        return MissingModel(str(error))


_OUTPUT_NAMES: Final = list(OUTPUTS)


def _session(content: bytes, source: str) -> "InferenceSession":
    if len(content) > MAX_BYTES:
        raise ModelError(f"{source} has {len(content)} bytes; at most {MAX_BYTES} are read")
    try:
        return open_session(content)
    except ModuleNotFoundError:
        raise ModelError(f"{source} needs ONNX Runtime: pip install 'pointsman[server]'") from None
    except SessionError as error:
        raise ModelError(f"{source} is no ONNX model: {_line(error)}") from None


def _info(session: "InferenceSession", source: str) -> HanInfo:
    try:
        text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        body = orjson.loads(text or "")
        kind, schema = body["format"], body["schema"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(
            f"{source} is no model of Pointsman's: it says nothing of itself"
        ) from None
    if kind != FORMAT:
        raise ModelError(f"{source} has the format {kind!r}; this release serves {FORMAT!r}")
    if schema != schema_hash():
        raise ModelError(
            f"{source} was trained with other features (schema {str(schema)[:12]}, this release"
            f" has {schema_hash()[:12]}): export it anew with this release"
        )
    try:
        return HanInfo(
            impact=_parameters(body["impact"]),
            config=body["config"],
            provenance=body["provenance"],
            metrics=body["metrics"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{source} has unreadable metadata: {_line(error)}") from None


def _parameters(values: Mapping[str, Any]) -> ImpactParameters:
    # A default of this release must not stand in for what a model was trained with.
    if values.keys() != asdict(TUNED).keys():
        raise ValueError("its parameters of ImpactGreedy are not those of this release")
    return ImpactParameters(**values)


def _fits(one: Any, kind: str, shape: tuple[int | str, ...]) -> bool:  # noqa: ANN401
    """Whether an input or output is what is wanted; sizes that vary may have any name."""
    if one.type != f"tensor({kind})" or len(one.shape) != len(shape):
        return False
    return all(
        isinstance(want, str) or got == want for got, want in zip(one.shape, shape, strict=True)
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _probes() -> list[GraphArrays]:
    """Graphs to try a model on: nothing there, and some of each."""
    return [_probe(endpoints=1, requests=0), _probe(endpoints=3, requests=4)]


def _probe(*, endpoints: int, requests: int) -> GraphArrays:
    def rows(kind: str, count: int) -> Float32Array:
        size = len(FEATURES[kind])
        return np.linspace(-1.0, 2.0, count * size, dtype=np.float32).reshape(count, size)

    analytic: FloatArray = np.linspace(0.1, 0.9, 3 * endpoints).reshape(endpoints, 3)
    where = np.arange(requests) % endpoints
    return GraphArrays(
        request=rows("request", 1),
        endpoint=rows("endpoint", endpoints),
        running=rows("running", requests),
        waiting=rows("waiting", requests),
        running_endpoint=where,
        waiting_endpoint=where,
        eligible=np.ones(endpoints, np.bool_),
        analytic=analytic.astype(np.float32),
    )
