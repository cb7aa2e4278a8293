"""Picking a few metrics out of a Prometheus text page, quickly.

prometheus_client takes about 11 microseconds a line, and a vLLM page has hundreds of
histogram lines: 4 ms a page, several times a second, for every endpoint. Handed only the
lines of the wanted metrics it takes 0.1 ms (measured on two cores).
"""

from collections.abc import Iterable, Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from pointsman_policy.engines.errors import MetricsError

_AFTER_NAME = frozenset("{ \t")


def read_samples(text: str, names: Iterable[str]) -> dict[str, list[Sample]]:
    """Samples of the named metrics; absent ones have no entry.

    A name is that of the sample lines, so a counter's ends in ``_total``. Lines of other
    metrics are not looked at, whatever they contain. Raises :class:`MetricsError` if a
    line of a wanted metric is malformed.
    """
    wanted = tuple(dict.fromkeys(names))
    page = "\n" + text
    found: dict[str, list[Sample]] = {}
    for name in wanted:
        lines = "\n".join(_lines_of(page, name))
        if lines:
            found[name] = _parse(lines, name)
    return found


def _lines_of(page: str, name: str) -> Iterator[str]:
    needle = "\n" + name
    start = page.find(needle)
    while start >= 0:
        after = start + len(needle)
        if page[after : after + 1] in _AFTER_NAME:
            end = page.find("\n", after)
            yield page[start + 1 : end if end >= 0 else len(page)]
        start = page.find(needle, after)


def _parse(lines: str, name: str) -> list[Sample]:
    try:
        # Without its TYPE line every sample comes as an untyped family of its own.
        return [
            sample for family in text_string_to_metric_families(lines) for sample in family.samples
        ]
    except (ValueError, IndexError) as error:
        raise MetricsError(f"malformed sample of {name}: {error or lines[:120]!r}") from error
