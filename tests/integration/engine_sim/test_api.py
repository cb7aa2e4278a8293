"""A real OpenAI client against a real HTTP server."""

import asyncio

import openai
import pytest

from pointsman_engine_sim.settings import Faults

MESSAGES = [{"role": "user", "content": "Why is the sky blue? " * 4}]
EXACT = {"ignore_eos": True}


class TestChat:
    async def test_whole_answer(self, engine):
        answer = await engine.openai.chat.completions.create(model="tiny", messages=MESSAGES)
        (choice,) = answer.choices
        assert choice.message.content.startswith("Simulated answer of tiny: ")
        assert choice.finish_reason == "stop"
        assert answer.usage.prompt_tokens == 21
        assert answer.usage.completion_tokens == len(choice.message.content.split(" "))
        assert answer.usage.total_tokens == 21 + answer.usage.completion_tokens
        assert answer.model == "tiny"

    async def test_streamed_answer_is_the_same(self, engine):
        whole = await engine.openai.chat.completions.create(model="tiny", messages=MESSAGES)
        stream = await engine.openai.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        first, *tokens, usage = [chunk async for chunk in stream]
        assert first.choices[0].delta.role == "assistant"
        assert len(tokens) == whole.usage.completion_tokens
        text = "".join(chunk.choices[0].delta.content for chunk in tokens)
        assert text == whole.choices[0].message.content
        reasons = [chunk.choices[0].finish_reason for chunk in tokens]
        assert reasons == [None] * (len(tokens) - 1) + ["stop"]
        assert usage.choices == []
        assert usage.usage == whole.usage

    async def test_stream_has_no_usage_unless_asked(self, engine):
        stream = await engine.openai.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert all(chunk.choices and chunk.usage is None for chunk in chunks)

    async def test_limit_cuts_the_answer(self, engine):
        answer = await engine.openai.chat.completions.create(
            model="tiny", messages=MESSAGES, max_completion_tokens=2
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 2

    @pytest.mark.parametrize("tokens", [1, 60])
    async def test_exact_length(self, engine, tokens):
        answer = await engine.openai.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=tokens, extra_body=EXACT
        )
        assert answer.usage.completion_tokens == tokens
        assert answer.choices[0].finish_reason == "length"

    async def test_shortest_length(self, engine):
        answer = await engine.openai.chat.completions.create(
            model="tiny", messages=MESSAGES, extra_body={"min_tokens": 300}
        )
        assert answer.usage.completion_tokens == 300
        assert answer.choices[0].finish_reason == "stop"

    @pytest.mark.parametrize("stop", [" of", "d answer o", "answer of tiny"])
    async def test_ends_before_a_text_of_stop(self, engine, stop):
        asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "stop": [stop, "none"]}
        whole = await engine.openai.chat.completions.create(**asked)
        text = whole.choices[0].message.content
        assert text == "Simulated answer of tiny:".partition(stop)[0]
        assert whole.choices[0].finish_reason == "stop"
        stream = await engine.openai.chat.completions.create(**asked, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert len(chunks) == 1 + whole.usage.completion_tokens

    async def test_many_at_once_are_batched(self, engine):
        answers = await asyncio.gather(
            *(
                engine.openai.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=50, extra_body=EXACT
                )
                for _ in range(16)
            )
        )
        assert [answer.usage.completion_tokens for answer in answers] == [50] * 16
        assert await engine.metric("vllm:generation_tokens_total") == 16 * 50
        assert await engine.metric("vllm:iteration_tokens_total_count") < 16 * 50


class TestCompletions:
    async def test_whole_answer(self, engine):
        answer = await engine.openai.completions.create(
            model="tiny", prompt=[1] * 30, max_tokens=9, extra_body=EXACT
        )
        assert answer.choices[0].text.startswith("Simulated answer of tiny: ")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (30, 9)

    async def test_streamed_answer(self, engine):
        stream = await engine.openai.completions.create(
            model="tiny", prompt="hello", max_tokens=9, stream=True, extra_body=EXACT
        )
        chunks = [chunk async for chunk in stream]
        assert len(chunks) == 9
        assert chunks[-1].choices[0].finish_reason == "length"


class TestModels:
    async def test_all_names_are_listed(self, start):
        engine = await start(aliases=("auto",), context_tokens=4096)
        models = [model async for model in engine.openai.models.list()]
        assert [model.id for model in models] == ["tiny", "auto"]
        assert {model.max_model_len for model in models} == {4096}

    async def test_alias_is_answered_under_the_served_name(self, start):
        engine = await start(aliases=("auto",))
        answer = await engine.openai.chat.completions.create(model="auto", messages=MESSAGES)
        assert answer.model == "tiny"

    async def test_unknown_model(self, engine):
        with pytest.raises(openai.NotFoundError) as caught:
            await engine.openai.chat.completions.create(model="other", messages=MESSAGES)
        assert caught.value.body == {
            "message": "The model `other` does not exist.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }


class TestErrors:
    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "tiny"}'])
    async def test_malformed_body(self, engine, path, body):
        async with engine.http.post(path, data=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]["type"] == "BadRequestError"

    async def test_prompt_over_the_context(self, start):
        engine = await start(context_tokens=64)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 64 tokens"):
            await engine.openai.completions.create(model="tiny", prompt=[1] * 64)

    async def test_answer_over_the_context(self, start):
        engine = await start(context_tokens=64)
        with pytest.raises(openai.BadRequestError, match="60 > 64 - 10"):
            await engine.openai.completions.create(model="tiny", prompt=[1] * 10, max_tokens=60)

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [("GET", "/v1/chat/completions", 405), ("POST", "/v1/embeddings", 404)],
    )
    async def test_unknown_path_or_method(self, engine, method, path, status):
        async with engine.http.request(method, path) as response:
            assert response.status == status
            assert (await response.json())["error"]["code"] == status


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/nowhere"])
async def test_every_response_says_that_it_is_simulated(engine, path):
    async with engine.http.get(path) as response:
        assert response.headers["x-simulated-engine"] == "true"


