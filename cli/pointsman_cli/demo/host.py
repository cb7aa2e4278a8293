"""Watching this machine: when it is too slow, a run says nothing about the decider."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np

from pointsman_cli.demo.results import HostLoad

TICK_S = 0.02
LAG_WARN_MS = 25.0
"""Latencies per token are tens of milliseconds; timers this late distort them (ours)."""
BUSY_WARN = 0.92
"""Above this share of all cores the simulated engines may fall behind (ours)."""


class HostMeter:
    """Measures timer lag and CPU use between its start and `load`."""

    def __init__(self) -> None:
        self._lags_s: list[float] = []
        self._cpu_start = _cpu_ticks()

    async def tick(self) -> None:
        """Sample the event loop's lag until cancelled."""
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self._lags_s.append(max(0.0, time.perf_counter() - due))

    def load(self) -> HostLoad:
        """What was measured so far."""
        lag = float(np.percentile(self._lags_s, 99)) * 1e3 if self._lags_s else 0.0
        return HostLoad(loop_lag_p99_ms=lag, cpu_busy=_busy(self._cpu_start, _cpu_ticks()))


@asynccontextmanager
async def host_meter() -> AsyncIterator[HostMeter]:
    """Measure while the block runs."""
    meter = HostMeter()
    task = asyncio.create_task(meter.tick())
    try:
        yield meter
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def host_warning(decider: str, load: HostLoad) -> str | None:
    """One line when the machine was too slow for the run to count."""
    signs = []
    if load.loop_lag_p99_ms > LAG_WARN_MS:
        signs.append(f"timers were {load.loop_lag_p99_ms:.0f} ms late (p99)")
    if load.cpu_busy is not None and load.cpu_busy > BUSY_WARN:
        signs.append(f"CPUs were {load.cpu_busy:.0%} busy")
    if not signs:
        return None
    return (
        f"{decider}: this machine was too slow ({', '.join(signs)}), so its latencies are not"
        " the decider's; use a lower --rate"
    )


def _cpu_ticks() -> tuple[int, int] | None:
    """(busy, total) ticks of all cores since boot, from Linux's /proc/stat."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()
        ticks = [int(field) for field in first[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


def _busy(start: tuple[int, int] | None, end: tuple[int, int] | None) -> float | None:
    if start is None or end is None or end[1] <= start[1]:
        return None
    return (end[0] - start[0]) / (end[1] - start[1])
