"""The protocol's state machine and the resources that it carries."""

from dataclasses import replace

import pytest
from envoy.config.core.v3 import health_check_pb2
from google.protobuf.json_format import MessageToDict

from pointsman_policy.eds import (
    EdsEndpoint,
    EdsServer,
    Reaction,
    SotwStream,
    load_assignment,
    merge_endpoints,
)

A = EdsEndpoint("10.0.0.1:8000", ("a", "a-alias"), "expert-a")


def opened(*names: str) -> SotwStream:
    stream = SotwStream()
    assert stream.receive(names=names, nonce="", rejected=False) is Reaction.SUBSCRIBED
    return stream


class TestStream:
    def test_nothing_is_due_before_a_subscription(self):
        assert not SotwStream().due("1")

    def test_nothing_is_due_before_there_is_a_version(self):
        assert not opened("experts").due(None)

    def test_a_version_is_sent_once(self):
        stream = opened("experts")
        assert stream.due("1")
        nonce = stream.send("1")
        assert not stream.due("1")
        assert stream.receive(names=["experts"], nonce=nonce, rejected=False) is Reaction.ACK
        assert not stream.due("1")

    def test_a_new_version_is_due_also_before_the_ack_of_the_old(self):
        stream = opened("experts")
        stream.send("1")
        assert stream.due("2")

    def test_every_response_has_its_own_nonce(self):
        stream = opened("experts")
        assert len({stream.send(version) for version in "123"}) == 3

    def test_a_rejected_version_is_not_sent_again_but_the_next_one_is(self):
        stream = opened("experts")
        nonce = stream.send("1")
        assert stream.receive(names=["experts"], nonce=nonce, rejected=True) is Reaction.NACK
        assert not stream.due("1")
        assert stream.due("2")

    def test_a_rejected_version_is_sent_again_after_another_one(self):
        stream = opened("experts")
        stream.receive(names=["experts"], nonce=stream.send("1"), rejected=True)
        stream.receive(names=["experts"], nonce=stream.send("2"), rejected=False)
        assert stream.due("1")

    def test_stale_nonces_change_nothing(self):
        stream = opened("experts")
        old = stream.send("1")
        stream.send("2")
        assert stream.receive(names=["x"], nonce=old, rejected=False) is Reaction.STALE
        assert stream.receive(names=["x"], nonce=old, rejected=True) is Reaction.STALE
        assert stream.receive(names=["x"], nonce="other", rejected=False) is Reaction.STALE
        assert stream.names == ("experts",)
        assert not stream.due("2")

    def test_new_names_are_answered_with_the_version_at_hand(self):
        stream = opened("experts")
        nonce = stream.send("1")
        more = ["experts", "more"]
        assert stream.receive(names=more, nonce=nonce, rejected=False) is Reaction.SUBSCRIBED
        assert stream.due("1")

    def test_new_names_are_answered_also_when_they_come_with_a_rejection(self):
        stream = opened("experts")
        nonce = stream.send("1")
        stream.receive(names=["experts", "more"], nonce=nonce, rejected=True)
        assert stream.due("1")

    def test_fewer_names_are_no_reason_to_send(self):
        stream = opened("experts", "more")
        nonce = stream.send("1")
        assert stream.receive(names=["experts"], nonce=nonce, rejected=False) is Reaction.ACK
        assert not stream.due("1")

    def test_no_names_end_the_subscription(self):
        stream = opened("experts")
        stream.receive(names=[], nonce=stream.send("1"), rejected=False)
        assert not stream.due("2")


class TestEndpoints:
    def test_the_order_given_does_not_matter(self):
        b = EdsEndpoint("10.0.0.2:8000", ("b",), "expert-b")
        assert merge_endpoints([b, A]) == merge_endpoints([A, b]) == (A, b)

    def test_experts_on_one_address_are_one_endpoint(self):
        b = EdsEndpoint(A.address, ("b", "a"), "expert-b", ready=False)
        assert merge_endpoints([A, b, A]) == (
            EdsEndpoint(A.address, ("a", "a-alias", "b"), "expert-a,expert-b", ready=True),
        )

    @pytest.mark.parametrize("address", ["", "10.0.0.1", "10.0.0.1:0", "localhost:80"])
    def test_an_address_that_is_none_is_refused(self, address: str):
        with pytest.raises(ValueError, match=r"is no ip:port|has no port"):
            merge_endpoints([EdsEndpoint(address, ("a",), "x")])

    def test_a_comma_in_a_name_is_refused(self):
        with pytest.raises(ValueError, match="comma in a name"):
            merge_endpoints([EdsEndpoint(A.address, ("a,b",), "x")])

    def test_the_message(self):
        message = load_assignment("experts", [A])
        assert MessageToDict(message, preserving_proto_field_name=True) == {
            "cluster_name": "experts",
            # One ready endpoint gets everything; Envoy's default shares with those not ready.
            "policy": {"overprovisioning_factor": 1000000},
            "endpoints": [
                {
                    "lb_endpoints": [
                        {
                            "endpoint": {
                                "address": {
                                    "socket_address": {"address": "10.0.0.1", "port_value": 8000}
                                }
                            },
                            "metadata": {
                                "filter_metadata": {
                                    "pointsman": {
                                        "served_models": "a,a-alias",
                                        "expert": "expert-a",
                                    }
                                }
                            },
                        }
                    ]
                }
            ],
        }

    def test_the_policies_that_may_use_it(self):
        shared = merge_endpoints([replace(A, policies=("x/a",)), replace(A, policies=("x/b",))])
        message = load_assignment("experts", shared)
        metadata = message.endpoints[0].lb_endpoints[0].metadata
        assert MessageToDict(metadata)["filterMetadata"]["envoy.lb"] == {
            "pointsman-policy": ["x/a", "x/b"]
        }

    @pytest.mark.parametrize(
        ("ready", "status"),
        [(True, health_check_pb2.UNKNOWN), (False, health_check_pb2.DEGRADED)],
    )
    def test_health(self, ready: bool, status: int):
        message = load_assignment("experts", [EdsEndpoint(A.address, ("a",), "a", ready=ready)])
        assert message.endpoints[0].lb_endpoints[0].health_status == status

    def test_no_endpoints(self):
        assert not load_assignment("experts", []).endpoints


class TestVersions:
    def test_equal_content_has_an_equal_version_in_every_server(self):
        servers = EdsServer(), EdsServer()
        for server in servers:
            server.set_endpoints([A])
        assert servers[0].version == servers[1].version

    def test_readiness_is_content(self):
        server = EdsServer()
        server.set_endpoints([A])
        before = server.version
        server.set_endpoints([EdsEndpoint(A.address, A.served_models, A.expert, ready=False)])
        assert server.version != before

    def test_bad_endpoints_leave_the_former_in_force(self):
        server = EdsServer()
        server.set_endpoints([A])
        before = server.version
        with pytest.raises(ValueError, match="ip:port"):
            server.set_endpoints([EdsEndpoint("nowhere:80", ("a",), "a")])
        assert server.version == before
