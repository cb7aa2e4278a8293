"""From backends to addresses."""

import pytest

from pointsman_operator.conditions import Reason
from pointsman_operator.endpoints import Resolver, find_port, format_address
from pointsman_operator.observed import Key, Kind

SERVICE = {"service": {"name": "engine", "port": 80}}
PODS = {"podSelector": {"matchLabels": {"app": "llm"}, "port": 8000}}
POOL = {"inferencePool": {"name": "pool"}}


def resolve(api, backend, *bodies, **others):
    seen = api.observe(api.expert(**backend), *bodies, **others)
    (expert,) = seen.experts.values()
    found = Resolver(seen).resolve(expert.resource)
    return list(found.ready), found.total


def test_fixed_addresses_are_all_ready(api):
    assert resolve(api, {"addresses": ["10.0.0.2:1", "10.0.0.1:1"]}) == (
        ["10.0.0.1:1", "10.0.0.2:1"],
        2,
    )


@pytest.mark.parametrize(
    ("backend", "kind"),
    [(SERVICE, Kind.SERVICE), (SERVICE, Kind.SLICE), (PODS, Kind.POD), (POOL, Kind.POOL)],
)
def test_what_may_not_be_read_is_a_fault_and_not_an_absence(api, backend, kind):
    seen = api.observe(api.expert(**backend), unreadable=frozenset({(kind, "")}))
    (expert,) = seen.experts.values()
    found = Resolver(seen).resolve(expert.resource)
    assert (found.fault, found.ready) == (Reason.NOT_PERMITTED, ())
    assert str(kind) in found.message


SLICES = {
    "ready": ({"ready": True}, (["10.0.0.1:8000"], 1)),
    "readiness not told": ({}, (["10.0.0.1:8000"], 1)),
    "not ready": ({"ready": False}, ([], 1)),
    "terminating": ({"ready": False, "serving": True, "terminating": True}, ([], 0)),
    "published though not ready": ({"ready": True, "terminating": True}, ([], 0)),
}


@pytest.mark.parametrize(("conditions", "expected"), SLICES.values(), ids=SLICES)
def test_endpoint_slices(api, conditions, expected):
    found = api.slice("engine", "10.0.0.1", **conditions)
    assert resolve(api, SERVICE, api.service(), found) == expected


def test_several_slices_are_one_list(api):
    first = api.slice("engine", "10.0.0.1", "10.0.0.2", ready=False)
    second = api.slice("engine", "10.0.0.2", "10.0.0.3", name="engine-2")
    other = api.slice("another", "10.0.0.4")
    assert resolve(api, SERVICE, api.service(), first, second, other) == (
        ["10.0.0.2:8000", "10.0.0.3:8000"],
        3,
    )


def test_the_port_is_found_by_its_name_in_the_slice(api):
    found = api.slice("engine", "10.0.0.1")
    found["ports"] = [
        {"name": "metrics", "port": 9000},
        {"name": "http", "port": 8123, "protocol": "TCP"},
    ]
    assert resolve(api, SERVICE, api.service(), found) == (["10.0.0.1:8123"], 1)
    assert resolve(api, SERVICE, api.service(port_name="grpc"), found) == ([], 0)


def test_a_dual_stack_service_counts_each_pod_once(api):
    four = api.slice("engine", "10.0.0.1")
    six = api.slice("engine", "fd00::1", name="engine-6", family="IPv6")
    service = api.service(ipFamilies=["IPv6", "IPv4"])
    assert resolve(api, SERVICE, service, four, six) == (["[fd00::1]:8000"], 1)
    assert resolve(api, SERVICE, api.service(), four, six)[1] == 2


def test_host_names_are_no_endpoints(api):
    found = api.slice("engine", "box.example.org", family="FQDN")
    assert resolve(api, SERVICE, api.service(), found) == ([], 0)


def test_pods_that_are_ready_and_stay(api):
    pods = [
        api.pod("a", "10.0.1.1"),
        api.pod("b", "10.0.1.2", ready=False),
        api.pod("c", "10.0.1.3", meta={"deletionTimestamp": "2026-01-01T00:00:00Z"}),
        api.pod("d", "10.0.1.4", phase="Succeeded"),
        api.pod("e", "10.0.1.5", meta={"labels": {"app": "other"}}),
        api.pod("f", "10.0.1.6", meta={"namespace": "elsewhere"}),
        api.pod("g", ""),
    ]
    assert resolve(api, PODS, *pods) == (["10.0.1.1:8000"], 2)


