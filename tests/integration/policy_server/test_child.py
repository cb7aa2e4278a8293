"""Child processes end with their parent."""

import asyncio
import subprocess
import sys

import pytest

PARENT = """
import subprocess, sys
from pointsman_policy.child import ending_with_parent
subprocess.run(ending_with_parent([sys.executable, "-c", sys.argv[1]]))
"""
CHILD = "import signal; print('here', flush=True); signal.pause()"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
async def test_a_child_ends_with_a_parent_that_is_killed():
    # The parent hands its output down: end of file means that both are gone.
    command = (sys.executable, "-c", PARENT, CHILD)
    parent = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert await parent.stdout.readline() == b"here\n"
    parent.kill()
    assert await parent.stdout.read() == b""
    await parent.wait()
