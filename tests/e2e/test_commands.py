"""Whole commands as people start them: what they print, what they leave behind."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import yaml

from pointsman_cli.demo.processes import children, free_port, wait_for_http
from pointsman_core.resources import Algorithm

POINTSMAN = (sys.executable, "-m", "pointsman_cli.main")
PATIENCE_S = 300.0
MARK = "POINTSMAN_TEST_RUN"
"""Environment variable by which all processes of one command are found, orphans too."""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

EXPERT = """
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {{name: coder, namespace: {namespace}}}
spec:
  model: coder-{namespace}
  backend: {{addresses: ["127.0.0.1:18001"]}}
  limits: {{contextTokens: 2048}}
  profile: {{memoryBandwidthGBps: 5000, peakTflops: 500, kvCacheGiB: 6}}
"""
POLICY = """
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {{name: auto, namespace: {namespace}}}
spec: {{models: [{model}]}}
"""


@dataclass(frozen=True)
class Done:
    """A command that came to its end."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Commands:
    """Runs commands in a folder of their own."""

    folder: Path
    mark: str

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *POINTSMAN,
            *arguments,
            cwd=self.folder,
            env=os.environ | {MARK: self.mark, "TMPDIR": str(self.folder), "COLUMNS": "200"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str) -> Done:
        process = await self.start(*arguments)
        async with asyncio.timeout(PATIENCE_S):
            stdout, stderr = await process.communicate()
        assert process.returncode is not None
        return Done(process.returncode, stdout.decode(), stderr.decode())

    def running(self) -> dict[int, str]:
        """Command line by process id of all that these commands started and that still runs."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"{MARK}={self.mark}".encode() in (
                    entry / "environ"
                ).read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        return found


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path, uuid.uuid4().hex)
    yield commands
    for pid in commands.running():  # only after a failure
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@linux_only
async def test_demo(commands):
    done = await commands.run(
        "demo", "--deciders", "Random", "--seconds", "1", "--rate", "2", "--json"
    )
    assert done.status == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {
        *("runs", "workload", "simulated", "simulated_experts", "warnings", "note"),
        *("model", "comparison", "level_with_best"),
    }
    (run,) = report["runs"]
    assert (run["decider"], run["requests"], run["failed"], run["rejected"]) == ("Random", 2, 0, 0)
    assert 0 <= run["average_qos"] <= 1
    assert sum(run["shares"].values()) == pytest.approx(1)
    assert sum(expert["requests"] for expert in run["experts"].values()) == 2
    assert run["in_flight_at_end"] == run["without_decision"] == 0
    assert report["workload"]["rate"] == 2
    assert len(report["simulated_experts"]) == 6
    output = commands.folder / "demo-output"
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "demo.json").read_text()) == report
    assert "Random" in done.stderr
    assert "Traceback" not in done.stderr
    assert commands.running() == {}


@linux_only
async def test_demo_beside_the_simulator_on_the_very_same_requests(commands):
    done = await commands.run(
        *("demo", "--deciders", "RoundRobin,Random,HanDrl", "--seconds", "2", "--rate", "6"),
        *("--workload", "synthetic", "--compare", "--json"),
    )
    assert done.status == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["model"]["sha256"]) == 64
    for run, compared in zip(report["runs"], report["comparison"], strict=True):
        simulated = compared["simulator"]
        assert (run["failed"], run["by_fallback"], simulated["failed"]) == (0, 0, 0)
        assert run["decider"] == compared["decider"] == simulated["decider"]
        if run["decider"] == "HanDrl":
            continue  # what it chooses depends on how far answers have come
        assert compared["same_expert"] == 1
        for expert, share in run["experts"].items():
            alike = simulated["experts"][expert]
            assert alike["output_tokens"] == share["output_tokens"]
            assert alike["mean_quality"] == share["mean_quality"]


@linux_only
async def test_demo_of_nested_manifests_with_one_expert_name_in_two_namespaces(commands):
    for namespace, model in (("east", "other"), ("west", "auto")):
        folder = commands.folder / "site" / namespace
        folder.mkdir(parents=True)
        expert = EXPERT.format(namespace=namespace)
        (folder / "site.yml").write_text(
            f"{expert}---{POLICY.format(namespace=namespace, model=model)}"
        )
    done = await commands.run(
        *("demo", "--deciders", "Random", "--seconds", "1", "--rate", "2", "--json"),
        *("--manifests", "site", "--workload", "synthetic"),
    )
    assert done.status == 0, done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert (run["failed"], run["experts"]["coder"]["requests"]) == (0, 2)


@linux_only
async def test_demo_shows_the_log_of_an_engine_that_does_not_come_up(commands):
    expert = EXPERT.format(namespace="default")
    # Valid as a manifest, but too short for an engine.
    other = expert.replace("name: coder", "name: other").replace("Tokens: 2048", "Tokens: 1")
    policy = POLICY.format(namespace="default", model="auto")
    (commands.folder / "site.yaml").write_text(f"{expert}---{other}---{policy}")
    done = await commands.run("demo", "--manifests", "site.yaml", "--workload", "synthetic")
    assert done.status == 1
    assert done.stdout == ""
    assert "error: engine other ended with status 2; end of demo-output/logs/" in done.stderr
    assert "at least 2 tokens" in done.stderr
    assert "Traceback" not in done.stderr
    assert commands.running() == {}


async def test_bench_decide(commands):
    done = await commands.run("bench", "decide", "--requests", "20", "--json")
    assert (done.status, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert [run["decider"] for run in report["runs"]] == list(Algorithm)
    assert {(run["endpoints"], run["in_flight"], run["count"]) for run in report["runs"]} == {
        (16, 256, 20)
    }
    assert report["setting"]["requests_per_run"] == 20


@linux_only
async def test_bench_ext_proc(commands):
    done = await commands.run(
        "bench", "ext-proc", "--requests", "20", "--concurrency", "1,2", "--json"
    )
    assert (done.status, done.stderr) == (0, "")
    runs = json.loads(done.stdout)["runs"]
    assert [(run["decider"], run["concurrency"], run["followed"]) for run in runs] == [
        (algorithm, clients, followed)
        for algorithm in Algorithm
        for clients in (1, 2)
        for followed in (False, True)
    ]
    assert all(0 < run["p50_ms"] <= run["p99_ms"] and run["count"] == 20 for run in runs)
    assert commands.running() == {}


@linux_only
async def test_bench_ext_proc_takes_its_server_along_when_it_is_killed(commands):
    bench = await commands.start("bench", "ext-proc", "--requests", "1000000")
    server = await _eventually(
        lambda: next((pid for pid, line in commands.running().items() if "policy.sock" in line), 0)
    )
    ended = await _watch(server)
    bench.kill()
    await bench.communicate()
    async with asyncio.timeout(PATIENCE_S):
        await ended
    assert commands.running() == {}


async def _eventually(look: Callable[[], int]) -> int:
    async with asyncio.timeout(PATIENCE_S):
        while not (found := look()):  # noqa: ASYNC110 - nobody tells when a process appears
            await asyncio.sleep(0.02)
    return found


async def _watch(pid: int) -> Awaitable[None]:
    """Something to wait for until a process ends that is not this one's child."""
    descriptor = os.pidfd_open(pid)
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        ended.set_result(None)

    loop.add_reader(descriptor, tell)
    return ended


