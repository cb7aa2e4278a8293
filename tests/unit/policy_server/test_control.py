"""The operator's side without a server: settings, published sets, answers."""

from pathlib import Path

import grpc
import pytest

from pointsman_policy.control import (
    MAX_REASON_CHARS,
    SnapshotIntake,
    SnapshotServicer,
    read_published,
)
from pointsman_policy.metrics import Metrics
from pointsman_policy.openai_api import ApiError
from pointsman_policy.policy_api import PolicyServicer
from pointsman_policy.service import RoutingService
from pointsman_policy.settings import ServerSettings, TlsFiles, is_local
from pointsman_policy.snapshots import SnapshotBoard, SnapshotSetError
from pointsman_proto.v1 import pointsman_pb2 as pb

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"
FILES = (Path("x"),)
TLS = TlsFiles(certificate=Path("a"), key=Path("b"), client_ca=Path("c"))


class TestSettings:
    @pytest.mark.parametrize(
        ("address", "local"),
        [
            ("127.0.0.1:1", True),
            ("127.8.8.8:1", True),
            ("[::1]:1", True),
            ("unix:///run/x.sock", True),
            ("0.0.0.0:1", False),
            ("[::]:1", False),
            ("10.0.0.1:1", False),
            ("[::ffff:127.0.0.1]:1", False),
        ],
    )
    def test_which_addresses_are_local(self, address, local):
        assert is_local(address) is local

    @pytest.mark.parametrize(
        "fields",
        [
            {"manifests": FILES},
            {"snapshots": FILES},
            {"snapshots": FILES, "control_address": "127.0.0.1:1"},
            {"snapshots": FILES, "control_address": "0.0.0.0:1", "tls": TLS},
            {"snapshots": FILES, "control_address": "unix:///x", "tls": TLS},
        ],
    )
    def test_that_go_together(self, fields):
        ServerSettings(**fields)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, "give either --manifests DIR .* or --snapshots PATH"),
            ({"manifests": FILES, "snapshots": FILES}, "give either --manifests DIR"),
            ({"manifests": FILES, "control_address": "127.0.0.1:1"}, "goes with --snapshots"),
            ({"snapshots": FILES, "tls": TLS}, "need --control-address"),
            (
                {"snapshots": FILES, "control_address": "0.0.0.0:9443"},
                "^--control-address 0.0.0.0:9443 can be reached from other machines: give"
                " --tls-cert, --tls-key and --tls-client-ca, or a loopback or unix address$",
            ),
            ({"snapshots": FILES, "control_address": "localhost:1"}, "is no ip:port"),
            (
                {"snapshots": FILES, "control_address": "0.0.0.0:70000", "tls": TLS},
                "^--control-address: '0.0.0.0:70000' is no ip:port: ports end at 65535$",
            ),
            (
                {"manifests": FILES, "grpc_address": "127.0.0.1:99999"},
                "^--grpc-address: '127.0.0.1:99999' is no ip:port: ports end at 65535$",
            ),
            ({"manifests": FILES, "grpc_address": "1.2.3.4:1,5.6.7.8:1"}, "exactly one address"),
            (
                {"manifests": FILES, "http_address": "9090"},
                "^--http-address: '9090' is neither ip:port nor unix:///path$",
            ),
        ],
    )
    def test_that_do_not(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ServerSettings(**fields)

    def test_tls_files_go_together(self):
        assert TlsFiles.of(certificate=None, key=None, client_ca=None) is None
        assert TlsFiles.of(certificate=Path("a"), key=Path("b"), client_ca=Path("c")) == TLS
        with pytest.raises(ValueError, match="--tls-cert, --tls-key and --tls-client-ca go toge"):
            TlsFiles.of(certificate=Path("a"), key=None, client_ca=Path("c"))


def published(snapshot, **fields):
    told = {name: getattr(snapshot, name) for name in ("namespace", "policy", "generation")}
    told |= {"version": snapshot.version, "snapshot_json": snapshot.model_dump_json().encode()}
    return pb.PublishedSnapshot(**(told | fields))


def request(*snapshots, publisher="op", sequence=1, **fields):
    return pb.PublishRequest(publisher=publisher, sequence=sequence, snapshots=snapshots, **fields)


@pytest.fixture
def good(build):
    return build.snapshot(build.expert("good", A, B))


class TestReading:
    def test_a_good_set(self, good, build):
        other = build.snapshot(build.expert("x", C), name="other", models=["other"])
        assert read_published(request(published(good), published(other))) == [good, other]

    def test_an_empty_set_must_be_meant(self):
        assert read_published(request(allow_empty=True)) == []
        with pytest.raises(SnapshotSetError, match="allow_empty drops all policies"):
            read_published(request())

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"namespace": "prod"}, "prod/auto: namespace is 'prod', but that of its JSON is 'd"),
            ({"policy": "x"}, "default/x: policy is 'x', but that of its JSON is 'auto'"),
            ({"generation": 9}, "default/auto: generation is 9, but that of its JSON is 1"),
            ({"version": "f" * 16}, "default/auto: version is 'ffffffffffffffff', but that of"),
            ({"snapshot_json": b"{"}, "default/auto: is no snapshot: Invalid JSON"),
            ({"snapshot_json": b"\xff"}, "default/auto: is no snapshot: "),
        ],
    )
    def test_what_is_wrong_is_told(self, fields, message, good):
        with pytest.raises(SnapshotSetError, match=f"^{message}"):
            read_published(request(published(good, **fields)))

    def test_a_changed_content_is_not_what_its_version_names(self, good):
        content = good.model_dump_json().replace(A, C).encode()
        with pytest.raises(SnapshotSetError, match=f"says version {good.version}, but its content"):
            read_published(request(published(good, snapshot_json=content)))

    def test_all_reasons_are_told(self, good):
        bad = published(good, snapshot_json=b"")
        with pytest.raises(SnapshotSetError) as refused:
            read_published(request(bad, published(good), bad, publisher=""))
        assert [reason.partition(":")[0] for reason in refused.value.reasons] == [
            "publisher is required",
            "default/auto",
            "default/auto",
        ]


