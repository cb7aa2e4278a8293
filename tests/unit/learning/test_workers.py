"""Workers end with their parent."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys

SCRIPT = """
import os, sys, threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from pointsman_learning.workers import end_with_parent


def number():
    return os.getpid()


def stay():
    threading.Event().wait()


if __name__ == "__main__":
    with ProcessPoolExecutor(
        1, mp_context=get_context(sys.argv[1]), initializer=end_with_parent
    ) as pool:
        print(pool.submit(number).result(), flush=True)
        pool.submit(stay).result()
"""


def test_a_killed_parent_leaves_no_worker(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    for method in set(multiprocessing.get_all_start_methods()) - {"fork"}:
        parent = subprocess.Popen(
            [sys.executable, str(file), method], stdout=subprocess.PIPE, text=True
        )
        with parent:
            worker = int(parent.stdout.readline())
            descriptor = os.pidfd_open(worker)
            parent.send_signal(signal.SIGKILL)
        # Readable once the worker has ended.
        assert select.select([descriptor], [], [], 60.0)[0], f"{method}: it is still there"
        os.close(descriptor)
