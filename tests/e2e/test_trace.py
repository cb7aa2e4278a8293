"""A thousand requests at the times of a real trace: none is lost, nothing is left behind."""

import asyncio
import re
import time
from collections import Counter

import numpy as np

from pointsman_cli.demo.data import data_folder
from pointsman_cli.demo.options import WorkloadName
from pointsman_common.data_folder import TRACES
from pointsman_core.workload import DOMAINS, Arrivals, parse_arrivals, synthetic

REQUESTS = 1000
RATE = 50.0
"""Requests per second: ten times the trace's own pace, so that the test takes 20 s."""
MAX_TOKENS = 40
AT_ONCE = 100
"""Requests under way, far more than there are unless the machine is too busy for the trace's pace:
then it is slower, as an ever longer queue would only end in time-outs."""


def conv_arrivals() -> tuple[Arrivals, str]:
    """The Azure conv trace where the data is, else the synthetic generator's Poisson arrivals.

    And which of both it is.
    """
    folder = data_folder()
    trace = TRACES[WorkloadName.AZURE_CONV]
    if folder is None or not (folder / trace).is_file():
        means = {"any": dict.fromkeys(DOMAINS, 0.5)}
        return synthetic(requests=REQUESTS, rate=RATE, seed=0, means=means).arrivals, "synthetic"
    arrivals = parse_arrivals((folder / trace).read_text(), source=trace)
    return arrivals.window(start=0, requests=REQUESTS, rate=RATE), trace


async def test_a_thousand_requests_of_a_real_trace_lose_none(site, record_property):
    site.declare_policy(algorithm="LatencyQualityGreedy")
    site.write_manifests()
    await site.until_answered_by(set(site.addresses), why="LatencyQualityGreedy", any_of=True)
    arrivals, source = conv_arrivals()
    record_property("arrivals", source)
    places = asyncio.Semaphore(AT_ONCE)
    started = time.monotonic()

    async def one(i: int) -> tuple[int, int]:
        await asyncio.sleep(max(0.0, arrivals.seconds[i] + started - time.monotonic()))
        prompt = "word " * int(min(arrivals.input_tokens[i], 2000))
        wanted = int(min(arrivals.output_tokens[i], MAX_TOKENS))
        body = {
            "model": "auto",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": wanted,
            "ignore_eos": True,
            "stream": i % 2 == 0,
        }
        async with (
            places,
            site.session.post(f"{site.url}/v1/chat/completions", json=body) as response,
        ):
            text = await response.text()
        if i % 2:
            return response.status, wanted - (await response.json())["usage"]["completion_tokens"]
        tokens = len(re.findall(r'"content":"[^"]', text))
        return response.status, wanted - tokens if text.endswith("data: [DONE]\n\n") else wanted

    results = await asyncio.gather(*(one(i) for i in range(REQUESTS)))
    assert Counter(status for status, _ in results) == {200: REQUESTS}
    assert not np.count_nonzero([missing for _, missing in results]), "tokens were lost"
    await site.until_empty()
    outcomes = await site.metric("pointsman_completions_total")
    assert {key for key in outcomes if 'outcome="ok"' not in key} == set()
    assert sum(outcomes.values()) >= REQUESTS
    assert sum((await site.metric("pointsman_untracked_total")).values()) == 0
    assert sum((await site.metric("pointsman_fallbacks_total")).values()) == 0
