"""Envoy as a child process, for the demo, for tests and for trying things by hand."""

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from pointsman_policy.child import ending_with_parent
from pointsman_policy.envoy._bootstrap import envoy_binary, render_bootstrap
from pointsman_policy.envoy._settings import EnvoySettings

_POLL_S = 0.03
_LOG_TAIL_CHARS = 4000


class EnvoyStartError(RuntimeError):
    """Envoy ended or did not become ready in time; the message has the end of its log."""


@dataclass(frozen=True)
class RunningEnvoy:
    """A ready Envoy."""

    url: str
    """Base address for clients, `http://ip:port`."""

    admin_url: str
    """Base address of the admin interface."""

    log_path: Path
    """Where its standard output (access log) and standard error go."""

    process: asyncio.subprocess.Process
    """The child process."""

    async def stats(self) -> dict[str, int]:
        """Return all counters and gauges by name."""
        async with aiohttp.ClientSession() as session:
            text = await _get(session, f"{self.admin_url}/stats?type=Counters")
            text += await _get(session, f"{self.admin_url}/stats?type=Gauges")
        pairs = (line.rpartition(": ") for line in text.splitlines())
        return {name: int(value) for name, _, value in pairs if value.isdigit()}


@contextlib.asynccontextmanager
async def running_envoy(
    settings: EnvoySettings,
    *,
    log_path: Path | None = None,
    concurrency: int = 1,
    log_level: str = "warning",
    ready_timeout_s: float = 120.0,
    stop_timeout_s: float = 5.0,
) -> AsyncIterator[RunningEnvoy]:
    """Run Envoy until the end of the block.

    Ports given as 0 are chosen by the kernel, so that several can start at once without a race.
    Envoy is ready as soon as it serves clients, with or without a policy server. It gets SIGTERM
    at the end, and SIGKILL `stop_timeout_s` seconds later.

    `log_path` is appended to; without it, the log is lost at the end. `concurrency` is the number
    of worker threads.

    Raises EnvoyStartError, FileNotFoundError when there is no binary.
    """
    with tempfile.TemporaryDirectory(prefix="pointsman-envoy-") as folder:
        home = Path(folder)
        bootstrap = home / "bootstrap.yaml"
        bootstrap.write_text(render_bootstrap(settings), encoding="utf-8")
        log = log_path or home / "envoy.log"
        admin_file = home / "admin"
        process = await _spawn(
            [
                str(envoy_binary()),
                *("--config-path", str(bootstrap)),
                *("--admin-address-path", str(admin_file)),
                *("--concurrency", str(concurrency)),
                *("--log-level", log_level),
                *("--file-flush-interval-msec", "100"),
                "--disable-hot-restart",
            ],
            log=log,
        )
        try:
            yield await _ready(process, admin_file, log, timeout_s=ready_timeout_s)
        finally:
            await _stop(process, timeout_s=stop_timeout_s)


async def _spawn(command: Sequence[str], *, log: Path) -> asyncio.subprocess.Process:
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *ending_with_parent(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


async def _ready(
    process: asyncio.subprocess.Process, admin_file: Path, log: Path, *, timeout_s: float
) -> RunningEnvoy:
    reason = f"not ready after {timeout_s:g} s"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
            while process.returncode is None:
                if addresses := await _addresses(session, admin_file):
                    url, admin_url = addresses
                    return RunningEnvoy(url, admin_url, log, process)
                await asyncio.sleep(_POLL_S)
            reason = f"ended with status {process.returncode}"
    tail = _read(log)[-_LOG_TAIL_CHARS:]
    raise EnvoyStartError(f"Envoy {reason}; end of its log {log}:\n{tail}")


async def _addresses(session: aiohttp.ClientSession, admin_file: Path) -> tuple[str, str] | None:
    """Return the base addresses for clients and for the admin once Envoy serves, else None."""
    if not (admin := _read(admin_file).strip()):
        return None
    try:
        if (await _get(session, f"http://{admin}/ready")).strip() != "LIVE":
            return None
        listeners = await _get(session, f"http://{admin}/listeners")
    except aiohttp.ClientError:
        return None
    # One line per listener: `clients::127.0.0.1:8080`.
    for line in listeners.splitlines():
        name, _, address = line.partition("::")
        if name == "clients" and not address.endswith(":0"):
            return f"http://{address}", f"http://{admin}"
    return None


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


async def _get(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as response:
        return await response.text()


async def _stop(process: asyncio.subprocess.Process, *, timeout_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
