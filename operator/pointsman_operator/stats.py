"""How policies did lately: from the policy servers, or from Prometheus."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pointsman_operator.observed import Key, Performance
from pointsman_operator.publisher import PolicyCounts

DIGITS: Final = 2
"""Of averages in a status: more would write it at every look."""
WINDOW: Final = "5m"
TIMEOUT_S: Final = 10


def _sum(counter: str) -> str:
    return f"sum by (policy) (increase({counter}[{WINDOW}]))"


_REQUESTS: Final = _sum("pointsman_qos_requests_total")
_VIOLATIONS: Final = _sum("pointsman_latency_violations_total")

AVERAGE_QOS: Final = f"{_sum('pointsman_predicted_qos_total')} / {_REQUESTS}"
VIOLATION_RATE: Final = f"({_VIOLATIONS} or 0 * {_REQUESTS}) / {_REQUESTS}"
"""A policy that has never been late has no counter of violations."""


def from_servers(servers: Iterable[Mapping[Key, PolicyCounts]]) -> dict[Key, Performance]:
    """Averages over the requests of all servers; policies without requests are left out.

    The quality of an answer is the predicted one: in operation nobody knows the true one.
    """
    sums: dict[Key, list[float]] = {}
    for server in servers:
        for key, counts in server.items():
            total = sums.setdefault(key, [0.0, 0.0, 0.0])
            total[0] += counts.requests
            total[1] += counts.violations
            total[2] += counts.predicted_qos_sum
    return {
        key: Performance(round(qos / requests, DIGITS), round(violations / requests, DIGITS))
        for key, (requests, violations, qos) in sums.items()
        if requests
    }


def filled(
    found: Mapping[Key, Performance], others: Mapping[Key, Performance]
) -> dict[Key, Performance]:
    """Averages of which the missing ones are taken from elsewhere."""
    merged = dict(others)
    for key, one in found.items():
        other = others.get(key, Performance())
        merged[key] = Performance(
            other.average_qos if one.average_qos is None else one.average_qos,
            other.violation_rate if one.violation_rate is None else one.violation_rate,
        )
    return merged


class PrometheusStats:
    """Averages by PromQL; blocking, so call it in a thread."""

    def __init__(self, url: str) -> None:
        from prometheus_api_client import PrometheusConnect
        from urllib3.util.retry import Retry

        # No retries: the next look comes anyway.
        self._client: Any = PrometheusConnect(url=url, timeout=TIMEOUT_S, retry=Retry(total=0))

    def read(self) -> dict[Key, Performance]:
        """All policies that Prometheus knows of.

        Raises:
            OSError: it cannot be reached.
            ValueError: its answer cannot be used.

        """
        from prometheus_api_client.exceptions import PrometheusApiClientException

        try:
            qos = by_policy(self._client.custom_query(AVERAGE_QOS))
            violations = by_policy(self._client.custom_query(VIOLATION_RATE))
        except PrometheusApiClientException as error:
            raise ValueError(str(error)) from None
        except (LookupError, TypeError, AttributeError):
            raise ValueError("its answer is not one of the Prometheus API") from None
        return {
            key: Performance(qos.get(key), violations.get(key))
            for key in sorted(qos.keys() | violations.keys())
        }


def by_policy(rows: object) -> dict[Key, float]:
    """The values of an instant vector with the label ``policy`` (``namespace/name``).

    What is no number, such as 0/0 without requests, is left out. Prometheus extrapolates each
    counter by itself, so that a share may come out above 1, which no status may hold.
    """
    found: dict[Key, float] = {}
    if not isinstance(rows, list):
        return found
    for row in rows:
        try:
            namespace, _, name = row["metric"]["policy"].partition("/")
            value = float(row["value"][1])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            continue
        if name and math.isfinite(value):
            found[Key(namespace, name)] = round(min(1.0, max(0.0, value)), DIGITS)
    return found
