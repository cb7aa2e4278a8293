"""Snapshots to policy servers over a real gRPC connection."""

import asyncio
import contextlib
import datetime
import hashlib
import ipaddress
import json
from dataclasses import replace

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pointsman_core.snapshot import NO_VERSION, read_snapshot
from pointsman_operator.cluster import config_map
from pointsman_operator.metrics import Metrics
from pointsman_operator.observed import Key
from pointsman_operator.publisher import (
    WINDOW_S,
    GrpcServerClient,
    PolicyCounts,
    Publisher,
    SnapshotSet,
    describe,
)
from pointsman_operator.reconcile import SnapshotWrite
from pointsman_operator.settings import TlsFiles
from pointsman_proto.v1 import pointsman_pb2 as pb
from pointsman_proto.v1.pointsman_pb2_grpc import (
    SnapshotServiceServicer,
    add_SnapshotServiceServicer_to_server,
)

AUTO = Key("default", "auto")
POLL_S = 0.02


class FakePolicyServer(SnapshotServiceServicer):
    """Does what the contract says, as far as the operator can tell."""

    def __init__(self):
        self.address = ""
        self.instance = "one"
        self.applied = []
        self.received = []
        self.refuse = None
        self.policies = []
        self.seen = asyncio.Event()
        self.asked = asyncio.Event()

    async def Publish(self, request, context):  # noqa: N802 - gRPC's name
        self.received.append(request)
        self.seen.set()
        if self.refuse is not None:
            await context.abort(*self.refuse)
        self.applied = [
            pb.AppliedSnapshot(
                namespace=s.namespace, policy=s.policy, generation=s.generation, version=s.version
            )
            for s in request.snapshots
        ]
        return pb.PublishResponse(applied=self.applied, instance_id=self.instance)

    async def Status(self, _request, _context):  # noqa: N802
        self.asked.set()
        return pb.StatusResponse(
            instance_id=self.instance, applied=self.applied, policies=self.policies
        )

    async def next_publish(self):
        self.seen.clear()
        async with asyncio.timeout(10):
            await self.seen.wait()
        return self.received[-1]


@contextlib.asynccontextmanager
async def serving(fake, address="127.0.0.1:0", credentials=None):
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_SnapshotServiceServicer_to_server(fake, server)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    fake.address = f"127.0.0.1:{port}"
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(None)


@pytest.fixture
async def server():
    async with serving(FakePolicyServer()) as fake:
        yield fake


class Rig:
    """A publisher whose changes can be awaited."""

    def __init__(self, tls=None):
        self.metrics = Metrics()
        self.changed = asyncio.Event()
        self.now = 1000.0
        self.publisher = Publisher(
            lambda address: GrpcServerClient(address, tls),
            identity="test",
            on_change=self.changed.set,
            metrics=self.metrics,
            poll_interval_s=POLL_S,
            clock=lambda: self.now,
        )

    async def until(self, holds):
        """Wait until a predicate over the states holds."""
        async with asyncio.timeout(10):
            while not holds(self.publisher.states()):
                self.changed.clear()
                await self.changed.wait()

    def counted(self, name, **labels):
        return self.metrics.registry.get_sample_value(f"pointsman_operator_{name}", labels) or 0


@pytest.fixture
async def rig():
    made = Rig()
    yield made
    await made.publisher.close()


@pytest.fixture
def snapshots(api):
    def make(**policy):
        return api.reconcile(api.observe(api.policy(**policy), api.expert())).snapshots

    return make


def in_force(address, snapshots):
    wanted = {Key(s.namespace, s.policy): (s.generation, s.version) for s in snapshots}
    return lambda states: states[address].applied == wanted and not states[address].error


async def test_a_set_is_sent_and_acknowledged(server, rig, snapshots):
    first = snapshots()
    assert rig.publisher.publish(first)
    await rig.publisher.set_servers({server.address: True})
    await rig.until(in_force(server.address, first))
    (request,) = server.received
    assert (request.publisher, request.sequence, request.allow_empty) == ("test", 1, False)
    assert request.snapshots[0].snapshot_json == first[0].model_dump_json().encode()
    assert rig.publisher.settled
    assert rig.counted("pushes_total", server=server.address, result="ok") == 1


async def test_nothing_is_sent_before_the_first_set(server, rig):
    server.applied = [pb.AppliedSnapshot(namespace="a", policy="b", version="c")]
    await rig.publisher.set_servers({server.address: True})
    await rig.until(lambda states: bool(states[server.address].applied))
    assert server.received == []


