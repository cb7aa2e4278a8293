"""What is changed while requests come: each change takes effect, and no request is lost."""

import asyncio

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOKENS = 40
"""Of the long request."""
CLIENTS = 4
"""That send one request after the other."""


async def test_a_changed_limit(place, eventually):
    slow, fast = await place.engines("slow", "fast")
    # Told to be slow: predictions come from the profile, this engine answers at once.
    profile = {"memoryBandwidthGBps": 100}
    await place.apply(
        place.expert("slow", addresses=[slow.address], quality=0.9, profile=profile),
        place.expert("fast", addresses=[fast.address], quality=0.1),
        place.policy(algorithm="LatencyQualityGreedy", qos={"latencyPerTokenMs": 60}),
    )
    await place.until_policy(Ready="True")
    await eventually("fast", place.decide, lambda address: address == fast.address)
    await place.until_answered_by("fast")

    await place.apply(
        place.policy(algorithm="LatencyQualityGreedy", qos={"latencyPerTokenMs": 5000})
    )
    await place.until_answered_by("slow")
    found = await place.until_policy(Ready="True", Programmed="True/Acknowledged")
    assert found["metadata"]["generation"] == 2
    assert "has generation 2" in condition(found, "Programmed")["message"]
    live = await place.plant.live()
    assert live["snapshots"][f"{place.namespace}/auto"] == {
        "generation": 2,
        "version": found["status"]["snapshotVersion"],
    }


async def test_scaled_up_and_down_under_a_long_request(place, eventually):
    """The endpoint of a streamed answer is taken away: nothing new comes, the rest does."""
    old = await place.held_engine("ant")
    await place.apply(
        place.service("ant", port=8000),
        place.slice("ant", {old.address: True}, suffix="old"),
        place.expert("ant", backend={"service": {"name": "ant", "port": 8000}}),
        place.policy(algorithm="LeastLoad"),
    )
    await place.until_policy(Ready="True")
    await place.until_endpoint(old.address)
    stream = await place.stream(TOKENS)
    assert stream.endpoint == old.address
    await eventually("tokens", lambda: counted(stream), lambda tokens: tokens == old.FIRST)

    new = await place.engine("ant")
    await place.apply(place.slice("ant", {new.address: True}, suffix="new"))
    # The old one is busy, so that the load goes to the new one.
    await place.until_endpoint(new.address)
    await place.until_expert("ant", Ready="True")

    await place.apply(place.slice("ant", {old.address: "terminating"}, suffix="old"))
    await eventually("gone", place.plant.live, lambda live: old.address not in live["endpoints"])
    answers = await asyncio.gather(*(place.ask() for _ in range(10)))
    assert {headers["x-pointsman-endpoint"] for _, headers, _ in answers} == {new.address}
    await place.kubectl("delete", "endpointslice", "ant-old")
    await place.until_expert("ant", Ready="True", endpoints=(1, 1))
    assert (await place.plant.live())["in_flight"] >= 1

    old.release()
    assert await stream.end() == TOKENS
    assert stream.done
    await place.until_in_flight(0)


async def test_a_broken_expert_and_its_return(place):
    best, other = await place.engines("best", "other")
    port = int(best.address.rpartition(":")[2])
    await place.apply(
        place.expert("best", addresses=[best.address], quality=0.9),
        place.expert("other", addresses=[other.address], quality=0.1),
        place.policy(),
    )
    await place.until_policy(Ready="True")
    await place.until_answered_by("best")
    await place.until_expert("best", Ready="True", Reachable="True/AllAnswer")

    await best.kill()
    answers = await asyncio.gather(*(place.answer() for _ in range(10)))
    assert set(answers) == {"other"}, "another expert takes over at once"
    await place.until_expert(
        "best", Ready="False/NoneAnswers", Reachable="False/NoneAnswers", ModelServed="Unknown"
    )
    await place.until_policy(Ready="True/Degraded")
    await other.kill()
    await place.until_policy(Ready="False/NoneAnswers", Programmed="True")

    await place.engine("best", port=port)
    await place.until_answered_by("best")
    await place.until_expert("best", Ready="True", Reachable="True", ModelServed="True")


