"""The operator as ``kopf run`` starts it, with its settings in the environment."""

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
