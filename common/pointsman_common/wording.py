"""Counts and lists in messages for people. Pure."""

from collections.abc import Iterable
from typing import Final

SHOWN: Final = 3
"""Items that a message lists."""


def listed(items: Iterable[object]) -> str:
    """The first few, and how many more there are."""
    texts = [str(item) for item in items]
    shown = ", ".join(texts[:SHOWN])
    return f"{shown} and {len(texts) - SHOWN} more" if len(texts) > SHOWN else shown


def counted(number: int, noun: str, many: str | None = None) -> str:
    """``1 expert``, ``2,000 experts``."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def ranged(fewest: int, most: int, noun: str) -> str:
    """``5 to 6 windows``, or ``1 window`` where they are alike."""
    return f"{fewest:,} to {counted(most, noun)}" if fewest != most else counted(most, noun)


def share(number: int, total: int, noun: str, *, one: str = "is", many: str = "are") -> str:
    """``1 of 2 experts is``, ``2 of 2 experts are``: the verb is that of the number."""
    return f"{number} of {counted(total, noun)} {one if 1 in (number, total) else many}"
