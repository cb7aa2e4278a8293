import asyncio
import selectors

import pytest

GRACE_S = 0.001
"""How long loopback may take to deliver what was written."""


class JumpingSelector(selectors.DefaultSelector):
    """When nothing is ready, the time until the next timer passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout=None):
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(GRACE_S)
        if not ready:
            self.now_s += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop without waiting: what it runs, sockets included, takes no time."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.now_s


@pytest.fixture(scope="session")
def run_jumping():
    """Run a coroutine on a `JumpingLoop`."""

    def run(coroutine):
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            return runner.run(coroutine)

    return run
