"""The demo itself: one start, then each decider in turn under the same requests."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from rich.console import Console

from pointsman_cli.demo.capacity import site_capacity
from pointsman_cli.demo.data import (
    SiteGrader,
    load_traces,
    make_workload,
    mean_input_tokens,
)
from pointsman_cli.demo.errors import DemoError
from pointsman_cli.demo.host import host_meter, host_warning
from pointsman_cli.demo.live import DemoView, ask_in_flight
from pointsman_cli.demo.load import Outcome, Progress, drive, plan
from pointsman_cli.demo.model import served_model
from pointsman_cli.demo.options import DemoOptions
from pointsman_cli.demo.report import model_line
from pointsman_cli.demo.results import (
    DemoReport,
    ModelReport,
    RunResult,
    WorkloadReport,
    compare,
    level,
    summarise,
)
from pointsman_cli.demo.site import Site, clone_model, load_site, with_limit
from pointsman_cli.demo.stack import Stack, running_stack
from pointsman_common.wording import counted
from pointsman_core.resources import Algorithm
from pointsman_core.workload import Workload
from pointsman_policy.manifest_files import read_manifest_files

MAX_OUTPUT_TOKENS = 256
"""Longest answer asked for, so that one long answer does not hold up a whole run."""
DEFAULT_LOAD = 0.7
"""Default rate over what the cost model says the site can do (ours)."""
SAMPLE_REQUESTS = 2000
"""Requests drawn to learn the mean prompt length before the rate is chosen."""
DRAIN_TIMEOUT_S = 60.0
DRAIN_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """A site and the requests that every decider gets."""

    site: Site
    workload: Workload
    rate: float
    """Requests per second."""
    load: float | None
    """Rate over the site's estimated capacity; None when that is zero."""
    limit_ms: float
    max_input_tokens: int
    seconds: float
    seed: int
    raised_first_ms: float | None = None
    """The policy's limit on the first token where ``--limit-ms`` had to raise it as well."""

    def report(self) -> WorkloadReport:
        """The part of the report that all runs share."""
        return WorkloadReport(
            description=self.workload.description,
            requests=len(self.workload),
            seconds=self.seconds,
            rate=self.rate,
            estimated_load=self.load,
            mean_input_tokens=mean_input_tokens(self.workload, self.max_input_tokens),
            max_output_tokens=MAX_OUTPUT_TOKENS,
            limit_ms_per_token=self.limit_ms,
            seed=self.seed,
        )


def prepare(options: DemoOptions) -> DemoPlan:
    """Read manifests and data, and choose the requests. Starts nothing.

    Raises ManifestErrors, WorkloadError, DemoError.
    """
    declared = site = load_site(read_manifest_files([options.manifests]))
    if options.limit_ms is not None:
        site = with_limit(declared, options.limit_ms)
    first_ms = declared.policy.spec.qos.time_to_first_token_ms
    raised = site.policy.spec.qos.time_to_first_token_ms != first_ms
    limit_ms = site.policy.spec.qos.latency_per_token_ms
    context = min((e.spec.limits.context_tokens for e in site.experts), default=0)
    max_input_tokens = max(1, context - MAX_OUTPUT_TOKENS - 1)
    traces = load_traces(options.workload)

    def draw(requests: int, rate: float) -> Workload:
        return make_workload(traces, site, requests=requests, rate=rate, seed=options.seed)

    capacity = site_capacity(
        site.experts,
        input_tokens=mean_input_tokens(draw(SAMPLE_REQUESTS, 1.0), max_input_tokens),
        max_output_tokens=MAX_OUTPUT_TOKENS,
        limit_ms=limit_ms,
    )
    rate = options.rate or DEFAULT_LOAD * capacity
    if rate <= 0:
        raise DemoError(f"no expert can keep {limit_ms:g} ms per token; name a --rate")
    return DemoPlan(
        site=site,
        workload=draw(max(1, round(options.seconds * rate)), rate),
        rate=rate,
        load=rate / capacity if capacity > 0 else None,
        limit_ms=limit_ms,
        max_input_tokens=max_input_tokens,
        seconds=options.seconds,
        seed=options.seed,
        raised_first_ms=first_ms if raised else None,
    )


async def run_demo(
    options: DemoOptions, console: Console, publish: Callable[[DemoReport], None]
) -> None:
    """Start the site and run all deciders; ``publish`` gets the report.

    With ``keep_running`` it then serves until cancelled.
    """
    prepared = prepare(options)
    decides = Algorithm.HAN_DRL in options.deciders
    model = served_model(prepared.site.policy) if decides else None
    introduce(console, prepared, options, model)
    # Before anything starts: what cannot be simulated is told at once, and nobody is slowed down.
    simulated = _simulate(prepared, options.deciders) if options.compare else []
    # Answers stream for as long as they take; only connecting is bounded here.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session,
        running_stack(
            prepared.site,
            options.deciders,
            session,
            log_folder=options.output_dir / "logs",
            seed=options.seed,
        ) as stack,
    ):
        if options.deciders:
            report = await _run_all(options.deciders, prepared, stack, session, console)
            pairs = zip(report.runs, simulated, strict=True) if simulated else ()
            comparison = [compare(run, alike) for run, alike in pairs]
            publish(report.model_copy(update={"model": model, "comparison": comparison}))
        if options.keep_running:
            invite(console, stack)
            await asyncio.Event().wait()