def why_none(api, backend, *bodies):
    seen = api.observe(api.expert(**backend), *bodies)
    (expert,) = seen.experts.values()
    found = Resolver(seen).resolve(expert.resource)
    assert (found.fault, found.total) == (None, 0)
    return found.message


def test_why_a_service_has_no_endpoints(api):
    def of(*bodies, **spec):
        return why_none(api, SERVICE, api.service(**spec), *bodies)

    nothing = "Service default/engine has no endpoints: no pod with an address matches its selector"
    assert of() == nothing
    assert of(api.slice("engine")) == nothing
    assert of(api.slice("engine", "10.0.0.1"), port_name="") == (
        "the EndpointSlices of Service default/engine have no TCP port named ''; they have 'http'"
    )
    assert of(api.slice("engine", "fd00::1", family="IPv6"), ipFamilies=["IPv4"]) == (
        "Service default/engine is IPv4, its endpoints are IPv6"
    )
    leaving = api.slice("engine", "10.0.0.1", terminating=True)
    assert of(leaving) == "all endpoints of Service default/engine are terminating"


def test_why_there_is_no_pod(api):
    where = "with app=llm in namespace default"
    pending = (api.pod("b", "", phase="Pending"), api.pod("a", "", phase="Pending"))
    assert why_none(api, PODS) == f"there is no pod {where}"
    assert why_none(api, PODS, *pending) == f"no pod {where} has an address yet: a, b"
    assert why_none(api, PODS, api.pod(phase="Succeeded")) == f"all pods {where} have ended"
    pool = f"there is no pod {where} (InferencePool default/pool)"
    assert why_none(api, POOL, api.pool()) == pool


def test_one_address_in_two_notations_is_one_endpoint(api):
    addresses = ["[fd00:0::1]:80", "[FD00::1]:80"]
    assert resolve(api, {"addresses": addresses}) == (["[fd00::1]:80"], 1)


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_of_pods_that_share_an_address_the_ready_one_counts(api, names):
    """Such as on their host's network; whichever the API tells of first."""
    pods = [api.pod(name, "10.0.1.1", ready=name == "a") for name in names]
    assert resolve(api, PODS, *pods) == (["10.0.1.1:8000"], 1)


def test_all_labels_must_match(api):
    selector = {"matchLabels": {"app": "llm", "tier": "gpu"}, "port": 1}
    pods = [api.pod("a"), api.pod("b", "10.0.1.2", meta={"labels": {"app": "llm", "tier": "gpu"}})]
    assert resolve(api, {"podSelector": selector}, *pods) == (["10.0.1.2:1"], 1)
    assert resolve(api, {"podSelector": selector}) == ([], 0)


def test_an_inference_pool_is_every_ready_pod_by_every_port(api):
    pods = [api.pod("a", "10.0.1.1"), api.pod("b", "10.0.1.2", ready=False)]
    assert resolve(api, POOL, api.pool("pool", 8000, 8001), *pods) == (
        ["10.0.1.1:8000", "10.0.1.1:8001"],
        4,
    )


def test_an_inference_pool_that_selects_nothing_selects_no_pod(api):
    pool = api.pool()
    pool["spec"]["selector"] = {}
    assert resolve(api, POOL, pool, api.pod()) == ([], 0)


def test_ports_are_found_by_number_and_by_name(api):
    (service,) = api.observe(api.service(port=9005, port_name="control")).services.values()
    assert find_port(service, "9005") == find_port(service, "control")
    assert find_port(service, "http") is None


def test_endpoints_of_a_service_with_their_readiness(api):
    seen = api.observe(
        api.service(),
        api.slice("engine", "10.0.0.1", ready=False),
        api.slice("engine", "10.0.0.2", name="engine-2"),
    )
    key = Key("default", "engine")
    port = find_port(seen.services[key], "80")
    assert Resolver(seen).service_endpoints(key, port) == {
        "10.0.0.1:8000": False,
        "10.0.0.2:8000": True,
    }


@pytest.mark.parametrize(
    ("ip", "address"),
    [("10.0.0.1", "10.0.0.1:1"), ("fd00:0::1", "[fd00::1]:1"), ("x.org", None), ("", None)],
)
def test_addresses_are_written_as_envoy_reads_them(ip, address):
    assert format_address(ip, 1) == address


@pytest.mark.parametrize(("namespace", "fault"), [("default", Reason.NOT_PERMITTED), ("b", None)])
def test_what_may_not_be_read_in_one_namespace_is_no_fault_in_others(api, namespace, fault):
    seen = api.observe(api.expert(**PODS), unreadable=frozenset({(Kind.POD, namespace)}))
    (expert,) = seen.experts.values()
    assert Resolver(seen).resolve(expert.resource).fault == fault
