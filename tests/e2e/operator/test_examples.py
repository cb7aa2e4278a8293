"""``kubectl apply -f examples/`` as a user does it, and what kubectl tells afterwards."""

import os
import random
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.asyncio(loop_scope="session")

EXAMPLES = Path(__file__).parents[3] / "examples"
OUTPUT = os.environ.get("POINTSMAN_KUBECTL_OUTPUT", "")
"""File to write what kubectl printed to, for the documentation."""


@pytest.fixture
def shown():
    """Commands and what they printed."""
    found = []
    yield found
    if OUTPUT:
        Path(OUTPUT).write_text("\n".join(found).replace(str(EXAMPLES), "examples/"))


async def test_the_examples_are_served(place, shown):
    async def show(*arguments):
        text = await place.kubectl(*arguments)
        shown.append(f"$ kubectl {' '.join(arguments)}\n{text}".rstrip() + "\n")

    site = list(yaml.safe_load_all((EXAMPLES / "edge-site" / "experts.yaml").read_text()))
    await show("apply", "-R", "-f", str(EXAMPLES))
    # Before anything that they point at is there.
    await place.until_expert("coder", Ready="False/ServiceNotFound")
    await place.until_policy("assistant", Ready="False/NoReadyEndpoints")
    await show("get", "llmexperts,routingpolicies")
    await show("describe", "routingpolicy", "assistant")

    # Engines: those of the site take the places of its boards.
    host = f"127.{random.randint(1, 250)}.{random.randint(0, 250)}.5"
    coder = await place.engine("qwen2.5-coder-7b-instruct")
    await place.engine("llama-3.1-8b-instruct", host=host, port=8000)
    models = [expert["spec"]["model"] for expert in site]
    boards = dict(zip(models, await place.engines(*models), strict=True))
    await place.apply(
        place.service("coder", port=8000), place.slice("coder", {coder.address: True})
    )
    await place.pod("generalist", ip=host, labels={"app.kubernetes.io/name": "generalist"})
    for expert in site:
        patch = {"spec": {"backend": {"addresses": [boards[expert["spec"]["model"]].address]}}}
        await place.patch("llmexperts", expert["metadata"]["name"], patch)
    for name in ("auto", "assistant"):
        await place.until_policy(
            name, Ready="True/Serving", Programmed="True", ModelLoaded="True/Loaded"
        )
    for name in ("coder", "generalist", *(one["metadata"]["name"] for one in site)):
        await place.until_expert(name, Ready="True", Reachable="True", ModelServed="True")

    await show(
        *("wait", "--for=condition=Ready", "llmexperts,routingpolicies", "--all"),
        "--timeout=10s",
    )

    def say(text):
        return [{"role": "user", "content": text}]

    status, _, answer = await place.ask(model="assistant", messages=say("python function, please"))
    assert (status, answer["model"]) == (200, "qwen2.5-coder-7b-instruct")
    status, _, answer = await place.ask(model="assistant", messages=say("Why is the sky blue?"))
    assert (status, answer["model"]) == (200, "llama-3.1-8b-instruct")
    status, _, answer = await place.ask(model="auto", messages=say("Why is the sky blue?"))
    assert status == 200
    assert answer["model"] in models

    averages = "--for=jsonpath={.status.averageQos}"
    await place.kubectl("wait", averages, "routingpolicies", "--all", "--timeout=30s")
    await show("get", "llmexperts,routingpolicies")
    await show("get", "llmexperts,routingpolicies", "-o", "wide")
    await show("describe", "llmexpert", "coder")
    await show("describe", "routingpolicy", "assistant")