async def test_request_id_is_taken_over(engine):
    answer = await engine.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, extra_headers={"x-request-id": "abc"}
    )
    assert answer.id == "chatcmpl-abc"


async def test_metrics_have_the_names_of_vllm(engine):
    await engine.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
    labels = {"engine": "0", "model_name": "tiny"}
    for name, value in {
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:kv_cache_usage_perc": 0,
        "vllm:prompt_tokens_total": 21,
        "vllm:generation_tokens_total": 2,
        "vllm:num_preemptions_total": 0,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:inter_token_latency_seconds_count": 1,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:iteration_tokens_total_count": 2,
        "vllm:iteration_tokens_total_sum": 22,
    }.items():
        assert await engine.metric(name, **labels) == value, name
    success = "vllm:request_success_total"
    assert await engine.metric(success, finished_reason="length", **labels) == 1
    info = {"block_size": "16", "num_gpu_blocks": "4096", "kv_cache_size_tokens": "65536"}
    assert await engine.metric("vllm:cache_config_info", engine="0", **info) == 1


class TestDisconnect:
    async def _until_aborted(self, engine, count):
        async with asyncio.timeout(30):
            while (
                await engine.metric("vllm:request_success_total", finished_reason="abort") != count
            ):
                pass
        assert await engine.metric("vllm:num_requests_running") == 0
        assert await engine.metric("vllm:kv_cache_usage_perc") == 0

    async def test_of_a_stream_frees_its_place(self, start):
        engine = await start(context_tokens=65536)
        stream = await engine.openai.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=60_000, stream=True, extra_body=EXACT
        )
        await anext(stream)
        assert await engine.metric("vllm:num_requests_running") == 1
        assert await engine.metric("vllm:kv_cache_usage_perc") > 0
        await stream.close()
        await self._until_aborted(engine, 1)

    async def test_while_waiting_for_a_whole_answer(self, start):
        engine = await start(context_tokens=65536)
        request = asyncio.create_task(
            engine.openai.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=60_000, extra_body=EXACT
            )
        )
        async with asyncio.timeout(30):
            while await engine.metric("vllm:num_requests_running") == 0:
                pass
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await self._until_aborted(engine, 1)


class TestFaults:
    async def test_connection_drops_in_mid_stream(self, start):
        engine = await start(faults=Faults(fail_after_tokens=3))
        stream = await engine.openai.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=50, stream=True, extra_body=EXACT
        )
        for _ in range(1 + 3):
            await anext(stream)
        with pytest.raises(openai.APIConnectionError):
            await anext(stream)
        async with asyncio.timeout(30):
            while await engine.metric("vllm:num_requests_running"):
                pass

    @pytest.mark.parametrize("after", [0, 3])
    async def test_connection_drops_before_a_whole_answer(self, start, after):
        engine = await start(faults=Faults(fail_after_tokens=after))
        with pytest.raises(openai.APIConnectionError):
            await engine.openai.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=50, extra_body=EXACT
            )

    async def test_short_answers_get_through(self, start):
        engine = await start(faults=Faults(fail_after_tokens=3))
        answer = await engine.openai.completions.create(
            model="tiny", prompt="x", max_tokens=3, extra_body=EXACT
        )
        assert answer.usage.completion_tokens == 3

    async def test_all_requests_fail(self, start):
        engine = await start(faults=Faults(error_rate=1.0))
        with pytest.raises(openai.InternalServerError, match="Simulated engine error"):
            await engine.openai.chat.completions.create(model="tiny", messages=MESSAGES)
        reason = {"finished_reason": "error"}
        assert await engine.metric("vllm:request_success_total", **reason) == 1

    async def test_some_requests_fail_the_same_ones_each_time(self, start):
        outcomes = []
        for _ in range(2):
            engine = await start(faults=Faults(error_rate=0.5), seed=7)
            codes = []
            for _ in range(12):
                body = {"prompt": "x", "max_tokens": 1}
                async with engine.http.post("/v1/completions", json=body) as response:
                    codes.append(response.status)
            outcomes.append(codes)
        assert outcomes[0] == outcomes[1]
        assert set(outcomes[0]) == {200, 500}

    async def test_stalled_engine_is_healthy_but_silent(self, start):
        engine = await start(faults=Faults(stall=True))
        with pytest.raises(openai.APITimeoutError):
            await engine.openai.chat.completions.create(
                model="tiny", messages=MESSAGES, timeout=0.2
            )
        async with engine.http.get("/health") as response:
            assert response.status == 200