async def test_envoy_prints_its_configuration(commands):
    done = await commands.run("envoy", "--listen", "127.0.0.1:18080", "--print-config")
    assert (done.status, done.stderr) == (0, "")
    config = yaml.safe_load(done.stdout)
    (listener,) = config["static_resources"]["listeners"]
    assert listener["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 18080}
    assert config["admin"]["address"]["socket_address"]["port_value"] == 9901


async def test_envoy_takes_retries_and_the_time_limit_of_decisions(commands):
    options = ("--retries", "5", "--message-timeout", "2.5")
    done = await commands.run("envoy", *options, "--print-config")
    assert (done.status, done.stderr) == (0, "")
    assert "num_retries: 5\n" in done.stdout
    assert "message_timeout: 2.5s\n" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "want"),
    [
        ("--retries", "11", "less than or equal to 10"),
        ("--retries", "-1", "greater than or equal to 0"),
        ("--message-timeout", "0", "greater than or equal to 0.001"),
        ("--message-timeout", "601", "less than or equal to 600"),
        ("--message-timeout", "nan", "less than or equal to 600"),
    ],
)
async def test_envoy_tells_what_is_out_of_range(commands, option, value, want):
    done = await commands.run("envoy", option, value, "--print-config")
    assert (done.status, done.stdout) == (2, "")
    assert f"Invalid value for '{option}': Input should be {want}" in done.stderr


@pytest.mark.parametrize("option", ["--listen", "--admin"])
async def test_envoy_refuses_to_listen_where_it_cannot(commands, option):
    done = await commands.run("envoy", option, "unix:///run/x.sock", "--print-config")
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr == f"{option} /run/x.sock: write ip:port; Envoy listens on nothing else\n"


async def test_envoy_serves_until_sigterm(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    listen, admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
    command = [*POINTSMAN, "envoy", "--listen", listen, "--admin", admin]
    async with children() as started, aiohttp.ClientSession() as session:
        envoy = await started.start(
            "Envoy",
            [*command, "--policy-server", f"unix://{tmp_path}/nobody.sock"],
            log_path=tmp_path / "envoy.log",
        )
        await wait_for_http(session, envoy, f"http://{admin}/ready")
        body = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}
        async with session.post(f"http://{listen}/v1/chat/completions", json=body) as response:
            # Fail-open, with no engine known.
            assert response.status == 503
        envoy.process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            assert await envoy.process.wait() == 0
