"""``pointsman evaluate`` as people start it: as a process of its own, with workers."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "pointsman_cli.main", "evaluate")
PATIENCE_S = 300.0


@asynccontextmanager
async def evaluating(folder: Path, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    (folder / "no-data").mkdir()
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "--output-dir", str(folder / "out"), "--workloads", "poisson,on-off"),
        *("--jobs", "2", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "POINTSMAN_DATA": str(folder / "no-data")},
        cwd=folder,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def test_synthetic_evaluation_by_two_processes(tmp_path: Path) -> None:
    options = ("--requests", "100", "--seeds", "2", "--deciders", "Random,ImpactGreedy", "--json")
    async with evaluating(tmp_path, *options) as process:
        stdout, stderr = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 0, stderr.decode()
    document = json.loads(stdout)
    assert len(document["runs"]) == 2 * 2 * 2 * 2
    mean = {row["decider"]: row["average_qos"] for row in document["summary"]}
    assert mean["ImpactGreedy"] > mean["Random"]
    assert (tmp_path / "out" / "runs.parquet").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_evaluation_leaves_no_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with evaluating(tmp_path, "--seeds", "5000") as process:
        assert process.stderr is not None
        line = await asyncio.wait_for(process.stderr.readline(), PATIENCE_S)
        assert b"runs of" in line
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        # Ends when nobody holds the other end any more: neither the command nor a worker.
        _, stderr = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 130, stderr.decode()
    assert "interrupted:" in stderr.decode()
    assert "Traceback" not in stderr.decode()
