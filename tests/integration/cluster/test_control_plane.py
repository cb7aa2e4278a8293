"""The control plane that other tests stand on: real, private, and gone afterwards."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

import control_plane
from control_plane.cluster import ControlPlane

pytestmark = pytest.mark.integration

KILLED = """
import os, sys
from control_plane.cluster import control_plane
with control_plane() as plane:
    plane.ensure_controllers()
    print(plane.folder, *(d.process.pid for d in plane.daemons if d.running), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def plane(cluster):
    if not isinstance(cluster, ControlPlane):
        pytest.skip("needs a GPU")
    return cluster


def test_the_api_server_calls_itself_by_the_pinned_version(cluster):
    import yaml

    version = yaml.safe_load(cluster.kubectl("version", "-o", "yaml").stdout)
    assert version["serverVersion"]["gitVersion"] == version["clientVersion"]["gitVersion"]