class AbortedError(Exception):
    """What a gRPC context raises on abort."""


class Context:
    async def abort(self, code, message):
        raise AbortedError(code, message)


@pytest.fixture
def servicer(service):
    board = SnapshotBoard(service.install)
    board.take_files({Path("x"): service.snapshots[0]})
    return SnapshotServicer(service, SnapshotIntake(board, service.metrics))


async def publish(servicer, *snapshots, **fields):
    return await servicer.Publish(request(*map(published, snapshots), **fields), Context())


async def status(servicer):
    return await servicer.Status(pb.StatusRequest(), Context())


class TestPublish:
    async def test_puts_the_set_in_force(self, servicer, service, good, counted):
        answer = await publish(servicer, good)
        (applied,) = answer.applied
        assert (applied.namespace, applied.policy) == ("default", "auto")
        assert (applied.generation, applied.version) == (good.generation, good.version)
        assert answer.instance_id == servicer.instance_id
        assert service.snapshots == (good,)
        assert counted(service, "publishes_total", result="ok") == 1

    async def test_refuses_a_stale_one(self, servicer, service, good, counted):
        await publish(servicer, good, sequence=2)
        with pytest.raises(AbortedError) as aborted:
            await publish(servicer, sequence=1, allow_empty=True)
        assert aborted.value.args == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "sequence 1 of op is older than 2",
        )
        assert service.snapshots == (good,)
        assert counted(service, "publishes_total", result="stale") == 1

    async def test_refuses_a_wrong_one(self, servicer, service, good, build, counted):
        before = service.snapshots
        with pytest.raises(AbortedError) as aborted:
            await publish(servicer, good, build.snapshot(name="other"))
        assert aborted.value.args == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "default/other: model auto is answered by default/auto already",
        )
        assert service.snapshots == before
        assert counted(service, "publishes_total", result="refused") == 1

    async def test_tells_no_more_than_a_header_holds(self, servicer, good):
        bad = published(good, snapshot_json=b"", policy="\n\u00e4" * 300)
        with pytest.raises(AbortedError) as aborted:
            await servicer.Publish(request(*[bad] * 50), Context())
        message = aborted.value.args[1]
        assert message.isascii()
        assert len(message) < MAX_REASON_CHARS + 50
        assert message.endswith("(the server's log has all)")

    async def test_is_another_instance_after_a_restart(self, servicer, service):
        again = SnapshotServicer(service, servicer._intake)
        assert again.instance_id != servicer.instance_id


