"""Settings, rendering, and Envoy as a child process."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pydantic
import pytest
import yaml

from pointsman_policy.envoy import (
    EnvoySettings,
    EnvoyStartError,
    envoy_binary,
    render_bootstrap,
    running_envoy,
)

ANY_PORT = {"listen_port": 0, "admin_port": 0}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9002", {"socket_address": {"address": "127.0.0.1", "port_value": 9002}}),
        ("unix:///run/p.sock", {"pipe": {"path": "/run/p.sock"}}),
        ("[::1]:5", {"socket_address": {"address": "::1", "port_value": 5}}),
    ],
)
def test_the_policy_server_has_one_address(text, address):
    bootstrap = yaml.safe_load(render_bootstrap(EnvoySettings(policy_server_address=text)))
    clusters = bootstrap["static_resources"]["clusters"]
    (cluster,) = (c for c in clusters if c["name"] == "policy_server")
    assert cluster["load_assignment"]["endpoints"] == [
        {"lb_endpoints": [{"endpoint": {"address": address}}]}
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy_server_address": "localhost:9002"},
        {"policy_server_address": "127.0.0.1"},
        {"policy_server_address": "127.0.0.1:99999"},
        {"policy_server_address": "unix://relative"},
        {"policy_server_address": "127.0.0.1:9002,127.0.0.1:9003"},
        {"policy_server_address": "unix:///a.sock,unix:///b.sock"},
        {"request_body_limit_bytes": (32 << 20) + 1},
        {"inference_paths": ()},
        {"inference_paths": ('/v1"',)},
        {"retries": -1},
        {"unknown": 1},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(pydantic.ValidationError):
        EnvoySettings(**wrong)


@pytest.mark.parametrize(
    "settings",
    [
        EnvoySettings(),
        EnvoySettings(policy_server_address="unix:///tmp/p.sock", fail_open=False),
        EnvoySettings(policy_server_address="[::1]:9002", request_body_limit_bytes=32 << 20),
        EnvoySettings(node_id='"} {{ x }} é', health_service="a b", inference_paths=("/a", "/b")),
    ],
    ids=["defaults", "socket", "longest bodies", "odd texts"],
)
async def test_envoy_accepts_the_bootstrap(settings, tmp_path):
    path = tmp_path / "bootstrap.yaml"
    path.write_text(render_bootstrap(settings))
    process = await asyncio.create_subprocess_exec(
        *(str(envoy_binary()), "--mode", "validate", "--log-level", "warning", "-c", str(path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    # No deprecated field and no risky default that Envoy knows of.
    assert b"[warning]" not in output, output.decode()


async def test_a_port_in_use_is_reported_with_the_log(tmp_path):
    settings = EnvoySettings(**ANY_PORT, policy_server_address="127.0.0.1:1")
    async with running_envoy(settings) as envoy:
        port = int(envoy.url.rpartition(":")[2])
        taken = settings.model_copy(update={"listen_port": port})
        with pytest.raises(EnvoyStartError, match="Address already in use"):
            async with running_envoy(taken, log_path=tmp_path / "log"):
                pass


async def test_the_process_ends_with_the_block():
    settings = EnvoySettings(**ANY_PORT, policy_server_address="127.0.0.1:1")
    async with running_envoy(settings) as envoy:
        assert envoy.process.returncode is None
        assert (await envoy.stats())["server.live"] == 1
    assert envoy.process.returncode is not None


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
async def test_a_killed_parent_takes_envoy_along(tmp_path):
    program = """
import asyncio
from pointsman_policy.envoy import EnvoySettings, running_envoy
async def main():
    settings = EnvoySettings(listen_port=0, admin_port=0, policy_server_address="127.0.0.1:1")
    async with running_envoy(settings) as envoy:
        print(envoy.process.pid, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # it leaves its files behind
    )
    pid = json.loads(await parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    await parent.communicate()
    async with asyncio.timeout(60):
        while _runs(pid):  # noqa: ASYNC110 - not our child, nothing to await
            await asyncio.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
