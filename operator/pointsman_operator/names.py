"""Which policy answers which model name. Pure.

A name belongs to the policy that has it in force, however old the policies are: creation
times are whole seconds, and a new policy must take nothing away from one that serves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pointsman_operator.observed import Key


@dataclass(frozen=True, slots=True)
class Claim:
    """The model names of one policy."""

    policy: Key
    in_force: tuple[str, ...] = ()
    """Those that it answers now."""
    wanted: tuple[str, ...] | None = None
    """Those of its spec; ``None`` when the spec is not valid."""


@dataclass(frozen=True, slots=True)
class Names:
    """Who gets what."""

    owners: Mapping[str, Key]
    granted: frozenset[Key]
    """Policies that get what they want."""
    kept: frozenset[Key]
    """Policies that do not, but keep what they have in force."""


def settle(claims: Sequence[Claim]) -> Names:
    """Share the names out; of those that want a free one the first in ``claims`` gets it.

    A policy gets all names that it wants or none, and gives up what it has in force only
    when it gets them. So what comes of it is settled: a second call changes nothing.
    """
    owners: dict[str, Key] = {}
    for claim in claims:
        for name in claim.in_force:
            owners.setdefault(name, claim.policy)
    waiting = [claim for claim in claims if claim.wanted is not None]
    granted: set[Key] = set()
    while (found := _first_free(waiting, owners)) is not None:
        # Each may free names that an earlier one waits for.
        waiting.remove(found)
        granted.add(found.policy)
        owners = {name: owner for name, owner in owners.items() if owner != found.policy}
        owners |= dict.fromkeys(found.wanted or (), found.policy)
    kept: set[Key] = set()
    for claim in claims:
        if claim.policy not in granted and claim.in_force and _free(claim.in_force, claim, owners):
            kept.add(claim.policy)
            owners |= dict.fromkeys(claim.in_force, claim.policy)
    return Names(owners, frozenset(granted), frozenset(kept))


def _first_free(waiting: Sequence[Claim], owners: Mapping[str, Key]) -> Claim | None:
    return next((one for one in waiting if _free(one.wanted or (), one, owners)), None)


def _free(names: Sequence[str], claim: Claim, owners: Mapping[str, Key]) -> bool:
    return all(owners.get(name, claim.policy) == claim.policy for name in names)
