"""Watches and full lists in one table."""

from pointsman_operator.observed import Key, Kind
from pointsman_operator.store import GRACE_S, Store

POD = Key("default", "pod")


def names(store):
    return {key.name for key in store.objects(Kind.POD)}


def relist(store, *bodies, now=0.0):
    return store.end_list(Kind.POD, store.begin_list(Kind.POD), bodies, now=now)


def test_events_change_the_table(api):
    store = Store()
    assert store.take_event(Kind.POD, None, api.pod("a"), now=0.0)
    assert store.take_event(Kind.POD, "ADDED", api.pod("b"), now=0.0)
    assert not store.take_event(Kind.POD, "MODIFIED", api.pod("b"), now=0.0)
    assert store.take_event(Kind.POD, "MODIFIED", api.pod("b", ready=False), now=0.0)
    assert store.take_event(Kind.POD, "DELETED", api.pod("a"), now=0.0)
    assert not store.take_event(Kind.POD, "DELETED", api.pod("a"), now=0.0)
    assert names(store) == {"b"}


def test_another_version_of_the_same_is_no_change(api):
    """Others write what does not matter here: heartbeats, annotations."""
    store = Store()
    assert store.take_event(Kind.POD, None, api.pod(), now=0.0)
    newer = api.pod(meta={"resourceVersion": "2"})
    assert not store.take_event(Kind.POD, "MODIFIED", newer, now=0.0)
    assert not relist(store, api.pod(meta={"resourceVersion": "3"}))


def test_a_namespace_that_could_not_be_listed_is_left_alone(api):
    store = Store()
    relist(store, api.pod("a"), api.pod("b", meta={"namespace": "b"}))
    touched = store.begin_list(Kind.POD)
    assert store.end_list(Kind.POD, touched, [], now=0.0, kept={"b"})
    assert names(store) == {"b"}


def test_rubbish_changes_nothing():
    store = Store()
    assert not store.take_event(Kind.POD, "ADDED", None, now=0.0)
    assert not store.take_event(Kind.POD, "ADDED", {"metadata": {}}, now=0.0)


def test_the_end_of_a_predecessor_does_not_take_its_successor(api):
    """The two have workers of their own in kopf, so their order is not certain."""
    store = Store()
    store.take_event(Kind.POD, "ADDED", api.pod(meta={"uid": "new"}), now=0.0)
    assert not store.take_event(Kind.POD, "DELETED", api.pod(meta={"uid": "old"}), now=0.0)
    assert POD in store.objects(Kind.POD)


def test_a_list_removes_what_a_410_has_left_behind(api):
    store = Store()
    store.take_event(Kind.POD, None, api.pod("a"), now=0.0)
    store.take_event(Kind.POD, None, api.pod("b"), now=0.0)
    assert relist(store, api.pod("a"))
    assert names(store) == {"a"}
    assert not relist(store, api.pod("a"))


def test_what_a_watch_tells_during_a_list_is_left_alone(api):
    store = Store()
    relist(store, api.pod("kept", ready=False), api.pod("ended"))
    touched = store.begin_list(Kind.POD)
    listed = [api.pod("kept", ready=False), api.pod("ended")]
    store.take_event(Kind.POD, "MODIFIED", api.pod("kept"), now=0.0)
    store.take_event(Kind.POD, "DELETED", api.pod("ended"), now=0.0)
    store.take_event(Kind.POD, "ADDED", api.pod("born"), now=0.0)
    assert not store.end_list(Kind.POD, touched, listed, now=0.0)
    assert names(store) == {"kept", "born"}
    assert store.objects(Kind.POD)[Key("default", "kept")].ready


def test_a_list_that_failed_leaves_no_trace(api):
    store = Store()
    store.abandon_list(Kind.POD, store.begin_list(Kind.POD))
    store.take_event(Kind.POD, "ADDED", api.pod(), now=0.0)
    assert relist(store)
    assert names(store) == set()


def test_changes_that_only_a_list_finds_were_missed(api):
    store = Store()
    relist(store, api.pod("a"))
    assert store.missed(Kind.POD, now=100.0) == 0  # the first list corrects nothing
    relist(store, api.pod("b"), now=0.0)
    assert store.missed(Kind.POD, now=GRACE_S / 2) == 0
    # The watch tells of one of them in time.
    store.take_event(Kind.POD, "ADDED", api.pod("b"), now=1.0)
    assert store.missed(Kind.POD, now=GRACE_S) == 1
    assert store.missed(Kind.POD, now=GRACE_S) == 0


def test_what_changes_often_is_missed_as_well(api):
    store = Store()
    relist(store, api.pod("a"))
    for at in range(int(GRACE_S) + 1):
        relist(store, api.pod("a", ready=at % 2 == 0), now=float(at))
    assert store.missed(Kind.POD, now=GRACE_S + 1) == 1


def test_a_kind_that_is_not_installed(api):
    store = Store()
    store.take_event(Kind.POOL, "ADDED", api.pool(), now=0.0)
    assert store.end_list(Kind.POOL, store.begin_list(Kind.POOL), None, now=0.0)
    assert not store.installed(Kind.POOL)
    assert not store.objects(Kind.POOL)
    store.take_event(Kind.POOL, "DELETED", api.pool(), now=0.0)
    assert not store.installed(Kind.POOL)
    store.take_event(Kind.POOL, "ADDED", api.pool(), now=0.0)
    assert store.installed(Kind.POOL)


def test_the_age_of_a_watch(api):
    store = Store()
    assert store.event_age(Kind.POD, now=5.0) is None
    store.take_event(Kind.POD, "ADDED", api.pod(), now=5.0)
    assert store.event_age(Kind.POD, now=7.0) == 2.0
    assert store.events(Kind.POD) == 1