async def test_what_servers_say_of_models_is_kept(server, rig):
    server.applied = [
        pb.AppliedSnapshot(namespace="a", policy="b", version="c", model_sha256="d"),
        pb.AppliedSnapshot(namespace="a", policy="e", version="f", model_error="no such file"),
        pb.AppliedSnapshot(namespace="a", policy="g", version="h"),
    ]
    await rig.publisher.set_servers({server.address: True})
    await rig.until(lambda states: bool(states[server.address].models))
    assert rig.publisher.states()[server.address].models == {
        Key("a", "b"): ("d", ""),
        Key("a", "e"): ("", "no such file"),
    }


async def test_the_same_set_is_not_sent_twice(rig, snapshots):
    assert rig.publisher.publish(snapshots())
    assert not rig.publisher.publish(snapshots())
    assert rig.publisher.publish(snapshots(admission="Reject"))


async def test_a_changed_set_is_sent_at_once(server, rig, snapshots):
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({server.address: True})
    await rig.until(in_force(server.address, snapshots()))
    second = snapshots(admission="Reject")
    rig.publisher.publish(second)
    await rig.until(in_force(server.address, second))
    assert [request.sequence for request in server.received] == [1, 2]


def test_what_an_older_release_compiled_goes_on_as_it_was(snapshots):
    """A policy whose spec is not valid now keeps it over an update of the operator."""
    (today,) = snapshots()
    content = json.loads(today.model_dump_json()) | {"version": NO_VERSION}
    del content["model"]
    text = json.dumps(content, separators=(",", ":"))
    version = hashlib.sha256(text.encode()).hexdigest()[:16]
    old = read_snapshot(text.replace(NO_VERSION, version))
    (sent,) = SnapshotSet.of(1, [old]).snapshots
    stored = config_map(SnapshotWrite(AUTO, "uid-1", old))["data"]["snapshot.json"]
    assert read_snapshot(sent.snapshot_json) == read_snapshot(stored) == old
    assert sent.version == version


async def test_an_empty_set_is_allowed_on_purpose(server, rig, snapshots):
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({server.address: True})
    await rig.until(in_force(server.address, snapshots()))
    rig.publisher.publish([])
    await rig.until(lambda states: states[server.address].applied == {})
    assert server.received[-1].allow_empty


async def test_a_server_that_restarted_gets_the_set_again(server, rig, snapshots):
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({server.address: True})
    await rig.until(in_force(server.address, snapshots()))
    server.instance, server.applied = "two", []
    await server.next_publish()
    await rig.until(in_force(server.address, snapshots()))
    assert rig.counted("foreign_publishes_total", server=server.address) == 0


async def test_a_server_that_comes_late_is_brought_up_to_date(rig, snapshots):
    fake = FakePolicyServer()
    async with serving(fake):
        address = fake.address
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({address: True})
    await rig.until(lambda states: states[address].error == "cannot be reached")
    assert rig.publisher.settled
    async with serving(fake, address):
        await rig.until(in_force(address, snapshots()))


async def test_what_somebody_else_publishes_is_noticed_and_put_right(server, rig, snapshots):
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({server.address: True})
    await rig.until(in_force(server.address, snapshots()))
    server.applied = [pb.AppliedSnapshot(namespace="a", policy="b", version="c")]
    await server.next_publish()
    await rig.until(in_force(server.address, snapshots()))
    assert rig.counted("foreign_publishes_total", server=server.address) == 1


async def test_what_may_be_newer_is_left_while_the_api_server_is_away(server, rig, snapshots):
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({server.address: True})
    await rig.until(in_force(server.address, snapshots()))
    rig.publisher.up_to_date = False
    newer = snapshots(meta={"generation": 7})
    server.applied[0].version, server.applied[0].generation = newer[0].version, 7
    await rig.until(in_force(server.address, newer))
    async with asyncio.timeout(10):
        for _ in range(3):
            server.asked.clear()
            await server.asked.wait()
    assert len(server.received) == 1
    # One that has started again may have only an old file.
    server.instance = "two"
    await rig.until(in_force(server.address, snapshots()))


async def test_a_refusal_is_told_with_its_reason(server, rig, snapshots):
    server.refuse = (grpc.StatusCode.INVALID_ARGUMENT, "two policies answer auto")
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({server.address: True})
    await rig.until(lambda states: states[server.address].refused)
    assert rig.publisher.states()[server.address].error == "two policies answer auto"
    server.refuse = None
    better = snapshots(models=["other"])
    rig.publisher.publish(better)
    await rig.until(in_force(server.address, better))
    assert not rig.publisher.states()[server.address].refused


async def test_a_stale_sequence_is_followed_by_a_later_one(server, rig, snapshots):
    server.refuse = (grpc.StatusCode.FAILED_PRECONDITION, "older than 7")
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({server.address: True})
    await server.next_publish()
    server.refuse = None
    await rig.until(in_force(server.address, snapshots()))
    assert server.received[-1].sequence > 1


