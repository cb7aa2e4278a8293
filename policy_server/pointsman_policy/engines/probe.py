"""One look at one endpoint over HTTP: whether it is there, and how loaded it is."""

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import aiohttp
from yarl import URL

from pointsman_core.state import EngineLoad
from pointsman_policy.engines.adapter import Adapter
from pointsman_policy.engines.errors import MetricsError

MAX_PAGE_BYTES: Final = 4 * 1024 * 1024
"""A longer answer is not read further."""

_HEALTH_PATHS: Final = ("/health", "/v1/models")
_NOT_IMPLEMENTED: Final = 501  # llama-server started without --metrics

# Errors by which the other side says that nobody listens. Other OS errors, such as too
# many open files, are our own trouble and say nothing about the endpoint.
_GONE_ERRNOS: Final = frozenset(
    {
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
    }
)


class Answer(StrEnum):
    """How an endpoint took a request."""

    ALIVE = "alive"
    """It answered, and not with a server error."""
    FAILED = "failed"
    """Time-out, server error or gibberish: it may only be busy."""
    GONE = "gone"
    """Refused, reset or unreachable: nobody listens."""


class ScrapeError(StrEnum):
    """What can go wrong in a scrape; the label of a counter."""

    CONNECTION = "connection"
    TIMEOUT = "timeout"
    PROTOCOL = "protocol"
    SERVER_ERROR = "server_error"
    METRICS_MISSING = "metrics_missing"
    METRICS_MALFORMED = "metrics_malformed"
    METRICS_TOO_LARGE = "metrics_too_large"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look at an endpoint found."""

    answer: Answer
    reason: str = ""
    """For people: why it is not alive, or why there is no load. Empty when all is well."""
    load: EngineLoad | None = None
    at: float = 0.0
    """The clock when the answer with the load arrived, in seconds."""
    error: ScrapeError | None = None


@dataclass(frozen=True, slots=True)
class _Page:
    status: int
    text: str | None
    """``None`` if it is over the limit."""
    at: float


class Prober:
    """Looks at one endpoint, time and again.

    With an adapter the metrics page is read; where there is none, or no adapter, the
    health page tells whether the endpoint lives: ``/health``, or ``/v1/models`` for
    engines without it. Any answer below 500 counts as alive: an engine that wants an API
    key is there.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        address: str,
        adapter: Adapter | None,
        metrics_path: str,
        clock: Callable[[], float],
    ) -> None:
        self._session = session
        self._base = f"http://{address}"
        self._adapter = adapter
        self._metrics_path = metrics_path
        self._metrics_url = URL(self._base + metrics_path)
        self._clock = clock
        self._health_path = _HEALTH_PATHS[0]

    async def look(self) -> Finding:
        """One look; never raises for anything that the endpoint does."""
        try:
            if self._adapter is None:
                return await self._look_at_health()
            return await self._look_at_metrics(self._adapter)
        except TimeoutError:
            return Finding(Answer.FAILED, "timed out", error=ScrapeError.TIMEOUT)
        except aiohttp.ServerDisconnectedError:
            return Finding(Answer.GONE, "connection closed", error=ScrapeError.CONNECTION)
        except OSError as error:  # includes aiohttp's connection errors
            answer = Answer.GONE if error.errno in _GONE_ERRNOS else Answer.FAILED
            return Finding(answer, _os_reason(error), error=ScrapeError.CONNECTION)
        except aiohttp.ClientError as error:
            reason = f"not understood: {type(error).__name__}"
            return Finding(Answer.FAILED, reason, error=ScrapeError.PROTOCOL)

    async def _look_at_metrics(self, adapter: Adapter) -> Finding:
        page = await self._get(self._metrics_url)
        status = page.status
        if status == 200:
            return _read(page, adapter)
        if status >= 500 and status != _NOT_IMPLEMENTED:
            return _server_error(self._metrics_path, status)
        finding = await self._look_at_health()
        if finding.answer is not Answer.ALIVE:
            return finding
        reason = f"no metrics: GET {self._metrics_path} answered {status}"
        return replace(finding, reason=reason, error=ScrapeError.METRICS_MISSING)

    async def _look_at_health(self) -> Finding:
        page = await self._get(URL(self._base + self._health_path))
        if page.status == 404 and self._health_path != _HEALTH_PATHS[-1]:
            self._health_path = _HEALTH_PATHS[-1]
            page = await self._get(URL(self._base + self._health_path))
        if page.status >= 500:
            return _server_error(self._health_path, page.status)
        return Finding(Answer.ALIVE)

    async def _get(self, url: URL) -> _Page:
        # No redirects: an endpoint must not send us to other hosts.
        async with self._session.get(url, allow_redirects=False) as response:
            at = self._clock()
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_PAGE_BYTES:
                    response.close()
                    return _Page(response.status, None, at)
            return _Page(response.status, body.decode(errors="replace"), at)


def _read(page: _Page, adapter: Adapter) -> Finding:
    if page.text is None:
        reason = f"metrics page over {MAX_PAGE_BYTES} bytes"
        return Finding(Answer.ALIVE, reason, error=ScrapeError.METRICS_TOO_LARGE)
    try:
        load = adapter.parse(page.text)
    except MetricsError as error:
        reason = f"metrics not readable: {error}"
        return Finding(Answer.ALIVE, reason, error=ScrapeError.METRICS_MALFORMED)
    return Finding(Answer.ALIVE, load=load, at=page.at)


def _server_error(path: str, status: int) -> Finding:
    return Finding(Answer.FAILED, f"GET {path} answered {status}", error=ScrapeError.SERVER_ERROR)


def _os_reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return f"connection failed: {name}"
