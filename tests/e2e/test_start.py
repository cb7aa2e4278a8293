"""Starting with something wrong: a clear message and a status, never a traceback."""

import json
import socket
import subprocess
import sys

import pytest

SERVER = (sys.executable, "-m", "pointsman_cli.main", "policy-server")
BROKEN = """
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: a}
spec: {model: m, backend: {addresses: ["nohost:80"]}}
---
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {name: auto}
spec: {models: [auto], qos: {latencyPerTokenMs: 0}}
"""


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SERVER, *flags], capture_output=True, text=True, timeout=150, check=False
    )


def test_wrong_manifests_are_all_told_with_line_and_field(tmp_path):
    (tmp_path / "site.yaml").write_text(BROKEN)
    done = run("--manifests", str(tmp_path), "--http-address", "127.0.0.1:0")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "site.yaml" in line]
    assert len(lines) == 2
    assert "site.yaml:5 LLMExpert default/a spec.backend.addresses[0]: " in lines[0]
    assert "site.yaml:10 RoutingPolicy default/auto spec.qos.latencyPerTokenMs: " in lines[1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--http-address", "here"), "'here' is neither ip:port nor unix:///path"),
        (("--log-level", "loud"), "unknown log level 'loud'"),
        (("--log-format", "xml"), "unknown log format 'xml'"),
        (("--grpc-address", "198.51.100.1:1"), "--grpc-address: cannot listen on 198.51.100.1:1: "),
        (
            ("--http-address", "unix:///missing/x.sock"),
            "--http-address: cannot listen on unix:///missing/x.sock: no such file or directory\n",
        ),
    ],
)
def test_wrong_options_are_told(tmp_path, flags, message):
    (tmp_path / "site.yaml").write_text(BROKEN)
    done = run("--manifests", str(tmp_path), "--http-address", "127.0.0.1:0", *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--grpc-address", "--http-address", "--control-address"])
def test_an_address_that_is_taken_is_told_with_its_option(tmp_path, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        own = {"--grpc-address": f"unix://{tmp_path}/p.sock", "--http-address": "127.0.0.1:0"}
        flags = [word for pair in (own | {option: address}).items() for word in pair]
        done = run("--snapshots", str(tmp_path / "snapshots"), *flags)
    assert done.returncode == 1
    assert f"{option}: cannot listen on {address}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_folder_of_models_is_told(tmp_path):
    missing = tmp_path / "models"
    (tmp_path / "site.yaml").write_text(BROKEN)
    done = run(
        *("--manifests", str(tmp_path), "--http-address", "127.0.0.1:0"),
        *("--grpc-address", f"unix://{tmp_path}/p.sock", "--models", str(missing)),
    )
    (line,) = [
        line for line in done.stdout.splitlines() + done.stderr.splitlines() if "models" in line
    ]
    assert json.loads(line)["level"] == "warning"
    assert json.loads(line)["path"] == str(missing)
