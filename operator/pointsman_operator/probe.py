"""Whether engines answer, and whether they serve the declared model.

Once per interval and endpoint, with few at a time. The answers end in `Reachable` and
`ModelServed`; requests do not go to an endpoint that lists other models. Whether one lives
the policy servers find out for themselves.
"""

import asyncio
import errno
import random
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import aiohttp
import orjson
import structlog

from pointsman_operator.observed import Probe

TIMEOUT_S: Final = 5.0
AT_ONCE: Final = 16
MAX_BYTES: Final = 1024 * 1024
FAILURES_THAT_COUNT: Final = 2
"""An endpoint that answered before must fail so often in a row: it may only be busy."""
RETRY_S: Final = 5.0

log = structlog.get_logger(__name__)


class Prober:
    """Probes a changing set of addresses; ``on_change`` is called when a result changes."""

    def __init__(self, *, interval_s: float, on_change: Callable[[], None]) -> None:
        self._interval_s = interval_s
        self._on_change = on_change
        self._results: dict[str, Probe] = {}
        self._failures: dict[str, int] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            connector=aiohttp.TCPConnector(force_close=True, limit=AT_ONCE),
        )

    def set_addresses(self, addresses: Collection[str]) -> None:
        """Probe these from now on, new ones at once."""
        for address in self._tasks.keys() - set(addresses):
            self._tasks.pop(address).cancel()
            self._results.pop(address, None)
            self._failures.pop(address, None)
        for address in addresses:
            if address not in self._tasks:
                name = f"probe {address}"
                self._tasks[address] = asyncio.create_task(self._watch(address), name=name)

    @property
    def settled(self) -> bool:
        """Every address was asked at least once."""
        return len(self._results) == len(self._tasks)

    def results(self) -> Mapping[str, Probe]:
        """The last result of every address that has one."""
        return dict(self._results)

    async def close(self) -> None:
        """Stop."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    async def _watch(self, address: str) -> None:
        while True:
            try:
                async with self._gate:
                    found = await look(self._session, address)
            except Exception:
                log.exception("probe failed", endpoint=address)
                found = Probe(answers=False, error="not understood")
            again_s = self._take(address, found)
            await asyncio.sleep(again_s * random.uniform(0.9, 1.1))

    def _take(self, address: str, found: Probe) -> float:
        """Keep the result; tells in how many seconds to look again."""
        before = self._results.get(address)
        if found.answers:
            self._failures[address] = 0
        else:
            self._failures[address] = failures = self._failures.get(address, 0) + 1
            if before is not None and before.answers and failures < FAILURES_THAT_COUNT:
                return min(RETRY_S, self._interval_s)
        if found != before:
            self._results[address] = found
            self._on_change()
        return self._interval_s


async def look(session: aiohttp.ClientSession, address: str) -> Probe:
    """Ask ``/v1/models`` once. Never raises for anything that the endpoint does.

    Any answer below 500 shows that the engine is there; only 200 with a list tells of its
    models.
    """
    try:
        # No redirects: an endpoint must not send us to other hosts.
        async with session.get(f"http://{address}/v1/models", allow_redirects=False) as response:
            if response.status >= 500:
                return Probe(answers=False, error=f"answered {response.status}")
            if response.status != 200:
                return Probe(answers=True, error=f"/v1/models answered {response.status}")
            body = await _read(response)
    except TimeoutError:
        return Probe(answers=False, error=f"no answer within {TIMEOUT_S:g} s")
    except OSError as error:  # includes aiohttp's connection errors
        name = errno.errorcode.get(error.errno or 0, type(error).__name__)
        return Probe(answers=False, error=f"connection failed ({name})")
    except aiohttp.ClientError as error:
        return Probe(answers=False, error=f"no HTTP ({type(error).__name__})")
    models = _models(body)
    if models is None:
        return Probe(answers=True, error="/v1/models is not a list of models")
    return Probe(answers=True, models=models)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BYTES:
            response.close()
            return b""
    return bytes(body)


def _models(body: bytes) -> tuple[str, ...] | None:
    """Names in an OpenAI list of models, sorted; ``None`` if it is none."""
    try:
        document: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    items = document.get("data") if isinstance(document, dict) else None
    if not isinstance(items, list):
        return None
    names = (item.get("id") for item in items if isinstance(item, dict))
    return tuple(sorted({name for name in names if isinstance(name, str)}))
