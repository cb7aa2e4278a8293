"""Whatever happens in whatever order, the outcome is that of the state it ends in."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from pointsman_operator.conditions import MEANINGS
from pointsman_operator.observed import Kind, Observed, Probe, ServerState
from pointsman_operator.reconcile import Previous, reconcile
from pointsman_operator.store import Store

NOW = datetime(2026, 1, 2, tzinfo=UTC)
KNOWN = {(m.kind, m.type, m.status, m.reason) for m in MEANINGS}

IPS = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
BACKENDS = [
    {"addresses": ["10.0.9.1:8000"]},
    {"service": {"name": "engine", "port": 80}},
    {"service": {"name": "engine", "port": 81}},
    {"podSelector": {"matchLabels": {"app": "llm"}, "port": 8000}},
    {"inferencePool": {"name": "pool"}},
    {},
]
LABELS = [{}, {"site": "a"}]


@st.composite
def bodies(draw, api, kind):
    name = draw(st.sampled_from(["a", "b"]))
    match kind:
        case Kind.EXPERT:
            backend = draw(st.sampled_from(BACKENDS))
            labels = draw(st.sampled_from(LABELS))
            engine = {"type": draw(st.sampled_from(["vllm", "llamacpp"]))}
            generation = draw(st.sampled_from([1, 1, 1, 2]))
            meta = {"labels": labels, "generation": generation}
            body = api.expert(name, meta=meta, spec={"engine": engine})
            body["spec"]["backend"] = backend
            return body
        case Kind.POLICY:
            models = draw(st.sampled_from([["auto"], ["auto", "x"], ["x"], ["y"], []]))
            created = draw(st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"]))
            selector = {"matchLabels": draw(st.sampled_from(LABELS))}
            meta = {"creationTimestamp": created}
            return api.policy(name, models=models, selector=selector, meta=meta)
        case Kind.SERVICE:
            return api.service("engine")
        case Kind.SLICE:
            ips = draw(st.lists(st.sampled_from(IPS), unique=True))
            return api.slice("engine", *ips, name=name, ready=draw(st.booleans()))
        case Kind.POD:
            return api.pod(name, draw(st.sampled_from(IPS)), ready=draw(st.booleans()))
        case _:
            return api.pool("pool", draw(st.sampled_from([8000, 8001])))


KINDS = st.sampled_from([kind for kind in Kind if kind is not Kind.CONFIG_MAP])
PROBES = st.dictionaries(
    st.sampled_from([*(f"{ip}:8000" for ip in IPS), "10.0.9.1:8000"]),
    st.builds(
        Probe,
        answers=st.booleans(),
        models=st.sampled_from([None, (), ("a-model",), ("a-model", "b-model")]),
    ),
)
SERVERS = st.dictionaries(
    st.sampled_from(["s1", "s2"]),
    st.builds(
        ServerState,
        counted=st.booleans(),
        error=st.sampled_from(["", "cannot be reached"]),
        refused=st.booleans(),
    ),
)


def observe(store: Store, **others) -> Observed:
    return Observed(
        experts=store.objects(Kind.EXPERT),
        policies=store.objects(Kind.POLICY),
        services=store.objects(Kind.SERVICE),
        slices=store.objects(Kind.SLICE),
        pods=store.objects(Kind.POD),
        pools=store.objects(Kind.POOL),
        **others,
    )


@given(data=st.data())
def test_events_and_lists_in_any_order_end_in_the_same_outcome(api, data):
    """What the API holds in the end decides; how the operator learnt of it does not."""
    truth: dict = {}
    store = Store()
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(KINDS)
        body = data.draw(bodies(api, kind))
        key = (kind, body["metadata"]["name"])
        if data.draw(st.booleans()):
            event = "MODIFIED" if key in truth else "ADDED"
            truth[key] = body
        elif key in truth:
            event = "DELETED"
            del truth[key]
        else:
            continue
        if data.draw(st.integers(0, 3)):  # one of four is missed
            store.take_event(kind, event, body, now=0.0)
        if not data.draw(st.integers(0, 5)):
            resync(store, truth)
    resync(store, truth)
    direct = Store()
    for (kind, _), body in data.draw(st.permutations(list(truth.items()))):
        direct.take_event(kind, None, body, now=0.0)
    others = {"probes": data.draw(PROBES), "servers": data.draw(SERVERS)}
    first = reconcile(observe(store, **others), Previous(), NOW)
    assert first == reconcile(observe(direct, **others), Previous(), NOW)


def resync(store, truth):
    for kind in Kind:
        touched = store.begin_list(kind)
        found = [body for (of, _), body in truth.items() if of is kind]
        store.end_list(kind, touched, found, now=0.0)


@given(data=st.data())
def test_a_run_of_states(api, data):
    """For any sequence of states: idempotent, consistent, and only reasons that are told."""
    previous = Previous()
    for _ in range(data.draw(st.integers(1, 4))):
        kinds = data.draw(st.lists(KINDS, max_size=8))
        found = [data.draw(bodies(api, kind)) for kind in kinds]
        seen = api.observe(*found, probes=data.draw(PROBES), servers=data.draw(SERVERS))
        outcome = reconcile(seen, previous, NOW)
        again = reconcile(seen, outcome.next, datetime(2027, 1, 1, tzinfo=UTC))
        assert again.snapshots == outcome.snapshots
        assert (again.statuses, again.config_maps, again.stale_config_maps) == ((), (), ())
        assert again.next == outcome.next
        stay = previous.snapshots.keys() & seen.policies.keys()
        assert stay <= outcome.next.snapshots.keys(), "what is in force is never lost to another"
        models = [model for snapshot in outcome.snapshots for model in snapshot.models]
        assert len(models) == len(set(models))
        for write in outcome.statuses:
            for c in write.status["conditions"]:
                assert (write.ref.kind, c["type"], c["status"], c["reason"]) in KNOWN
        previous = outcome.next
        if not data.draw(st.integers(0, 3)):  # the operator is started again
            previous = Previous(
                snapshots=previous.snapshots, stored=previous.stored, statuses=previous.statuses
            )
