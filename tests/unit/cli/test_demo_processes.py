import asyncio
import os
import signal
import sys

import aiohttp
import pytest

from pointsman_cli.demo import processes
from pointsman_cli.demo.errors import DemoError
from pointsman_cli.demo.processes import children, first_line, free_port, wait_for_http

ANNOUNCE_AND_WAIT = 'import time; print(\'{"url": "http://x"}\', flush=True); time.sleep(600)'


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


@pytest.fixture
def log_path(tmp_path):
    return tmp_path / "child.log"


async def test_children_end_with_the_block(log_path):
    async with children() as started:
        child = await started.start(
            "it", python(ANNOUNCE_AND_WAIT), log_path=log_path, read_output=True
        )
        assert await first_line(child) == {"url": "http://x"}
        assert started.ended() == []
    assert child.process.returncode == -signal.SIGTERM
    assert started.ended() == [f"it ended with status -{signal.SIGTERM}"]


async def test_children_that_ignore_sigterm_are_killed(log_path, monkeypatch):
    monkeypatch.setattr(processes, "STOP_TIMEOUT_S", 0.05)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ANNOUNCE_AND_WAIT
    async with children() as started:
        child = await started.start("it", python(code), log_path=log_path, read_output=True)
        await first_line(child)
    assert child.process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="Linux' PR_SET_PDEATHSIG")
async def test_children_end_when_their_parent_is_killed(tmp_path):
    code = """
import asyncio, pathlib, sys
from pointsman_cli.demo.processes import children, first_line

async def main():
    async with children() as started:
        child = await started.start(
            "it", sys.argv[1:], log_path=pathlib.Path("child.log"), read_output=True
        )
        await first_line(child)
        print(child.process.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        *python(code, *python(ANNOUNCE_AND_WAIT)), stdout=asyncio.subprocess.PIPE, cwd=tmp_path
    )
    pid = int(await parent.stdout.readline())
    os.kill(pid, 0)
    child = os.pidfd_open(pid)
    try:
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(child, gone.set)
        parent.kill()
        await parent.wait()
        await gone.wait()
    finally:
        asyncio.get_running_loop().remove_reader(child)
        os.close(child)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('no such card', file=sys.stderr); sys.exit(3)", "no such card"),
        ("import sys; sys.exit(3)", "it ended with status 3"),
        ("print([1])", r"it printed b'\[1\]"),
    ],
)
async def test_a_child_that_does_not_start_shows_its_log(log_path, code, message):
    async with children() as started:
        child = await started.start("it", python(code), log_path=log_path, read_output=True)
        with pytest.raises(DemoError, match=message):
            await first_line(child)


async def test_waits_for_http(log_path):
    port = free_port()
    async with children() as started, aiohttp.ClientSession() as session:
        command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
        child = await started.start("it", command, log_path=log_path)
        await wait_for_http(session, child, f"http://127.0.0.1:{port}/")


async def test_a_server_that_ends_is_not_waited_for(log_path):
    async with children() as started, aiohttp.ClientSession() as session:
        child = await started.start("it", python("print('oops'); exit(1)"), log_path=log_path)
        with pytest.raises(DemoError, match=r"it ended with status 1; end of .*\noops"):
            await wait_for_http(session, child, f"http://127.0.0.1:{free_port()}/")


async def test_a_silent_server_is_given_up(log_path, monkeypatch):
    monkeypatch.setattr(processes, "START_TIMEOUT_S", 0.05)
    async with children() as started, aiohttp.ClientSession() as session:
        child = await started.start("it", python(ANNOUNCE_AND_WAIT), log_path=log_path)
        with pytest.raises(DemoError, match="it was not ready within"):
            await wait_for_http(session, child, f"http://127.0.0.1:{free_port()}/")
