"""Which snapshots are in force when an operator decides it: by publish, and from files.

The operator publishes complete sets. Files, such as a mounted ConfigMap, hold the same
snapshots for when nobody publishes: at the start, or while the operator cannot reach the
server. A mounted file lags behind by up to minutes, so that a publish outranks it.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pointsman_core.snapshot import Snapshot, read_snapshot, snapshot_json
from pointsman_policy.eds import EdsEndpoint, merge_endpoints
from pointsman_policy.watch import MAX_BYTES, watched_files

SUFFIXES: Final = frozenset({".json"})
MAX_PUBLISHERS: Final = 64
"""Publishers whose last sequence is remembered; every operator process is one."""


class SnapshotSetError(ValueError):
    """A set of snapshots that cannot be put in force, with every reason."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(self.reasons))


class StaleSequenceError(ValueError):
    """A set that its publisher has replaced by a later one already."""


# --- sets ------------------------------------------------------------------------------


def faults(snapshots: Sequence[Snapshot]) -> list[str]:
    """Why these snapshots cannot be in force together; empty when they can."""
    return [*_repeats(snapshots), *_conflicts(snapshots), *_bad_endpoints(snapshots)]


def _repeats(snapshots: Iterable[Snapshot]) -> Iterator[str]:
    for name, count in Counter(s.full_name for s in snapshots).items():
        if count > 1:
            yield f"{name}: there are {count} snapshots of it"


def _conflicts(snapshots: Iterable[Snapshot]) -> Iterator[str]:
    answered: dict[str, str] = {}
    for snapshot in snapshots:
        name = snapshot.full_name
        for model in snapshot.models:
            other = answered.setdefault(model, name)
            if other != name:
                yield f"{name}: model {model} is answered by {other} already"


def _bad_endpoints(snapshots: Iterable[Snapshot]) -> Iterator[str]:
    for snapshot in snapshots:
        try:
            merge_endpoints(endpoints_of(snapshot))
        except ValueError as error:
            yield f"{snapshot.full_name}: {error}"


def endpoints_of(snapshot: Snapshot) -> Iterator[EdsEndpoint]:
    """The candidates as Envoy would be told of them."""
    for candidate in snapshot.candidates:
        yield EdsEndpoint(
            address=candidate.address,
            served_models=candidate.served_models,
            expert=candidate.expert,
        )


# --- files -----------------------------------------------------------------------------

FileContents = Mapping[Path, Snapshot | str]
"""The snapshot in each file, or why there is none."""


def read_snapshot_files(paths: Sequence[Path]) -> dict[Path, Snapshot | str]:
    """Read all snapshot files; paths that are not there count as empty folders."""
    found = {file: _read(file) for file in watched_files(paths, suffixes=SUFFIXES)}
    return {file: content for file, content in found.items() if content is not None}


def write_snapshot_files(folder: Path, snapshots: Iterable[Snapshot]) -> Iterator[Path]:
    """Write one file per policy, each at once, so that a server never reads half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for snapshot in snapshots:
        file = folder / f"{snapshot.namespace}.{snapshot.policy}.json"
        draft = file.with_name(f".{file.name}.draft")
        draft.write_text(snapshot_json(snapshot), encoding="utf-8")
        draft.replace(file)
        yield file


def _read(file: Path) -> Snapshot | str | None:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if len(content) > MAX_BYTES:
        return f"is larger than {MAX_BYTES >> 20} MiB"
    try:
        return read_snapshot(content)
    except ValueError as error:
        return str(error)


# --- the one in force ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Held:
    """A snapshot in force and where it came from."""

    snapshot: Snapshot
    published: bool


class SnapshotBoard:
    """Decides which snapshots are in force; ``install`` puts them there.

    Nothing changes when a set is refused, or when ``install`` raises. Not thread-safe.
    """

    def __init__(self, install: Callable[[Sequence[Snapshot]], None]) -> None:
        self._install = install
        self._held: dict[str, _Held] = {}
        self._sequences: OrderedDict[str, int] = OrderedDict()
        self._published_generation: dict[str, int] = {}
        self._files: dict[Path, Snapshot] = {}

    @property
    def in_force(self) -> tuple[Snapshot, ...]:
        """Ordered by namespace and name."""
        return _ordered(held.snapshot for held in self._held.values())

    def check_sequence(self, publisher: str, sequence: int) -> None:
        """Refuse a set that came too late.

        Raises:
            StaleSequenceError: the publisher has sent a later one.

        """
        last = self._sequences.get(publisher)
        if last is not None and sequence < last:
            raise StaleSequenceError(f"sequence {sequence} of {publisher} is older than {last}")

    def publish(self, publisher: str, sequence: int, snapshots: Sequence[Snapshot]) -> None:
        """Put exactly these snapshots in force.

        Raises:
            StaleSequenceError: the publisher has sent a later set.
            SnapshotSetError: they cannot be in force together.

        """
        self.check_sequence(publisher, sequence)
        self._put({s.full_name: _Held(s, published=True) for s in snapshots}, given=snapshots)
        self._sequences[publisher] = sequence
        self._sequences.move_to_end(publisher)
        if len(self._sequences) > MAX_PUBLISHERS:
            self._sequences.popitem(last=False)
        for snapshot in snapshots:
            name = snapshot.full_name
            known = self._published_generation.get(name, snapshot.generation)
            self._published_generation[name] = max(known, snapshot.generation)

    def take_files(self, contents: FileContents) -> list[str]:
        """Take in what has changed in the files; returns what is wrong with some of them.

        An unreadable file counts as unchanged. A snapshot whose policy was published with
        the same generation or a later one is passed over, and so is the end of a file
        whose policy is in force by a publish.

        Raises:
            SnapshotSetError: what would be in force then cannot be together.

        """
        files = {
            file: snapshot
            for file, found in contents.items()
            if (snapshot := self._files.get(file) if isinstance(found, str) else found)
        }
        if repeated := list(_repeats(files.values())):
            raise SnapshotSetError(repeated)
        held = self._overlay(_by_name(files))
        if held != self._held:
            self._put(held, given=[one.snapshot for one in held.values()])
        self._files = files
        return [f"{file}: {found}" for file, found in contents.items() if isinstance(found, str)]

    def _overlay(self, files: Mapping[str, Snapshot]) -> dict[str, _Held]:
        """What is in force, with what has changed in the files since they were last read."""
        before = _by_name(self._files)
        held = {name: one for name, one in self._held.items() if one.published or name in files}
        for name, snapshot in files.items():
            changed = name not in before or before[name].version != snapshot.version
            if changed and snapshot.generation > self._published_generation.get(name, -1):
                held[name] = _Held(snapshot, published=False)
        return held

    def _put(self, held: dict[str, _Held], *, given: Sequence[Snapshot]) -> None:
        reasons = faults(given)
        if reasons:
            raise SnapshotSetError(reasons)
        self._install(_ordered(given))
        self._held = held


def _by_name(files: Mapping[Path, Snapshot]) -> dict[str, Snapshot]:
    return {snapshot.full_name: snapshot for snapshot in files.values()}


def _ordered(snapshots: Iterable[Snapshot]) -> tuple[Snapshot, ...]:
    return tuple(sorted(snapshots, key=lambda s: (s.namespace, s.policy)))