async def test_one_dead_server_does_not_hold_up_another(server, rig, snapshots):
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({"127.0.0.1:1": True, server.address: False})
    await rig.until(in_force(server.address, snapshots()))
    assert not rig.publisher.states()[server.address].counted


async def test_servers_come_and_go(server, rig):
    await rig.publisher.set_servers({server.address: False})
    rig.changed.clear()
    await rig.publisher.set_servers({server.address: True})
    assert rig.changed.is_set()
    assert rig.publisher.states()[server.address].counted
    await rig.publisher.set_servers({})
    assert rig.publisher.states() == {}
    assert rig.publisher.settled


async def test_counters_of_servers_that_are_gone_are_forgotten(server, rig, snapshots):
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({server.address: True})
    await rig.until(in_force(server.address, snapshots()))
    label = {"server": server.address}
    assert rig.counted("pushes_total", **label, result="ok") == 1
    await rig.publisher.set_servers({})
    names = {one.labels.get("server") for m in rig.metrics.registry.collect() for one in m.samples}
    assert names == {None}


async def test_a_question_that_fails_is_no_push(rig):
    await rig.publisher.set_servers({"127.0.0.1:1": True})
    await rig.until(lambda states: states["127.0.0.1:1"].error)
    assert rig.counted("pushes_total", server="127.0.0.1:1", result="failed") == 0


async def test_counts_are_read(server, rig):
    server.policies = [
        pb.PolicyStats(
            namespace="default", policy="auto", requests=4, violations=1, predicted_qos_sum=2.5
        )
    ]
    await rig.publisher.set_servers({server.address: True})
    async with asyncio.timeout(10):
        for _ in range(2):  # when it is asked again, the first answer was taken in
            await server.asked.wait()
            server.asked.clear()
    assert rig.publisher.counts() == [{AUTO: PolicyCounts(4, 1, 2.5)}]


async def test_a_bug_does_not_end_the_link(server, rig, snapshots):
    broken = asyncio.Event()

    def explode(_address):
        if not broken.is_set():
            broken.set()
            raise ZeroDivisionError
        return GrpcServerClient(server.address, None)

    rig.publisher.connect = explode
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({server.address: True})
    await rig.until(in_force(server.address, snapshots()))
    assert broken.is_set()


async def test_plaintext_never_leaves_the_machine(rig, snapshots):
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({"10.0.0.1:9003": True})
    await rig.until(lambda states: "only for loopback" in states["10.0.0.1:9003"].error)


