"""Child processes of the demo: all of them end with it, however it ends."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson

from pointsman_cli.demo.errors import DemoError
from pointsman_policy.child import ending_with_parent

START_TIMEOUT_S = 120.0
"""For one part to come up; one that ends instead is told at once. A small board takes its time."""
STOP_TIMEOUT_S = 6.0
"""After SIGTERM; a simulated engine lets running requests finish for up to 5 s."""
POLL_S = 0.05
LOG_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class Child:
    """One started process."""

    name: str
    log_path: Path
    """Its standard error; standard output too, unless that is read."""
    process: asyncio.subprocess.Process

    def failure(self, reason: str) -> DemoError:
        """An error that shows the end of the log."""
        tail = "\n".join(_lines(self.log_path)[-LOG_TAIL_LINES:])
        return DemoError(f"{self.name} {reason}; end of {self.log_path}:\n{tail}")

    def ended(self) -> str | None:
        """How it ended; None while it runs."""
        status = self.process.returncode
        return None if status is None else f"ended with status {status}"


@dataclass(slots=True)
class Children:
    """All processes that were started in one `children` block."""

    _started: list[Child] = field(default_factory=list)

    async def start(
        self, name: str, command: Sequence[str], *, log_path: Path, read_output: bool = False
    ) -> Child:
        """Start a process; with ``read_output`` its standard output is a pipe."""
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *ending_with_parent(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if read_output else log,
                stderr=log,
                # Ctrl-C at the terminal is the demo's to handle, in its order.
                start_new_session=True,
            )
        child = Child(name, log_path, process)
        self._started.append(child)
        return child

    def ended(self) -> list[str]:
        """One line for each process that ended too early."""
        return [f"{child.name} {how}" for child in self._started if (how := child.ended())]

    async def stop(self) -> None:
        """Ask all to end at once, and make them."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            running = [child.process for child in self._started if child.ended() is None]
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await asyncio.gather(*(process.wait() for process in running))


@contextlib.asynccontextmanager
async def children() -> AsyncIterator[Children]:
    """Stop all that the block started, also on cancellation."""
    started = Children()
    try:
        yield started
    finally:
        await started.stop()


async def first_line(child: Child) -> dict[str, object]:
    """The JSON object that a child prints when it is ready.

    Raises DemoError when it ends or stays silent instead.
    """
    assert child.process.stdout is not None, "started with read_output"  # noqa: S101
    line = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await child.process.stdout.readline()
            if not line:
                await child.process.wait()
    try:
        announced = orjson.loads(line)
    except orjson.JSONDecodeError:
        reason = child.ended() or f"did not start within {START_TIMEOUT_S:.0f} s"
        raise child.failure(reason) from None
    if not isinstance(announced, dict):
        raise child.failure(f"printed {line[:80]!r}")
    return announced


async def wait_for_http(session: aiohttp.ClientSession, child: Child, url: str) -> None:
    """Wait until ``url`` answers 200.

    Raises DemoError when the child ends or is not ready in time.
    """
    reason = f"was not ready within {START_TIMEOUT_S:.0f} s"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            while child.ended() is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url) as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(POLL_S)
    raise child.failure(child.ended() or reason)


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
