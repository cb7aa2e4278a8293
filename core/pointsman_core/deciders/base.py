"""What a decider is."""

from collections.abc import Mapping
from dataclasses import field
from typing import Protocol

from pointsman_core.observation import Observation
from pointsman_core.records import record
from pointsman_core.state import BoolArray, FloatArray


@record
class Scores:
    """A decider's opinion of all candidates."""

    values: FloatArray
    """(E,) higher is better; ineligible candidates may have any value."""
    in_time: BoolArray | None = None
    """(E,) whether the limits would be kept; None: the decider does not look at them."""
    acceptable: BoolArray | None = None
    """(E,) whether the request may be admitted there under ``Reject``, should it be chosen.

    None: as ``in_time`` says, and where that is None too the common check of the forecast.
    """
    parts: Mapping[str, FloatArray] = field(default_factory=dict)
    """(E,) what the values are made of, by name, for explanations only."""


class Decider(Protocol):
    """Scores candidates. May keep state of its own between calls (RoundRobin does)."""

    def score(self, seen: Observation) -> Scores:
        """Score all E candidates."""
        ...