async def test_policy_servers_are_not_dialled_through_a_proxy(server, rig, snapshots, monkeypatch):
    """It would carry even plaintext for loopback to another machine."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({server.address: True})
    await rig.until(in_force(server.address, snapshots()))


async def test_counts_do_not_outlive_their_window(rig, snapshots):
    fake = FakePolicyServer()
    one = pb.PolicyStats(namespace="default", policy="auto", requests=4, violations=1)
    fake.policies = [one]
    async with serving(fake):
        rig.publisher.publish(snapshots())
        await rig.publisher.set_servers({fake.address: True})
        async with asyncio.timeout(10):
            while not rig.publisher.counts()[0]:
                fake.asked.clear()
                await fake.asked.wait()
    await rig.until(lambda states: states[fake.address].error)
    rig.now += WINDOW_S - 1
    assert rig.publisher.counts()[0][AUTO].requests == 4
    rig.now += 1
    assert rig.publisher.counts() == [{}]


def test_errors_read_the_same_at_every_try():
    def error(code, details):
        return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)

    assert describe(error(grpc.StatusCode.UNAVAILABLE, "at 12:00")) == "cannot be reached"
    refused = "UNKNOWN: ipv4:10.0.0.1:1: Failed to connect to remote host: Connection refused"
    assert describe(error(grpc.StatusCode.UNAVAILABLE, refused)) == "cannot be reached"
    assert describe(error(grpc.StatusCode.DEADLINE_EXCEEDED, "x")) == "no answer within 5 s"
    assert describe(error(grpc.StatusCode.INTERNAL, "")) == "INTERNAL"
    assert describe(ValueError("plain")) == "plain"


# --- mutual TLS ------------------------------------------------------------------------


class Authority:
    """A certificate authority for one test."""

    def __init__(self, folder):
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA {folder.name}")])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self.certificate = self._sign(self._name, self._key.public_key(), constraints, [])

    def issue(self, name, *, days=(-1, 1)):
        """PEM of a certificate and its key; from when till when it is valid, in days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        constraints = x509.BasicConstraints(ca=False, path_length=None)
        pem = self._sign(subject, key.public_key(), constraints, names, days=days)
        plain = serialization.NoEncryption()
        pkcs8 = serialization.PrivateFormat.PKCS8
        return pem, key.private_bytes(serialization.Encoding.PEM, pkcs8, plain)

    def write(self, name, *, ca=None):
        """Files of a client."""
        self._folder.mkdir(exist_ok=True)
        cert, key = self.issue(name)
        contents = {"cert": cert, "key": key, "ca": (ca or self).certificate}
        for file, content in contents.items():
            (self._folder / file).write_bytes(content)
        paths = {file: self._folder / file for file in contents}
        return TlsFiles(**paths, server_name="policy.pointsman.svc")

    def _sign(self, subject, public_key, constraints, names, *, days=(-1, 1)):
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=days[0]))
            .not_valid_after(now + datetime.timedelta(days=days[1]))
            .add_extension(constraints, critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


def server_credentials(authority, **validity):
    cert, key = authority.issue("policy.pointsman.svc", **validity)
    return grpc.ssl_server_credentials(
        [(key, cert)], authority.certificate, require_client_auth=True
    )


async def test_mutual_tls(tmp_path, snapshots):
    authority = Authority(tmp_path / "ca")
    rig = Rig(authority.write("operator"))
    async with serving(FakePolicyServer(), credentials=server_credentials(authority)) as server:
        rig.publisher.publish(snapshots())
        await rig.publisher.set_servers({server.address: True})
        await rig.until(in_force(server.address, snapshots()))
        await rig.publisher.close()


async def test_certificates_are_read_again_when_they_change(tmp_path, snapshots):
    authority, stranger = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    files = stranger.write("operator")
    rig = Rig(files)
    async with serving(FakePolicyServer(), credentials=server_credentials(authority)) as server:
        rig.publisher.publish(snapshots())
        await rig.publisher.set_servers({server.address: True})
        untrusted = "its certificate is not trusted: unable to get local issuer certificate"
        await rig.until(lambda states: states[server.address].error == f"{untrusted} (--tls-ca)")
        assert server.received == []
        good = authority.write("operator")
        for one in ("cert", "key", "ca"):
            getattr(files, one).write_bytes(getattr(good, one).read_bytes())
        await rig.until(in_force(server.address, snapshots()))
        await rig.publisher.close()


@pytest.mark.parametrize("how", ["half of it", "gone"])
async def test_certificates_that_are_just_being_replaced_end_no_connection(tmp_path, how):
    authority = Authority(tmp_path / "ca")
    files = authority.write("operator")
    async with serving(FakePolicyServer(), credentials=server_credentials(authority)) as server:
        client = GrpcServerClient(server.address, files)
        await client.status()
        if how == "gone":
            files.cert.unlink()
        else:
            files.cert.write_bytes(authority.issue("operator")[0])
        assert (await client.status()).instance_id == "one"
        authority.write("operator")
        assert (await client.status()).instance_id == "one"
        await client.close()


async def test_what_is_wrong_with_tls_is_told(tmp_path):
    authority, stranger = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    good, other = authority.write("operator"), stranger.write("operator", ca=authority)
    wrong = {
        "its certificate is for another name: see --tls-server-name": replace(
            good, server_name="other.pointsman.svc"
        ),
        "it closes the connection: with TLS, it may not trust --tls-cert, "
        "or find it expired": other,
        "--tls-cert, --tls-key and --tls-ca cannot be used together": replace(good, key=other.key),
    }
    async with serving(FakePolicyServer(), credentials=server_credentials(authority)) as server:
        for text, files in wrong.items():
            assert await told(server, files) == text
    async with serving(FakePolicyServer()) as server:
        assert await told(server, good) == "it does not speak TLS"


@pytest.mark.parametrize(
    ("days", "text"),
    [((-2, -1), "has expired"), ((1, 2), "is not valid yet")],
)
async def test_a_certificate_of_another_time_is_told(tmp_path, days, text):
    """Which no other --tls-ca would mend."""
    authority = Authority(tmp_path / "ca")
    credentials = server_credentials(authority, days=days)
    async with serving(FakePolicyServer(), credentials=credentials) as server:
        found = await told(server, authority.write("operator"))
    assert found == f"its certificate, or its authority's, {text}"


async def told(server, files):
    client = GrpcServerClient(server.address, files)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.status()
    await client.close()
    return describe(caught.value)


async def test_a_missing_certificate_is_told(tmp_path, rig, snapshots):
    files = TlsFiles(cert=tmp_path / "c", key=tmp_path / "k", ca=tmp_path / "a")
    rig.publisher.connect = lambda address: GrpcServerClient(address, files)
    rig.publisher.publish(snapshots())
    await rig.publisher.set_servers({"127.0.0.1:1": True})
    await rig.until(lambda states: "No such file" in states["127.0.0.1:1"].error)


async def test_nobody_was_asked_before_it_is_known_whom_to_ask(rig):
    assert not rig.publisher.asked
    await rig.publisher.set_servers({})
    assert rig.publisher.asked
