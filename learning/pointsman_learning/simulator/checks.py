"""Whether a scenario makes sense, told before anything runs."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pointsman_core.batching import BLOCK_TOKENS
from pointsman_core.cost import CostModel
from pointsman_core.state import BoolArray, IntArray
from pointsman_learning.simulator.scenario import Change, Scenario

_Valid = Callable[[NDArray[Any]], BoolArray]


class ScenarioError(ValueError):
    """A scenario that cannot be simulated; the message says where and why."""


def check(scenario: Scenario) -> None:
    """Find the first inconsistency of a scenario.

    Raises:
        ScenarioError: with the field, the place and the value in its message.

    """
    _check_snapshot(scenario)
    if not len(scenario):
        raise ScenarioError("a scenario needs at least one request")
    _check_shapes(scenario)
    _check_values(scenario)
    _check_domains(scenario)
    _check_mishaps(scenario)
    _check_memory(scenario)


def cost_models(scenario: Scenario) -> list[CostModel]:
    """E cost models."""
    candidates = scenario.snapshot.candidates
    return [CostModel.from_profile(c.profile, c.limits) for c in candidates]


def kv_capacity(scenario: Scenario) -> IntArray:
    """(E,) tokens that the KV cache holds, in whole blocks."""
    tokens = np.array([c.kv_capacity_tokens for c in cost_models(scenario)], np.int64)
    capacity: IntArray = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    return capacity


def _check_snapshot(scenario: Scenario) -> None:
    addresses = [c.address for c in scenario.snapshot.candidates]
    if not addresses:
        raise ScenarioError("the snapshot has no candidates")
    twice = next((a for a in addresses if addresses.count(a) > 1), None)
    if twice is not None:
        raise ScenarioError(
            f"two candidates share the address {twice}: each needs an endpoint of its own here"
        )


def _check_shapes(scenario: Scenario) -> None:
    n, e = len(scenario), scenario.endpoints
    shapes = {
        "arrival_s": (n,),
        "prompt_tokens": (n,),
        "limit_s": (n,),
        "first_token_limit_s": (n,),
        "domain": (n,),
        "prompt": (n,),
        "score": (n, e),
        "output_tokens": (n, e),
        "predicted_quality": (n, e),
        "predicted_output_tokens": (n, e),
    }
    for name, shape in shapes.items():
        array = getattr(scenario, name)
        if array is not None and array.shape != shape:
            raise ScenarioError(
                f"{name} has the shape {array.shape}, {n} requests on {e} endpoints need {shape}"
            )


def _check_values(scenario: Scenario) -> None:
    _require(scenario, "arrival_s", lambda a: np.isfinite(a) & (a >= 0), "a time of at least 0")
    late = np.diff(scenario.arrival_s, prepend=scenario.arrival_s[0]) >= 0
    _report("arrival_s", scenario.arrival_s, late, "no earlier than the request before it")
    for name in ("prompt_tokens", "output_tokens"):
        if not np.issubdtype(getattr(scenario, name).dtype, np.integer):
            raise ScenarioError(
                f"{name} must be whole numbers, not {getattr(scenario, name).dtype}"
            )
        _require(scenario, name, lambda a: a >= 1, "at least 1 token")
    _require(scenario, "limit_s", lambda a: a > 0, "a limit above 0 (inf: none)")
    if scenario.first_token_limit_s is not None:
        _require(scenario, "first_token_limit_s", lambda a: a > 0, "a limit above 0 (inf: none)")
    for name in ("score", "predicted_quality"):
        _require(scenario, name, lambda a: (a >= 0) & (a <= 1), "from 0 to 1")
    _require(
        scenario,
        "predicted_output_tokens",
        lambda a: np.isfinite(a) & (a >= 1),
        "a finite length of at least 1",
    )


def _require(scenario: Scenario, name: str, valid: _Valid, wanted: str) -> None:
    values = getattr(scenario, name)
    _report(name, values, valid(values), wanted)


def _report(name: str, values: NDArray[Any], valid: BoolArray, wanted: str) -> None:
    if valid.all():
        return
    place = np.unravel_index(int(np.argmin(valid)), valid.shape)
    where = ", ".join(str(int(i)) for i in place)
    raise ScenarioError(f"{name}[{where}] must be {wanted} (got {values[place]})")


def _check_domains(scenario: Scenario) -> None:
    if scenario.domain is not None:
        known = (scenario.domain >= 0) & (scenario.domain < len(scenario.domains))
        wanted = f"the number of one of the {len(scenario.domains)} domains"
        _report("domain", scenario.domain, known, wanted)


def _check_mishaps(scenario: Scenario) -> None:
    before = 0.0
    for index, change in enumerate(scenario.availability):
        if not (np.isfinite(change.time_s) and change.time_s >= before):
            raise ScenarioError(
                f"availability[{index}] at {change.time_s} s must not be before {before} s"
            )
        _check_endpoint(scenario, change.endpoint, f"availability[{index}]")
        if change.change not in list(Change):
            raise ScenarioError(f"availability[{index}] has the unknown change {change.change}")
        before = change.time_s
    if not (np.isfinite(scenario.detection_s) and scenario.detection_s >= 0):
        raise ScenarioError(f"detection_s must be at least 0 (got {scenario.detection_s})")
    gauges = scenario.gauges
    if not (np.isfinite(gauges.period_s) and gauges.period_s > 0):
        raise ScenarioError(f"gauges.period_s must be above 0 (got {gauges.period_s})")
    if not (np.isfinite(gauges.lag_s) and gauges.lag_s >= 0):
        raise ScenarioError(f"gauges.lag_s must be at least 0 (got {gauges.lag_s})")
    for endpoint in sorted(gauges.missing):
        _check_endpoint(scenario, endpoint, "gauges.missing")


def _check_endpoint(scenario: Scenario, endpoint: int, where: str) -> None:
    if not 0 <= endpoint < scenario.endpoints:
        raise ScenarioError(
            f"{where} names endpoint {endpoint}, there are {scenario.endpoints} (from 0)"
        )


def _check_memory(scenario: Scenario) -> None:
    """Every request runs wherever the router may send it.

    Where the prompt is longer than the endpoint's context the router does not, unless no
    ready endpoint has a longer one; the engine then refuses the request.
    """
    contexts = np.array([c.limits.context_tokens for c in scenario.snapshot.candidates], np.int64)
    capacity = kv_capacity(scenario)
    prompts = scenario.prompt_tokens[:, None]
    possible = prompts + 1 <= contexts[None, :]
    fits = prompts + scenario.output_tokens <= capacity[None, :]
    bad = np.argwhere(possible & ~fits)
    if len(bad):
        i, e = (int(x) for x in bad[0])
        candidate = scenario.snapshot.candidates[e]
        raise ScenarioError(
            f"request {i} can never run on endpoint {e} ({candidate.expert} at"
            f" {candidate.address}): {scenario.prompt_tokens[i]} prompt tokens and"
            f" {scenario.output_tokens[i, e]} output tokens exceed its KV cache of"
            f" {capacity[e]} tokens ({len(bad)} such cases)"
        )
    nowhere = ~(possible & fits).any(axis=1)
    if nowhere.any():
        i = int(np.argmax(nowhere))
        raise ScenarioError(
            f"request {i} fits nowhere: its {scenario.prompt_tokens[i]} prompt tokens exceed every"
            f" endpoint's context (at most {contexts.max()} tokens)"
        )
