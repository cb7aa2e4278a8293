"""What is seen while a run goes on; on standard error, as plain lines without a terminal.

The QoS of a run is shown when it is over. Of the one under way only the share in time is,
and labelled: early in a run only quick answers are in, which flatters every decider.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import aiohttp
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pointsman_cli.demo.load import Ending, Progress
from pointsman_cli.demo.results import RunResult

REFRESH_S = 0.25
PLAIN_LINE_EVERY_S = 5.0
BAR_WIDTH = 40


@dataclass(frozen=True, slots=True)
class EndpointLoad:
    """One endpoint as the policy server sees it."""

    expert: str
    in_flight: int
    waiting: int
    ready: bool


@dataclass(slots=True)
class InFlight:
    """The policy server's in-flight table, last time it was asked."""

    total: int = 0
    endpoints: dict[str, EndpointLoad] = field(default_factory=dict)

    @property
    def all_ready(self) -> bool:
        """Whether there are endpoints and each may be chosen."""
        return bool(self.endpoints) and not self.unready

    @property
    def unready(self) -> list[str]:
        """Experts with an endpoint that may not be chosen."""
        return sorted(load.expert for load in self.endpoints.values() if not load.ready)


async def ask_in_flight(session: aiohttp.ClientSession, url: str) -> InFlight:
    """Read ``/debug/in-flight``; raises aiohttp.ClientError when the server is silent."""
    async with session.get(url) as response:
        response.raise_for_status()
        page = await response.json()
    endpoints: Mapping[str, dict[str, object]] = page["endpoints"]
    return InFlight(
        total=int(page["in_flight"]),
        endpoints={
            address: EndpointLoad(
                expert=str(entry.get("expert") or address),
                in_flight=_count(entry.get("in_flight")),
                waiting=_count(entry.get("waiting")),
                ready=bool(entry.get("ready")),
            )
            for address, entry in endpoints.items()
        },
    )


def _count(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0


class DemoView:
    """Draws the runs that are over and the one under way."""

    def __init__(
        self,
        console: Console,
        session: aiohttp.ClientSession,
        debug_url: str,
        *,
        limit_ms: float,
    ) -> None:
        self._limit_ms = limit_ms
        self._console = console
        self._session = session
        self._debug_url = debug_url
        self._finished: list[RunResult] = []
        self.in_flight = InFlight()

    @asynccontextmanager
    async def run(self, decider: str, progress: Progress) -> AsyncIterator[None]:
        """Show one run while the block goes on."""
        show = self._live if self._console.is_terminal else self._lines
        task = asyncio.create_task(show(decider, progress))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def finished(self, result: RunResult) -> None:
        """Add a run that is over."""
        self._finished.append(result)
        self._console.print(
            f"{result.decider}: average QoS {result.average_qos:.3f},"
            f" {result.violation_rate:.1%} violations, {result.failed} failed",
            highlight=False,
        )

    async def _live(self, decider: str, progress: Progress) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                await self._poll()
                picture = render(
                    decider, progress, self.in_flight, self._finished, limit_ms=self._limit_ms
                )
                live.update(picture, refresh=True)
                await asyncio.sleep(REFRESH_S)

    async def _lines(self, decider: str, progress: Progress) -> None:
        while True:
            await asyncio.sleep(PLAIN_LINE_EVERY_S)
            await self._poll()
            line = f"{decider}: {status_line(progress, limit_ms=self._limit_ms)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    async def _poll(self) -> None:
        """Ask the server; a view must not stop a run, so silence keeps the last answer."""
        with suppress(aiohttp.ClientError, TimeoutError, KeyError):
            self.in_flight = await ask_in_flight(self._session, self._debug_url)


def status_line(progress: Progress, *, limit_ms: float) -> str:
    """Counts, share in time and running percentiles of a run under way."""
    latencies = [ms for o in progress.finished[-200:] if (ms := o.ms_per_token) is not None]
    text = (
        f"{progress.sent} of {progress.total} sent, {progress.in_flight} in flight,"
        f" {progress.endings[Ending.ANSWERED]} answered,"
        f" {progress.endings[Ending.FAILED]} failed,"
        f" {progress.endings[Ending.REJECTED]} rejected"
    )
    if progress.finished:
        share = _in_time(progress, limit_ms) / len(progress.finished)
        text += f"; {share:.0%} in time so far (early: quick answers come first)"
    if latencies:
        p50, p99 = np.percentile(latencies, [50, 99])
        text += f"; last {len(latencies)} answers p50 {p50:.0f}, p99 {p99:.0f} ms/token so far"
    return text


def _in_time(progress: Progress, limit_ms: float) -> int:
    """Answers so far that kept the limit."""
    latencies = (outcome.ms_per_token for outcome in progress.finished)
    return sum(ms is not None and ms <= limit_ms for ms in latencies)


def render(
    decider: str,
    progress: Progress,
    in_flight: InFlight,
    finished: Sequence[RunResult],
    *,
    limit_ms: float,
) -> Group:
    """The live picture: QoS of the runs that are over, then the run under way.

    Of that one progress, counts, and a bar per endpoint.
    """
    head = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=progress.total, completed=len(progress.finished), width=BAR_WIDTH)
    head.add_row(Text(decider, style="bold"), bar)
    status = Text(status_line(progress, limit_ms=limit_ms))
    return Group(qos_bars(finished), head, status, queue_bars(in_flight))


def qos_bars(finished: Sequence[RunResult]) -> Table:
    """Average QoS of each run that is over, a full bar being 1; the best one stands out."""
    table = Table.grid(padding=(0, 1))
    best = max((run.average_qos for run in finished), default=0.0)
    for run in finished:
        colour = "green" if run.average_qos == best else "cyan"
        bar = Text("█" * round(run.average_qos * BAR_WIDTH), style=colour)
        bar.append("·" * (BAR_WIDTH - len(bar)), style="dim")
        value = f"QoS {run.average_qos:.3f}±{run.average_qos_95:.2f}"
        table.add_row(Text(run.decider), bar, value, f"{run.violation_rate:.0%} late")
    return table


def queue_bars(in_flight: InFlight) -> Table:
    """Requests on each endpoint: served ones solid, waiting ones shaded."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    loads: Sequence[EndpointLoad] = sorted(in_flight.endpoints.values(), key=lambda e: e.expert)
    largest = max((load.in_flight for load in loads), default=0)
    scale = max(1.0, largest / BAR_WIDTH)
    for load in loads:
        waiting = min(load.waiting, load.in_flight)
        served = load.in_flight - waiting
        bar = Text("█" * round(served / scale), style="green")
        bar.append("░" * round(waiting / scale), style="yellow")
        if not load.ready:
            bar.append(" not ready", style="red")
        table.add_row(Text(load.expert), str(load.in_flight), bar)
    return table
