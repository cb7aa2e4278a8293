"""Endpoints that are there and yet only fail, so that they are left alone for a while.

Readiness tells which engines answer their health or metrics page. One that does, and answers
every request by a server error, would look idle or good and so draw all of them, and Envoy's
outlier detection does not help: a pick goes where it says. The numbers are those of Envoy's own
detection for what is not picked (envoy/bootstrap.yaml.j2). Pure.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

CONSECUTIVE_ERRORS: Final = 5
"""Server errors in a row until an endpoint is left alone."""
BASE_PAUSE_S: Final = 5.0
"""For how long at first; each time that it fails again right after, so much longer."""
MAX_PAUSE_S: Final = 60.0


@dataclass(slots=True)
class _Record:
    """What is remembered of an endpoint since its last good answer."""

    errors: int = 0
    pauses: int = 0
    until_s: float | None = None
    """When it is tried again; None while it is in use."""


class Outliers:
    """Errors in a row by endpoint, and which endpoints are left alone."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def succeeded(self, address: str) -> None:
        """A good answer began: all is forgotten, unless the endpoint is left alone right now."""
        known = self._records.get(address)
        if known is not None and known.until_s is None:
            del self._records[address]

    def failed(self, address: str) -> bool:
        """The endpoint answered by a server error; whether it should be left alone."""
        known = self._records.setdefault(address, _Record())
        known.errors += 1
        # After a pause one error is enough: it has been tried, and it has not mended.
        return known.until_s is None and (known.errors >= CONSECUTIVE_ERRORS or known.pauses > 0)

    def pause(self, address: str, *, now_s: float) -> float:
        """Leave an endpoint alone; for how many seconds."""
        known = self._records.setdefault(address, _Record())
        known.pauses += 1
        seconds = min(known.pauses * BASE_PAUSE_S, MAX_PAUSE_S)
        known.until_s = now_s + seconds
        return seconds

    def due(self, *, now_s: float) -> list[str]:
        """Endpoints whose time has come; they are in use again."""
        found = [
            a for a, r in self._records.items() if r.until_s is not None and r.until_s <= now_s
        ]
        for address in found:
            self.resume(address)
        return found

    def resume(self, address: str) -> None:
        """Put an endpoint in use again."""
        known = self._records.get(address)
        if known is not None:
            known.until_s = None

    def retain(self, addresses: Collection[str]) -> None:
        """Forget all others: one that comes back starts anew."""
        self._records = {a: r for a, r in self._records.items() if a in addresses}
