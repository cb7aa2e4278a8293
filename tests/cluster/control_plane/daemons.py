"""Long-running child processes of a test run, which never outlive it."""

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pointsman_policy.child import ending_with_parent

PATIENCE_S = 90.0
"""For a start on a machine that is busy with other things."""
PAUSE_S = 0.03
LOG_TAIL_LINES = 25
PORTS = (20_000, 32_000)
"""Below those that Linux gives to outgoing connections: a port stays free for a restart."""

GUARD = Path(__file__).with_name("guard.py")


class StartError(RuntimeError):
    """A daemon ended or was not ready in time; the text shows the end of its log."""


class PortTakenError(StartError):
    """Somebody else took the port between choosing and binding it."""


@dataclass(slots=True)
class Folder:
    """A folder for one run, and the guard that removes it should the run be killed."""

    path: Path
    _guard: "subprocess.Popen[str]"

    def watch(self, pid: int) -> None:
        """Have a process ended when this one is gone."""
        self._tell(f"+{pid}")

    def forget(self, pid: int) -> None:
        """It has ended."""
        self._tell(f"-{pid}")

    def _tell(self, line: str) -> None:
        assert self._guard.stdin is not None
        # A guard that was killed itself must not fail a test.
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(line + "\n")
            self._guard.stdin.flush()


@contextlib.contextmanager
def guarded_folder() -> Iterator[Folder]:
    """A temporary folder that is removed at the end, also after SIGKILL."""
    path = Path(tempfile.mkdtemp(prefix="pointsman-cluster-"))
    command = [sys.executable, "-I", "-S", str(GUARD), str(path)]
    # Its own session: Ctrl-C at the terminal, or the end of the terminal, must not end it.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, text=True, start_new_session=True
    ) as guard:
        try:
            yield Folder(path, guard)
        finally:
            shutil.rmtree(path, ignore_errors=True)
            assert guard.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                guard.stdin.close()


@dataclass(slots=True)
class Daemon:
    """One program that can be started, ended and started again."""

    name: str
    command: Sequence[str]
    folder: Folder
    ready: Callable[[], bool]
    """Asked until it says yes; may raise OSError while nothing listens yet."""
    process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    @property
    def log(self) -> Path:
        """Standard output and error of all its lives."""
        return self.folder.path / f"{self.name}.log"

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def launch(self) -> None:
        """Start it without waiting."""
        if self.running:
            return
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ending_with_parent(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.folder.watch(self.process.pid)

    def wait_until_ready(self) -> None:
        """Wait for its answer. Raises StartError when it ends or stays silent."""
        assert self.process is not None
        patience = time.monotonic() + PATIENCE_S
        while time.monotonic() < patience:
            with contextlib.suppress(OSError):
                if self.ready():
                    return
            # Waiting for its end is the pause between two questions.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PAUSE_S)
                self._ended()
                raise self._failure(f"ended with status {self.process.returncode}")
        raise self._failure(f"was not ready within {PATIENCE_S:.0f} s")

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.launch()
        self.wait_until_ready()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP: it holds its connections and says nothing, until `thaw`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self._ended()

    def _ended(self) -> None:
        assert self.process is not None
        self.folder.forget(self.process.pid)

    def _failure(self, how: str) -> StartError:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        tail = "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
        kind = PortTakenError if "address already in use" in tail else StartError
        return kind(f"{self.name} {how}; the end of its log:\n{tail}")


def free_port() -> int:
    """A loopback TCP port that nobody uses now."""
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
