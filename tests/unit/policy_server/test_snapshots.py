"""Which snapshots are in force: published sets, files, and what outranks what."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pointsman_cli.main import app
from pointsman_core.resources import ObjectMeta, RoutingPolicy, RoutingPolicySpec
from pointsman_core.snapshot import compile_snapshot, read_snapshot
from pointsman_policy.snapshots import (
    MAX_PUBLISHERS,
    SnapshotBoard,
    SnapshotSetError,
    StaleSequenceError,
    faults,
    read_snapshot_files,
    write_snapshot_files,
)
from pointsman_policy.watch import MAX_BYTES

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


def snapshot(build, name, *addresses, generation=1, models=None, expert="x"):
    policy = RoutingPolicy(
        metadata=ObjectMeta(name=name, generation=generation),
        spec=RoutingPolicySpec(models=models or [name]),
    )
    return compile_snapshot(policy, [build.expert(expert, A)], {expert: addresses or (A,)})


@pytest.fixture
def make(build):
    """A snapshot of a policy that answers its own name."""
    return lambda name, *addresses, **fields: snapshot(build, name, *addresses, **fields)


class Installed:
    """Remembers what was put in force; fails on demand."""

    def __init__(self):
        self.sets = []
        self.error = None

    def __call__(self, snapshots):
        if self.error:
            raise self.error
        self.sets.append(tuple(snapshots))


@pytest.fixture
def installed():
    return Installed()


@pytest.fixture
def board(installed):
    return SnapshotBoard(installed)


def names(board):
    return [(s.policy, s.generation, len(s.candidates)) for s in board.in_force]


class TestFaults:
    def test_of_a_good_set_there_are_none(self, make):
        assert faults([make("a"), make("b", A, B)]) == []
        assert faults([]) == []

    def test_are_all_told(self, make):
        one, other = make("a", models=["m", "n"]), make("b", models=["n", "m"])
        assert faults([one, other, other]) == [
            "default/b: there are 2 snapshots of it",
            "default/b: model n is answered by default/a already",
            "default/b: model m is answered by default/a already",
            "default/b: model n is answered by default/a already",
            "default/b: model m is answered by default/a already",
        ]

    @pytest.mark.parametrize(
        ("update", "message"),
        [
            (
                {"address": "engine.local:8000"},
                "default/a: 'engine.local:8000' is no ip:port: host names are not resolved",
            ),
            ({"address": "10.0.0.1:0"}, "default/a: '10.0.0.1:0' has no port"),
            ({"address": "10.0.0.256:1"}, "default/a: '10.0.0.256:1' is no ip:port"),
            ({"model": "a,b"}, f"default/a: comma in a name of {A}"),
        ],
    )
    def test_endpoints_that_envoy_would_refuse(self, update, message, make):
        good = make("a")
        candidate = good.candidates[0].model_copy(update=update)
        assert faults([good.model_copy(update={"candidates": (candidate,)})]) == [message]


class TestPublish:
    def test_is_the_complete_set(self, board, installed, make):
        board.publish("op", 1, [make("b"), make("a")])
        assert names(board) == [("a", 1, 1), ("b", 1, 1)]
        board.publish("op", 2, [make("c")])
        assert names(board) == [("c", 1, 1)]
        board.publish("op", 3, [])
        assert names(board) == []
        assert [[s.policy for s in snapshots] for snapshots in installed.sets] == [
            ["a", "b"],
            ["c"],
            [],
        ]

    def test_is_refused_as_a_whole(self, board, installed, make):
        board.publish("op", 1, [make("a")])
        with pytest.raises(SnapshotSetError, match="model c is answered by default/c already"):
            board.publish("op", 2, [make("b"), make("c"), make("d", models=["c"])])
        assert names(board) == [("a", 1, 1)]
        assert len(installed.sets) == 1
        board.publish("op", 1, [make("a", A, B)])  # its sequence did not count
        assert names(board) == [("a", 1, 2)]

    def test_that_cannot_be_installed_changes_nothing(self, board, installed, make):
        board.publish("op", 1, [make("a")])
        installed.error = RuntimeError("a bug")
        with pytest.raises(RuntimeError):
            board.publish("op", 2, [make("b")])
        assert names(board) == [("a", 1, 1)]
        installed.error = None
        board.publish("op", 1, [make("c")])

    def test_in_the_wrong_order_is_stale(self, board, make):
        board.publish("op", 5, [make("a")])
        with pytest.raises(StaleSequenceError, match="sequence 4 of op is older than 5"):
            board.publish("op", 4, [make("b")])
        assert names(board) == [("a", 1, 1)]

    def test_again_is_a_retry(self, board, make):
        for _ in range(2):
            board.publish("op", 5, [make("a")])
        assert names(board) == [("a", 1, 1)]

    def test_of_another_publisher_has_its_own_sequence(self, board, make):
        board.publish("old", 5, [make("a")])
        board.publish("new", 1, [make("b")])
        assert names(board) == [("b", 1, 1)]
        with pytest.raises(StaleSequenceError):
            board.publish("old", 4, [make("a")])

    def test_remembers_the_last_publishers_only(self, board, make):
        for i in range(MAX_PUBLISHERS + 1):
            board.publish(f"op{i}", 5, [make("a")])
        board.publish("op0", 1, [make("b")])
        with pytest.raises(StaleSequenceError):
            board.publish("op2", 1, [make("a")])

    def test_an_older_generation_is_the_operators_to_decide(self, board, make):
        """A policy that was deleted and made anew starts again from 1."""
        board.publish("op", 1, [make("a", generation=5)])
        board.publish("op", 2, [make("a", generation=1)])
        assert names(board) == [("a", 1, 1)]


class TestFiles:
    def test_are_in_force_before_any_publish(self, board, installed, make):
        assert board.take_files({}) == []
        assert installed.sets == []
        assert board.take_files({1: make("a"), 2: make("b")}) == []
        assert names(board) == [("a", 1, 1), ("b", 1, 1)]
        board.take_files({1: make("a", A, B)})
        assert names(board) == [("a", 1, 2)]
        board.take_files({})
        assert names(board) == []

    def test_that_did_not_change_install_nothing(self, board, installed, make):
        for _ in range(2):
            board.take_files({1: make("a")})
        assert len(installed.sets) == 1

    def test_that_cannot_be_read_count_as_unchanged(self, board, make):
        board.take_files({1: make("a"), 2: make("b")})
        problems = board.take_files({1: "is broken", 2: make("b", A, B), 3: "is new"})
        assert problems == ["1: is broken", "3: is new"]
        assert names(board) == [("a", 1, 1), ("b", 1, 2)]
        board.take_files({1: make("a", generation=2), 2: make("b", A, B)})
        assert names(board) == [("a", 2, 1), ("b", 1, 2)]

    def test_that_conflict_change_nothing(self, board, make):
        board.take_files({1: make("a")})
        with pytest.raises(SnapshotSetError, match="model a is answered by default/a already"):
            board.take_files({1: make("a"), 2: make("b", models=["a"])})
        with pytest.raises(SnapshotSetError, match="there are 2 snapshots of it"):
            board.take_files({1: make("a"), 2: make("a", A, B)})
        assert names(board) == [("a", 1, 1)]
        board.take_files({2: make("b", models=["a"])})
        assert names(board) == [("b", 1, 1)]

    def test_are_outranked_by_a_publish(self, board, make):
        board.take_files({1: make("a"), 2: make("b")})
        board.publish("op", 1, [make("a", A, B)])
        assert names(board) == [("a", 1, 2)]
        board.take_files({1: make("a"), 2: make("b")})
        assert names(board) == [("a", 1, 2)]

    @pytest.mark.parametrize(("generation", "taken"), [(2, False), (3, False), (4, True)])
    def test_win_by_a_later_generation_only(self, generation, taken, board, make):
        board.publish("op", 1, [make("a", generation=3)])
        board.take_files({1: make("a", A, B, generation=generation)})
        assert names(board) == [("a", generation, 2) if taken else ("a", 3, 1)]

    def test_of_a_policy_that_was_dropped_do_not_bring_it_back(self, board, make):
        """A mounted file lags behind: it may still be there, or even change once more."""
        board.publish("op", 1, [make("a"), make("b")])
        board.publish("op", 2, [make("b")])
        board.take_files({1: make("a", A, B)})
        assert names(board) == [("b", 1, 1)]

    def test_that_go_end_nothing_that_was_published(self, board, make):
        board.take_files({1: make("a")})
        board.publish("op", 1, [make("a")])
        board.take_files({})
        assert names(board) == [("a", 1, 1)]

    def test_may_bring_a_policy_that_was_never_published(self, board, make):
        board.publish("op", 1, [make("a")])
        board.take_files({2: make("b")})
        assert names(board) == [("a", 1, 1), ("b", 1, 1)]
        board.take_files({})
        assert names(board) == [("a", 1, 1)]


@given(data=st.data())
def test_whatever_comes_the_set_in_force_is_sound(build, data):
    """And it is the last one installed, and a published set is in force exactly as it came."""
    installed = Installed()
    board = SnapshotBoard(installed)
    pool = [
        snapshot(build, name, *addresses, generation=generation, models=models)
        for name, models in (("a", ["m"]), ("b", ["n"]), ("c", ["m"]))
        for generation in (1, 2)
        for addresses in ((A,), (A, B))
    ]
    sets = st.lists(st.sampled_from(pool), max_size=3)
    for _ in range(data.draw(st.integers(1, 12))):
        before, given_set = board.in_force, data.draw(sets)
        try:
            if data.draw(st.booleans()):
                board.publish("op", data.draw(st.integers(1, 4)), given_set)
                assert sorted(s.version for s in board.in_force) == sorted(
                    s.version for s in given_set
                )
            else:
                board.take_files(dict(enumerate(given_set)))
        except (SnapshotSetError, StaleSequenceError):
            assert board.in_force == before
        assert faults(board.in_force) == []
        assert board.in_force == (installed.sets[-1] if installed.sets else ())


class TestReadingFiles:
    def test_of_what_was_written(self, tmp_path, make):
        written = [make("a"), make("b")]
        files = list(write_snapshot_files(tmp_path / "new", written))
        assert [file.name for file in files] == ["default.a.json", "default.b.json"]
        assert read_snapshot_files([tmp_path]) == dict(zip(files, written, strict=True))
        assert read_snapshot_files([files[1]]) == {files[1]: written[1]}

    def test_nothing_is_there_yet(self, tmp_path):
        (tmp_path / "readme.txt").write_text("not looked at")
        (tmp_path / "dangling.json").symlink_to("nowhere")
        assert read_snapshot_files([tmp_path, tmp_path / "absent"]) == {}

    def test_of_the_command(self, tmp_path):
        example = Path(__file__).parents[3] / "examples" / "edge-site"
        command = ["snapshot", "--manifests", str(example)]
        printed = CliRunner().invoke(app, command)
        (line,) = printed.stdout.splitlines()
        wanted = read_snapshot(line)
        written = CliRunner().invoke(app, [*command, "--output", str(tmp_path)])
        assert written.stderr.split() == [str(tmp_path / "default.auto.json")]
        assert list(read_snapshot_files([tmp_path]).values()) == [wanted]

    def test_of_a_command_that_fails_there_are_none(self, tmp_path):
        (tmp_path / "a.yaml").write_text("foo")
        command = ["snapshot", "--manifests", str(tmp_path), "--output", str(tmp_path / "new")]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"{tmp_path}/a.yaml:1: must be a Kubernetes object")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "is no snapshot: Invalid JSON"),
            (b"{}", "is no snapshot: namespace: Field required"),
            (b" " * (MAX_BYTES + 1), "is larger than 1 MiB"),
        ],
    )
    def test_that_are_wrong(self, content, message, tmp_path):
        (tmp_path / "snapshot.json").write_bytes(content)
        (found,) = read_snapshot_files([tmp_path]).values()
        assert found.startswith(message)

    def test_that_cannot_be_opened(self, tmp_path):
        (tmp_path / "snapshot.json").symlink_to(tmp_path / "snapshot.json")
        (found,) = read_snapshot_files([tmp_path / "snapshot.json"]).values()
        assert found.startswith("cannot be read: ")