class TestBeforeTheFirstSnapshot:
    """The client is to try again: that the model does not exist would be no true answer."""

    def test_requests_are_answered_503(self):
        with pytest.raises(ApiError, match="no routing table yet") as refused:
            RoutingService(Metrics()).router("auto")
        assert (refused.value.status, refused.value.code) == (503, "no_snapshot")
        assert dict(refused.value.headers) == {"retry-after": "1"}

    async def test_decide_is_unavailable(self):
        with pytest.raises(AbortedError) as aborted:
            await PolicyServicer(RoutingService(Metrics())).Decide(pb.DecideRequest(), Context())
        assert aborted.value.args[0] is grpc.StatusCode.UNAVAILABLE


class TestStatus:
    async def test_tells_what_is_in_force(self, servicer, service):
        got = await status(servicer)
        assert got.instance_id == servicer.instance_id
        assert [s.version for s in got.applied] == [service.snapshots[0].version]
        (policy,) = got.policies
        assert (policy.namespace, policy.policy) == ("default", "auto")
        assert (policy.requests, policy.window_seconds) == (0, 300.0)

    async def test_tells_how_the_policies_did(self, servicer, service):
        now = service.clock()
        service.statistics.completed("default/auto", quality=0.75, in_time=True, now_s=now)
        service.statistics.completed("default/auto", quality=0.75, in_time=False, now_s=now)
        service.statistics.rejected("default/auto", now_s=now)
        service.statistics.failed("default/auto", now_s=now)
        service.statistics.failed("default/gone", now_s=now)
        (policy,) = (await status(servicer)).policies
        assert (policy.requests, policy.violations, policy.rejected) == (4, 1, 1)
        assert (policy.failed, policy.predicted_qos_sum) == (1, 0.75)

    async def test_tells_of_endpoints_as_long_as_requests_are_on_them(
        self, servicer, service, build
    ):
        service.state.begin("r1", A, build.admitted())
        service.state.set_ready(B, ready=False)
        await publish(servicer, build.snapshot(build.expert("fast", B), build.expert("new", C)))

        async def endpoints():
            got = (await status(servicer)).endpoints
            return [(e.address, e.ready, e.in_flight) for e in got]

        assert await endpoints() == [(A, False, 1), (B, False, 0), (C, True, 0)]
        service.state.finish("r1")
        assert await endpoints() == [(B, False, 0), (C, True, 0)]


class TestFiles:
    async def test_that_are_wrong_are_counted(self, servicer, service, tmp_path, build, counted):
        intake = servicer._intake
        (tmp_path / "broken.json").write_text("{")
        await intake.reload([tmp_path])
        assert counted(service, "reloads_total", result="failed") == 1
        two = build.snapshot(name="one"), build.snapshot(name="two")
        for snapshot in two:
            (tmp_path / f"{snapshot.policy}.json").write_text(snapshot.model_dump_json())
        await intake.reload([tmp_path])
        assert counted(service, "reloads_total", result="failed") == 2
        (tmp_path / "broken.json").unlink()
        (tmp_path / "two.json").unlink()
        await intake.reload([tmp_path])
        assert counted(service, "reloads_total", result="ok") == 1
        assert [s.policy for s in service.snapshots] == ["one"]
