"""The demo's own requests in the laboratory's simulator: how far that and the data plane differ.

Same arrivals, prompts, lengths of answers, predictions, limits, experts and admission; the same
router, with the same seed; and the same grading, by `summarise`. What is left is what the
simulator leaves out: HTTP, Envoy, the policy server's own time, and a busy host. Needs the
``learning`` extra.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pointsman_cli.demo.data import SiteGrader
from pointsman_cli.demo.errors import DemoError
from pointsman_cli.demo.load import Ending, Outcome, plan
from pointsman_cli.demo.model import model_of
from pointsman_cli.demo.results import HostLoad, RunResult, summarise
from pointsman_cli.demo.runner import MAX_OUTPUT_TOKENS, DemoPlan
from pointsman_cli.demo.site import Site, clone_model, is_loopback, to_yaml
from pointsman_common.files import told
from pointsman_core.deciders import Decider
from pointsman_core.manifests import compile_manifests
from pointsman_core.predictors import ArtefactError, make_predictor
from pointsman_core.resources import Algorithm
from pointsman_core.snapshot import Snapshot
from pointsman_core.state import IntArray
from pointsman_engine_sim.answers import Answer
from pointsman_engine_sim.protocol import ChatRequest, parse
from pointsman_learning.simulator import (
    REJECTED,
    DeciderFailedError,
    Scenario,
    ScenarioError,
    simulate,
)
from pointsman_learning.simulator import Outcome as Played
from pointsman_policy.openai_api import parse_completion
from pointsman_policy.predictor_file import load_predictor
from pointsman_policy.service import policy_seed
from pointsman_policy.settings import BUILTIN_PREDICTOR

PREDICTOR_VARIABLE = "POINTSMAN_PREDICTOR"
"""The demo's policy server reads it, so what is simulated does."""
IDEAL_HOST = HostLoad(loop_lag_p99_ms=0.0, cpu_busy=None)


def simulate_all(prepared: DemoPlan, deciders: Sequence[Algorithm]) -> list[RunResult]:
    """Simulate what each decider makes of the demo's requests.

    Raises:
        DemoError: the site cannot be simulated: an engine is a real one, its address is shared,
            a request fits nowhere, or a decider has no model.

    """
    try:
        scenario = scenario_of(prepared)
        snapshots = _clones(prepared.site, deciders)
        return [
            _run(replace(scenario, snapshot=snapshots[decider]), prepared, decider)
            for decider in deciders
        ]
    except (ArtefactError, DeciderFailedError, ScenarioError, OSError) as error:
        raise DemoError(f"--compare: {told(error)}") from error


def scenario_of(prepared: DemoPlan) -> Scenario:
    """The demo's requests as policy server and simulated engines read them, under its policy."""
    _require_simulated(prepared.site)
    snapshot, *_ = compile_manifests({"demo": to_yaml(prepared.site, ())}).snapshots
    requests = plan(
        prepared.workload,
        model=snapshot.models[0],
        max_tokens=MAX_OUTPUT_TOKENS,
        max_input_tokens=prepared.max_input_tokens,
    )
    read = [parse(ChatRequest, request.body) for request in requests]
    artefact = load_predictor(os.environ.get(PREDICTOR_VARIABLE, BUILTIN_PREDICTOR))
    predictor = make_predictor(artefact, snapshot)
    told = [predictor.predict(parse_completion(request.body).prompt) for request in requests]
    grader = SiteGrader(prepared.site, prepared.workload)
    first_ms = snapshot.qos.time_to_first_token_ms
    n = len(requests)
    return Scenario(
        snapshot=snapshot,
        arrival_s=prepared.workload.arrivals.seconds,
        prompt_tokens=np.array([one.prompt_tokens for one in read], np.int64),
        limit_s=np.full(n, prepared.limit_ms / 1e3),
        score=np.array(
            [[grader.score(i, c.expert)[0] for c in snapshot.candidates] for i in range(n)]
        ),
        output_tokens=_lengths(snapshot, [one.prompt_text for one in read], prepared.seed),
        predicted_quality=np.stack([one.quality for one in told]),
        predicted_output_tokens=np.minimum(
            np.stack([one.output_tokens for one in told]), MAX_OUTPUT_TOKENS
        ),
        first_token_limit_s=None if first_ms is None else np.full(n, first_ms / 1e3),
        seed=prepared.seed,
        description=prepared.workload.description,
    )


def _require_simulated(site: Site) -> None:
    """Of a real engine nobody knows how long its answers will be."""
    for expert in site.experts:
        for address in expert.spec.backend.addresses or ():
            if not is_loopback(address):
                raise DemoError(
                    f"--compare: {expert.metadata.name} at {address} is a real engine, whose"
                    " answers cannot be known beforehand"
                )


def _lengths(snapshot: Snapshot, prompts: Sequence[str], seed: int) -> IntArray:
    """(N, E) tokens of each engine's answer: it draws them from seed, model and prompt."""
    natural = [
        [
            Answer(model=c.model, prompt=prompt, seed=seed).natural_tokens(c.expected_output_tokens)
            for c in snapshot.candidates
        ]
        for prompt in prompts
    ]
    return np.minimum(np.array(natural, np.int64), MAX_OUTPUT_TOKENS)


def _clones(site: Site, deciders: Sequence[Algorithm]) -> dict[Algorithm, Snapshot]:
    """The snapshots that the demo's policy server has in force, by decider."""
    snapshots = compile_manifests({"demo": to_yaml(site, deciders)}).snapshots
    by_model = {model: snapshot for snapshot in snapshots for model in snapshot.models}
    return {decider: by_model[clone_model(site.policy, decider)] for decider in deciders}


def _run(scenario: Scenario, prepared: DemoPlan, decider: Algorithm) -> RunResult:
    seed = policy_seed(prepared.seed, scenario.snapshot)
    played = simulate(scenario, _decider(scenario.snapshot), seed=seed)
    return summarise(
        decider,
        _outcomes(played),
        SiteGrader(prepared.site, prepared.workload),
        limit_ms=prepared.limit_ms,
        in_flight_at_end=0,
        host=IDEAL_HOST,
    )


def _decider(snapshot: Snapshot) -> Decider | None:
    """Made anew from the model that the policy names; None: the router's own."""
    model = model_of(snapshot)
    return None if model is None else model.decider()


def _outcomes(played: Played) -> list[Outcome]:
    """What a client would have seen."""
    scenario = played.scenario
    answered = np.isfinite(played.finish_s)
    found = []
    for i, row in enumerate(played.endpoint.tolist()):
        outcome = Outcome(index=i, arrival_s=float(scenario.arrival_s[i]), decided=True)
        if row == REJECTED:
            outcome.ending, outcome.reason = Ending.REJECTED, "no endpoint was chosen"
        elif not answered[i]:
            outcome.reason = "refused by the engine"
        else:
            outcome.ending = Ending.ANSWERED
            outcome.expert = scenario.snapshot.candidates[row].expert
            outcome.first_token_s = float(played.first_token_s[i])
            outcome.last_token_s = float(played.finish_s[i])
            outcome.output_tokens = int(scenario.output_tokens[i, row])
        found.append(outcome)
    return found