def _simulate(prepared: DemoPlan, deciders: tuple[Algorithm, ...]) -> list[RunResult]:
    # Needs the extra `learning`, which the demo itself does not.
    from pointsman_cli.demo.compare import simulate_all

    return simulate_all(prepared, deciders)


def introduce(
    console: Console, prepared: DemoPlan, options: DemoOptions, model: ModelReport | None
) -> None:
    """Say what is going to happen."""
    load = "" if prepared.load is None else f", about {prepared.load:.0%} of what the site can do"
    say(console, f"site: {counted(len(prepared.site.experts), 'expert')} from {options.manifests}")
    if options.deciders:
        say(console, f"workload: {prepared.workload.description}")
        say(
            console,
            f"each decider: {counted(len(prepared.workload), 'request')} in {prepared.seconds:g} s,"
            f" {prepared.rate:.2g}/s{load}, limit {prepared.limit_ms:g} ms per token",
        )
    if model is not None:
        say(console, model_line(model))
    if prepared.raised_first_ms is not None:
        say(
            console,
            f"--limit-ms raises timeToFirstTokenMs from {prepared.raised_first_ms:g} too, which"
            " may not be below",
        )
    say(console, f"starting engines, policy server and Envoy; logs in {options.output_dir}/logs")


def invite(console: Console, stack: Stack) -> None:
    """Say how to try the running site by hand."""
    model = stack.site.policy.spec.models[0]
    say(console, f"\nserving {stack.url} (model {model}); Ctrl-C ends it. Try:")
    say(
        console,
        f"  curl -Ns {stack.url}/v1/chat/completions -H 'content-type: application/json' -d"
        f' \'{{"model": "{model}", "stream": true, "max_tokens": 40, "messages":'
        ' [{"role": "user", "content": "Write a function that adds two numbers."}]}\'',
    )
    say(console, f"  curl -s {stack.in_flight_url}")


def say(console: Console, text: str) -> None:
    """Print as is: no wrapping inside what may be copied, no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


async def _run_all(
    deciders: tuple[Algorithm, ...],
    prepared: DemoPlan,
    stack: Stack,
    session: aiohttp.ClientSession,
    console: Console,
) -> DemoReport:
    view = DemoView(console, session, stack.in_flight_url, limit_ms=prepared.limit_ms)
    grader = SiteGrader(stack.site, prepared.workload)
    runs: list[RunResult] = []
    for decider in deciders:
        result = await _run_one(decider, prepared, stack, session, view, grader)
        view.finished(result)
        runs.append(result)
    return DemoReport(
        runs=runs,
        level_with_best=level(runs),
        workload=prepared.report(),
        simulated=bool(stack.simulated),
        simulated_experts=list(stack.simulated),
        warnings=[*stack.processes.ended(), *warnings(runs, grader.unscored_experts)],
    )


async def _run_one(
    decider: Algorithm,
    prepared: DemoPlan,
    stack: Stack,
    session: aiohttp.ClientSession,
    view: DemoView,
    grader: SiteGrader,
) -> RunResult:
    requests = plan(
        prepared.workload,
        model=clone_model(stack.site.policy, decider),
        max_tokens=MAX_OUTPUT_TOKENS,
        max_input_tokens=prepared.max_input_tokens,
    )
    progress = Progress(total=len(requests))
    async with host_meter() as meter, view.run(decider, progress):
        outcomes: list[Outcome] = await drive(
            session, f"{stack.url}/v1/chat/completions", requests, progress
        )
    left = await _drain(session, stack.in_flight_url)
    return summarise(
        decider,
        outcomes,
        grader,
        limit_ms=prepared.limit_ms,
        in_flight_at_end=left,
        host=meter.load(),
    )


async def _drain(session: aiohttp.ClientSession, url: str) -> int:
    """Wait until nothing is in flight any more; returns what is left after a minute."""
    left = 0
    try:
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            while True:
                left = (await ask_in_flight(session, url)).total
                if not left:
                    return 0
                await asyncio.sleep(DRAIN_POLL_S)
    except TimeoutError:
        return left
    except aiohttp.ClientError as error:
        raise DemoError(f"the policy server does not answer any more: {error}") from error


def warnings(runs: list[RunResult], unscored: list[str]) -> list[str]:
    """What a reader of the numbers must know."""
    lines = [line for run in runs if (line := host_warning(run.decider, run.host))]
    if unscored:
        lines.append(
            f"no scores in the workload for {', '.join(unscored)}: their answers are graded by"
            " their declared priors"
        )
    lines += [
        f"{run.decider}: {run.without_decision} answers were routed by Envoy alone, the policy"
        " server being silent"
        for run in runs
        if run.without_decision
    ]
    lines += [
        f"{run.decider} failed: {run.by_fallback} of its answers were chosen by the policy's"
        " fallback"
        for run in runs
        if run.by_fallback
    ]
    lines += [
        f"{run.decider}: {counted(run.in_flight_at_end, 'request')} stayed in the in-flight table"
        for run in runs
        if run.in_flight_at_end
    ]
    return lines
