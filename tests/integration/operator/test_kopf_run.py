"""The operator as ``kopf run`` starts it, with its settings in the environment."""

import json

import pytest

pytestmark = pytest.mark.integration


async def test_it_becomes_ready_follows_changes_and_ends(site):
    await site.set_the_scene()
    operator = await site.start_kopf("--all-namespaces")
    await site.converged(site.before)
    assert await operator.page("/healthz") == (200, "ok\n")
    await site.change_the_scene()
    await site.converged(site.after)
    assert await operator.stop() == 0
    assert await site.server.in_force() == site.after
    assert "publishing" in structured(operator.log)
    assert not [one for one in operator.log.splitlines() if "succeeded" in one and "pod" in one]


def structured(log):
    """What lines of JSON tell; kopf itself writes plain ones before the settings are read."""
    return [json.loads(one).get("event") for one in log.splitlines() if one.startswith("{")]
