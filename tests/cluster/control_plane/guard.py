"""Outlives a test run that is killed, ends what it left running and removes its folder.

Reads lines from its standard input: ``+PID`` for a process to look after, ``-PID`` when it
has ended. End of file means that the test run is gone. Runs without site packages.
"""

import os
import select
import shutil
import signal
import sys


def main() -> None:
    """``guard.py FOLDER``."""
    # By descriptor: a number may belong to a stranger by then.
    watched: dict[str, int] = {}
    for line in sys.stdin:
        sign, pid = line[0], line[1:].strip()
        if sign == "+":
            try:
                watched[pid] = os.pidfd_open(int(pid))
            except ProcessLookupError:
                continue
        elif pid in watched:
            os.close(watched.pop(pid))
    for descriptor in watched.values():
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        except ProcessLookupError:
            continue
        select.select([descriptor], [], [], 10)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


main()
