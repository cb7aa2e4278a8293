"""Worker processes that end with the process that started them."""

import os
import threading
from multiprocessing import parent_process


def end_with_parent() -> None:
    """Have this worker end when its parent does, however that came about.

    A pool's workers go on with what is queued when the parent is killed (also by SIGTERM), and
    nobody would end them. To be called once in each worker.
    """
    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="ends with its parent", daemon=True).start()
