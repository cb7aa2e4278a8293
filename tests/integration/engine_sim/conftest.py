from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman_core.cost import CostModel
from pointsman_engine_sim.server import running
from pointsman_engine_sim.settings import EngineSettings

FAST = CostModel(
    overhead_s=0.0005,
    compute_s_per_token=1e-6,
    weights_s=0.0005,
    context_s_per_token=1e-9,
    kv_capacity_tokens=65536,
    max_sequences=8,
    max_batched_tokens=512,
)


@dataclass
class Running:
    """An engine that runs in the test's own event loop, and clients for it."""

    url: str
    openai: openai.AsyncOpenAI
    http: aiohttp.ClientSession

    async def metric(self, name: str, **labels: str) -> float:
        async with self.http.get("/metrics") as response:
            page = await response.text()
        (value,) = (
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )
        return value


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start engines by `await start(**settings)`; they stop with the test."""
    async with AsyncExitStack() as stack:

        async def start_one(**settings: Any) -> Running:
            defaults = {"model": "tiny", "cost": FAST, "expected_output_tokens": 20}
            url = await stack.enter_async_context(running(EngineSettings(**(defaults | settings))))
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            await stack.enter_async_context(client)
            session = await stack.enter_async_context(aiohttp.ClientSession(url))
            return Running(url=url, openai=client, http=session)

        yield start_one


@pytest.fixture
async def engine(start: Start) -> Running:
    return await start()
