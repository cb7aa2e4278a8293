"""What probes say of an expert's ready endpoints, and which of them can serve it. Pure."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from pointsman_common.wording import listed, share
from pointsman_core.resources import EngineType, LLMExpert
from pointsman_operator.conditions import FALSE, TRUE, UNKNOWN, Finding, Reason, Type
from pointsman_operator.observed import Probe

_OLLAMA_TAG: Final = ":latest"
"""Ollama lists it and answers to the name without it too."""


@dataclass(frozen=True, slots=True)
class Unfit:
    """Endpoints of an expert that serve other models."""

    uid: str
    generation: int
    addresses: frozenset[str] = frozenset()


def reachable(ready: Sequence[str], probed: Mapping[str, Probe]) -> Finding:
    """Whether the ready endpoints answer."""
    if not ready or len(probed) < len(ready):
        text = "not all ready endpoints were asked yet" if ready else "no endpoint is ready"
        return Finding(Type.REACHABLE, UNKNOWN, Reason.NOT_PROBED, text)
    silent = {address: probe.error for address, probe in probed.items() if not probe.answers}
    answering = len(ready) - len(silent)
    count = share(answering, len(ready), "endpoint", one="answers", many="answer")
    if not silent:
        return Finding(Type.REACHABLE, TRUE, Reason.ALL_ANSWER, count)
    text = f"{count}: {listed(f'{address} {error}' for address, error in silent.items())}"
    if answering:
        return Finding(Type.REACHABLE, TRUE, Reason.SOME_ANSWER, text)
    return Finding(Type.REACHABLE, FALSE, Reason.NONE_ANSWERS, text)


def model_served(expert: LLMExpert | None, probed: Mapping[str, Probe]) -> Finding:
    """Whether the endpoints that answer list the expert's model."""
    answering = {address: probe for address, probe in probed.items() if probe.answers}
    if expert is None or not answering:
        text = "no endpoint has answered"
        return Finding(Type.MODEL_SERVED, UNKNOWN, Reason.NOT_PROBED, text)
    for address, probe in answering.items():
        if probe.models is not None and not _lists(expert, probe.models):
            text = _others(expert, address, probe.models)
            return Finding(Type.MODEL_SERVED, FALSE, Reason.MODEL_NOT_LISTED, text)
    for address, probe in answering.items():
        if probe.models is None:
            text = f"{address}: {probe.error or 'no list of models'}"
            return Finding(Type.MODEL_SERVED, UNKNOWN, Reason.LIST_UNAVAILABLE, text)
    text = f"{expert.spec.model} is listed by /v1/models"
    return Finding(Type.MODEL_SERVED, TRUE, Reason.MODEL_LISTED, text)


def unfit(
    expert: LLMExpert,
    ready: Sequence[str],
    probed: Mapping[str, Probe],
    before: AbstractSet[str],
) -> frozenset[str]:
    """Ready endpoints that would refuse every request, as their list lacks the model (ours).

    One without a readable list gets requests. One that does not answer, or was not asked
    yet, stays what it was ``before``.
    """
    if _takes_any_name(expert):
        return frozenset()
    found = set()
    for address in ready:
        probe = probed.get(address)
        if probe is None or not probe.answers:
            lacks = address in before
        else:
            lacks = probe.models is not None and not _lists(expert, probe.models)
        if lacks:
            found.add(address)
    return frozenset(found)


def _lists(expert: LLMExpert, models: Sequence[str]) -> bool:
    model = expert.spec.model
    if expert.spec.engine.type is EngineType.OLLAMA and model + _OLLAMA_TAG in models:
        return True
    return model in models


def _takes_any_name(expert: LLMExpert) -> bool:
    """A llama.cpp server lists the path of its file, and does not look at a request's model."""
    return expert.spec.engine.type is EngineType.LLAMACPP


def _others(expert: LLMExpert, address: str, models: Sequence[str]) -> str:
    model, others = expert.spec.model, listed(models) or "no model"
    if _takes_any_name(expert):
        return f"{address} lists {others}, not {model}; llama.cpp takes any name"
    return f"{address} does not serve {model}; it serves {others}"
