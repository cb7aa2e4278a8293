"""Child processes that do not outlive their parent, however it ends."""

import os
import sys
from collections.abc import Sequence

# Becomes the command after asking the kernel to end it together with its parent. A
# preexec_fn would run Python in a fork of a process with threads (gRPC has some), which
# can lock up.
_TIED = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGTERM
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """The same command, which gets SIGTERM when the thread that starts it ends (Linux only).

    ``command[0]`` is an absolute path.
    """
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]
