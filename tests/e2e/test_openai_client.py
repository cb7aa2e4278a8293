"""Any OpenAI client, without a change but the base URL."""

import openai
import pytest


async def test_a_whole_answer_keeps_usage_and_finish_reason(site):
    async with site.client as client:
        answer = await client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": "Hello there"}],
            max_tokens=12,
            extra_body={"ignore_eos": True},
        )
    assert answer.model in {"ant-model", "bee-model", "cow-model"}
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    await site.until_empty()


async def test_a_streamed_answer_keeps_usage_and_finish_reason(site):
    async with site.client as client:
        stream = await client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": "Hello there"}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert len(texts) == 12
    assert reasons[-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12
    await site.until_empty()
    tokens = await site.metric("pointsman_output_tokens_total")
    assert sum(tokens.values()) >= 12


async def test_completions_are_routed_as_well(site):
    async with site.client as client:
        answer = await client.completions.create(model="auto", prompt="Once upon", max_tokens=5)
    assert answer.model.endswith("-model")
    assert answer.usage.completion_tokens <= 5


async def test_models_are_the_policies_names(site):
    async with site.client as client:
        listed = [model.id async for model in client.models.list()]
        assert listed == ["auto"]
        assert (await client.models.retrieve("auto")).id == "auto"
        with pytest.raises(openai.NotFoundError, match="Available models: auto"):
            await client.models.retrieve("gpt-9")


async def test_errors_are_the_clients_own(site):
    async with site.client as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(
                model="nobody", messages=[{"role": "user", "content": "Hi"}]
            )
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    refusals = await site.metric("pointsman_refusals_total")
    assert refusals['code="model_not_found"'] == 1


async def test_headers_explain_the_decision_when_the_policy_asks(site):
    _, headers, document = await site.ask()
    assert headers["x-pointsman-policy"] == "default/auto"
    assert headers["x-pointsman-endpoint"] == site.addresses[headers["x-pointsman-expert"]]
    assert document["model"] == f"{headers['x-pointsman-expert']}-model"
    assert headers["x-pointsman-why"].startswith("LeastLoad: score")


async def test_headers_stay_away_when_the_policy_does_not_ask(site):
    site.declare_policy("quiet", explainHeaders=False)
    site.write_manifests()
    await site.until(lambda s: "default/quiet" in s["snapshots"], "the new policy in force")
    status, headers, _ = await site.ask(model="quiet")
    assert status == 200
    assert not [name for name in headers if name.startswith("x-pointsman")]