async def test_an_engine_that_serves_another_model(place):
    (ant,) = await place.engines("something-else")
    await place.apply(place.expert("ant", addresses=[ant.address]), place.policy())
    found = await place.until_expert(
        "ant", Ready="False/ModelNotListed", Reachable="True", ModelServed="False/ModelNotListed"
    )
    message = condition(found, "ModelServed")["message"]
    assert message == f"{ant.address} does not serve ant; it serves something-else"
    await place.until_answered_by("503")
    await place.until_policy(Ready="False/NoReadyEndpoints")

    # `model` cannot be changed: the way out is another expert.
    await place.delete("llmexpert", "ant")
    await place.apply(place.expert("ant", model="something-else", addresses=[ant.address]))
    await place.until_expert("ant", Ready="True", ModelServed="True/ModelListed")
    await place.until_answered_by("ant")


async def test_a_deleted_expert_and_policy(place, eventually):
    best = await place.held_engine("best")
    (other,) = await place.engines("other")
    await place.apply(
        place.expert("best", addresses=[best.address], quality=0.9),
        place.expert("other", addresses=[other.address], quality=0.1),
        place.policy(),
    )
    await place.until_policy(Ready="True")
    await place.until_answered_by("best")
    stream = await place.stream(TOKENS)
    assert stream.expert == "best"

    await place.delete("llmexpert", "best")
    await place.until_answered_by("other")
    await place.until_policy(Ready="True", experts=1)
    await place.delete("llmexpert", "other")
    await place.until_answered_by("503")
    await place.until_policy(Ready="False/NoExperts", ResolvedRefs="False/NoExperts")
    await place.delete("routingpolicy", "auto")
    await place.until_answered_by("404")
    await eventually(
        "ConfigMap gone",
        lambda: place.get("configmaps", "pointsman-snapshot-auto"),
        lambda found: not found,
    )

    assert not stream.done
    best.release()
    assert await stream.end() == TOKENS
    assert stream.done
    await place.until_in_flight(0)


async def test_a_moved_expert(place):
    """Another backend, other labels: what a user edits in place."""
    here, there = await place.engines("ant", "ant")
    labels = {"labels": {"tier": "edge"}}
    chosen = {"selector": {"matchLabels": {"tier": "edge"}}}
    await place.apply(
        place.expert("ant", addresses=[here.address], metadata=labels), place.policy(**chosen)
    )
    await place.until_endpoint(here.address)
    await place.apply(place.expert("ant", addresses=[there.address], metadata=labels))
    await place.until_endpoint(there.address)

    await place.kubectl("label", "llmexpert", "ant", "tier=cloud", "--overwrite")
    found = await place.until_policy(Ready="False/NoExperts")
    message = condition(found, "ResolvedRefs")["message"]
    assert message == f"there is no LLMExpert in namespace {place.namespace} with tier=edge"
    await place.until_answered_by("503")
    await place.kubectl("label", "llmexpert", "ant", "tier=edge", "--overwrite")
    await place.until_endpoint(there.address)


async def test_no_request_is_lost_while_everything_changes(place, eventually):
    """Requests all the time, each with an engine that stays; every change shows in decisions."""
    stays, one, two = await place.engines("stays", "comes", "comes")
    slices = [
        place.slice("comes", {e.address: True}, suffix=str(i)) for i, e in enumerate((one, two))
    ]
    comes = place.expert("comes", backend={"service": {"name": "comes", "port": 8000}}, quality=0.9)
    await place.apply(
        place.service("comes", port=8000),
        place.expert("stays", addresses=[stays.address], quality=0.1),
        place.policy(),
    )
    await place.until_answered_by("stays")

    async def answered():
        return len(answers)

    async def decided(address):
        """Wait until it is, and until a request that began after that was answered."""
        await eventually(f"decided for {address}", place.decide, lambda found: found == address)
        enough = len(answers) + CLIENTS + 1
        await eventually("requests meanwhile", answered, lambda count: count >= enough)

    async with place.load(clients=CLIENTS) as answers:
        for _ in range(3):
            await place.apply(slices[0], comes)
            await decided(one.address)
            await place.apply(slices[1])
            await place.kubectl("delete", "endpointslice", "comes-0")
            await decided(two.address)
            await place.apply(place.policy(qos={"latencyPerTokenMs": 500}, admission="Reject"))
            await place.kubectl("delete", "endpointslice", "comes-1")
            await decided(stays.address)
            await place.apply(*slices)
            await eventually("both", place.decide, lambda found: found != stays.address)
            await place.delete("llmexpert", "comes")
            await decided(stays.address)
            await place.apply(place.policy())
            await place.kubectl("delete", "endpointslice", "--all")
    assert set(answers) == {200}
    await place.until_in_flight(0)


def condition(found, type_):
    return next(one for one in found["status"]["conditions"] if one["type"] == type_)


async def counted(stream):
    return stream.tokens
