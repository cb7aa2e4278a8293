"""What the watches and the full lists say, in one table. Pure.

Watches tell at once but may miss things: kopf loses deletions after a 410, and a stream
can stall. So every kind is listed in full from time to time and replaces the table, except
for objects that a watch told of while the list was under way: there nobody can say which
of the two is newer, and the next list settles it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pointsman_operator.observed import AnyObject, Key, Kind, read_meta, read_object

GRACE_S: Final = 10.0
"""A watch that tells of a listed change this much later has not missed it."""


@dataclass(slots=True)
class _Table:
    objects: dict[Key, AnyObject] = field(default_factory=dict)
    lists: list[set[Key]] = field(default_factory=list)
    """Of each list under way: what watches told of meanwhile."""
    corrected: dict[Key, float] = field(default_factory=dict)
    """What a list changed and no watch has told of yet, with the time."""
    listed: bool = False
    installed: bool = True
    event_at: float | None = None
    events: int = 0


class Store:
    """All objects by kind. Times are seconds of any steady clock. Not thread-safe."""

    def __init__(self) -> None:
        self._tables = {kind: _Table() for kind in Kind}

    def objects(self, kind: Kind) -> Mapping[Key, Any]:
        """A copy, so that it can be looked at in a thread."""
        return dict(self._tables[kind].objects)

    def holds_any(self, kind: Kind, namespace: str) -> bool:
        """Whether there is an object of the kind in a namespace."""
        return any(key.namespace == namespace for key in self._tables[kind].objects)

    def installed(self, kind: Kind) -> bool:
        """Whether the API server knows the kind."""
        return self._tables[kind].installed

    def events(self, kind: Kind) -> int:
        """Watch events of the kind so far."""
        return self._tables[kind].events

    def event_age(self, kind: Kind, *, now: float) -> float | None:
        """Seconds since the last watch event of the kind."""
        at = self._tables[kind].event_at
        return None if at is None else now - at

    def take_event(self, kind: Kind, event: str | None, body: object, *, now: float) -> bool:
        """Take one watch event in; tells whether anything changed.

        ``event`` is ADDED, MODIFIED, DELETED, or None for an object of kopf's own list.
        """
        table = self._tables[kind]
        table.events += 1
        table.event_at = now
        meta = read_meta(body) if isinstance(body, Mapping) else None
        if meta is None:
            return False
        known = table.objects.get(meta.key)
        if event == "DELETED" and known is not None and known.meta.uid != meta.uid:
            return False  # the end of a predecessor of the same name
        for touched in table.lists:
            touched.add(meta.key)
        table.corrected.pop(meta.key, None)
        if event == "DELETED":
            return _put(table, meta.key, None)
        table.installed = True
        found = read_object(kind, body)
        return _put(table, meta.key, found)

    def begin_list(self, kind: Kind) -> set[Key]:
        """Call before a full list; what it returns goes to `end_list`."""
        touched: set[Key] = set()
        self._tables[kind].lists.append(touched)
        return touched

    def abandon_list(self, kind: Kind, touched: set[Key]) -> None:
        """The list failed."""
        lists = self._tables[kind].lists
        lists[:] = [one for one in lists if one is not touched]

    def end_list(
        self,
        kind: Kind,
        touched: set[Key],
        bodies: Iterable[object] | None,
        *,
        now: float,
        kept: Collection[str] = (),
    ) -> bool:
        """Replace the table by a full list; ``None`` when the kind is not installed.

        ``kept`` are namespaces that could not be listed: what is known of them stays.
        Tells whether anything changed.
        """
        self.abandon_list(kind, touched)
        table = self._tables[kind]
        changed = table.installed != (bodies is not None)
        table.installed = bodies is not None
        found = {one.meta.key: one for one in (read_object(kind, b) for b in bodies or ()) if one}
        for key in (table.objects.keys() | found.keys()) - touched:
            if key.namespace not in kept and _put(table, key, found.get(key)):
                changed = True
                if table.listed:
                    # The first time counts: what changes often is missed as well.
                    table.corrected.setdefault(key, now)
        table.listed = True
        return changed

    def missed(self, kind: Kind, *, now: float) -> int:
        """How many changes the watch has missed since the last call."""
        table = self._tables[kind]
        late = [key for key, at in table.corrected.items() if now - at >= GRACE_S]
        for key in late:
            del table.corrected[key]
        return len(late)


def _put(table: _Table, key: Key, found: AnyObject | None) -> bool:
    if found is None:
        return table.objects.pop(key, None) is not None
    before = table.objects.get(key)
    table.objects[key] = found
    return before != found
