"""The command as its own process: start, stop, and what it refuses."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

COMMAND = (
    sys.executable,
    "-c",
    "import typer; from pointsman_engine_sim.cli import engine_sim; typer.run(engine_sim)",
)
EXPERT = """
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: coder}
spec:
  model: coder-7b
  aliases: [auto]
  backend: {addresses: ["127.0.0.1:8001"]}
  limits: {contextTokens: 2048}
"""
QUICK = ("--model", "tiny", "--parameters-billions", "0.01", "--iteration-overhead-ms", "1")

Started = tuple[asyncio.subprocess.Process, dict[str, Any]]


@pytest.fixture
async def launch() -> AsyncIterator[Callable[..., Awaitable[Started]]]:
    """Start the command; gives the process and the line that it printed."""
    async with AsyncExitStack() as stack:

        async def launch_one(*arguments: str) -> Started:
            process = await asyncio.create_subprocess_exec(
                *COMMAND, *arguments, stdout=subprocess.PIPE
            )
            stack.push_async_callback(_kill, process)
            return process, json.loads(await process.stdout.readline())

        yield launch_one


async def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.communicate()


def refused(*arguments: str, code: int = 2) -> str:
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, env=_plain_env()
    )
    assert done.returncode == code
    return " ".join(done.stderr.replace("│", " ").split())


def _plain_env() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}


async def models(url: str) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
        return (await response.json())["data"]


async def test_it_says_where_it_listens(launch):
    _, line = await launch(*QUICK, "--alias", "auto", "--context-tokens", "1024")
    assert line == {"url": line["url"], "model": "tiny", "simulated": True}
    names = {model["id"]: model["max_model_len"] for model in await models(line["url"])}
    assert names == {"tiny": 1024, "auto": 1024}


@pytest.mark.parametrize("folder", [False, True])
async def test_it_reads_an_expert(launch, tmp_path, folder):
    path = tmp_path / "experts.yaml"
    path.write_text(EXPERT)
    target = tmp_path if folder else path
    _, line = await launch("--manifests", str(target), "--expert", "coder")
    assert line["model"] == "coder-7b"
    names = {model["id"]: model["max_model_len"] for model in await models(line["url"])}
    assert names == {"coder-7b": 2048, "auto": 2048}


async def test_it_finds_experts_of_one_name_below_a_folder_by_namespace(launch, tmp_path):
    for namespace in ("east", "west"):
        (tmp_path / "sites" / namespace).mkdir(parents=True)
        text = EXPERT.replace("name: coder", f"name: coder, namespace: {namespace}")
        text = text.replace("coder-7b", f"coder-{namespace}")
        (tmp_path / "sites" / namespace / "experts.yml").write_text(text)
    # As in a mounted ConfigMap, which has every file twice.
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "experts.yaml").write_text(text)
    _, line = await launch("--manifests", str(tmp_path), "--expert", "west/coder")
    assert line["model"] == "coder-west"
    message = await asyncio.to_thread(refused, "--manifests", str(tmp_path), "--expert", "coder")
    assert "'coder' names 2 experts, give namespace/name: LLMExpert/east/coder in" in message


async def _read_after(response: aiohttp.ClientResponse, then: Callable[[], None]) -> str:
    """Read a stream to its end, doing something after its first bytes."""
    text = (await response.content.readany()).decode()
    then()
    return text + (await response.read()).decode()


BODY = {"prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}


async def test_running_requests_are_finished_at_sigterm(launch):
    process, line = await launch(*QUICK)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{line['url']}/v1/completions", json=BODY) as response,
    ):
        text = await _read_after(response, process.terminate)
    assert text.endswith("data: [DONE]\n\n")
    assert text.count('"text"') == 300
    assert await process.wait() == 0


async def test_requests_that_never_end_do_not_keep_it_alive(launch):
    process, line = await launch(*QUICK, "--stall")
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(session.post(f"{line['url']}/v1/completions", json=BODY))
        await models(line["url"])  # answered later than the other request was accepted
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
        (error,) = await asyncio.gather(request, return_exceptions=True)
        assert isinstance(error, aiohttp.ClientError)


async def test_taken_port_is_reported(launch):
    _, line = await launch(*QUICK)
    port = line["url"].rpartition(":")[2]
    message = await asyncio.to_thread(refused, *QUICK, "--port", port, code=1)
    assert message.startswith("engine-sim: ")
    assert port in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --manifests and --expert, or --model"),
        (("--model", "tiny", "--expert", "x"), "either --manifests and --expert, or --model"),
        (("--manifests", __file__), "--manifests goes with --expert"),
        (("--manifests", __file__, "--expert", "x", "--peak-tflops", "1"), "goes with --expert"),
        (("--manifests", "missing.yaml", "--expert", "x"), "missing.yaml"),
        (("--model", "tiny", "--peak-tflops", "-1"), "peak_tflops: Input should be greater"),
        (("--model", "tiny", "--kv-cache-gib", "0.01"), "KV cache cannot hold"),
        (("--model", "tiny", "--context-tokens", "1"), "at least 2 tokens"),
        (("--model", "tiny", "--error-rate", "2"), "--error-rate"),
        (("--model", "tiny", "--port", "99999"), "--port"),
    ],
)
def test_wrong_flags_are_explained(arguments, message):
    assert message in refused(*arguments)


def test_missing_expert_and_broken_manifest_are_explained(tmp_path):
    path = tmp_path / "experts.yaml"
    path.write_text(EXPERT)
    assert "no LLMExpert named 'other'" in refused("--manifests", str(path), "--expert", "other")
    path.write_text(EXPERT.replace("model: coder-7b", "modle: coder-7b"))
    assert "modle" in refused("--manifests", str(path), "--expert", "coder")
    path.write_bytes(b"\xff")
    assert "is not UTF-8" in refused("--manifests", str(path), "--expert", "coder")
