"""Downloads of the public data: resumed where they broke, checked against pinned digests.

A download grows in ``FILE.part`` beside its target and takes its name only when its content
is the pinned one. Nothing that is there is ever deleted or overwritten for being wrong.
"""

import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import httpx

from pointsman_common.files import reason
from pointsman_learning.workloads.folder import DataFile, digest

ATTEMPTS = 4
"""Connections tried for one file; each goes on where the last one broke."""
TIMEOUT_S = 30.0
CHUNK_BYTES = 65_536

OnProgress = Callable[[int], None]
"""Told how many bytes of the file are there."""


class FetchError(RuntimeError):
    """A file that could not be had; the message says which, why and what to do."""


class Fetched(StrEnum):
    """How a file came to be there."""

    KEPT = "was there"
    DOWNLOADED = "downloaded"
    RESUMED = "resumed"


def fetch_file(
    file: DataFile,
    folder: Path,
    client: httpx.Client,
    *,
    on_progress: OnProgress = lambda _: None,
    pause_s: float = 1.0,
) -> Fetched:
    """Bring one file into the data folder, unless it is there.

    ``pause_s`` is the time before a second attempt; it doubles with each further one. Raises
    FetchError.
    """
    target = folder / file.path
    if target.exists():
        return _kept(file, target, on_progress)
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        resumed = _download(file, part, client, on_progress=on_progress, pause_s=pause_s)
        _check_part(file, part)
        part.rename(target)
    except OSError as error:
        raise FetchError(f"{target}: {reason(error)}") from error
    return Fetched.RESUMED if resumed else Fetched.DOWNLOADED


def _kept(file: DataFile, target: Path, on_progress: OnProgress) -> Fetched:
    if not target.is_file():
        raise FetchError(f"{target} is not a file")
    found = digest(target)
    if found != file.sha256:
        raise FetchError(
            f"{target} is there, but is not the pinned file: its sha256 is {found}, expected"
            f" {file.sha256}. It was left as it is; move it away to download the pinned one"
        )
    on_progress(file.size)
    return Fetched.KEPT


def _check_part(file: DataFile, part: Path) -> None:
    found = digest(part)
    if found != file.sha256:
        raise FetchError(
            f"{file.url} is not the pinned file: its sha256 is {found}, expected {file.sha256}."
            f" What came was left in {part}; delete it to try again"
        )


def _download(
    file: DataFile,
    part: Path,
    client: httpx.Client,
    *,
    on_progress: OnProgress,
    pause_s: float,
) -> bool:
    """Fill the part up to its full size; tells whether some of it was there before."""
    had = _size(part)
    why = ""
    for attempt in range(ATTEMPTS):
        if _size(part) >= file.size:
            break
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            _receive(file, part, client, on_progress)
            why = "the answer ended early"
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            raise FetchError(f"{file.url} cannot be reached: {_reason(error)}") from error
        except httpx.TransportError as error:
            why = _reason(error)
        except httpx.HTTPError as error:  # too many redirects, content that does not decode
            raise FetchError(f"{file.url}: {_reason(error)}") from error
    if _size(part) < file.size:
        raise FetchError(
            f"{file.url}: {why}, after {_size(part):,} of {file.size:,} bytes."
            " Run the same command again to go on"
        )
    on_progress(file.size)
    return had > 0


def _receive(file: DataFile, part: Path, client: httpx.Client, on_progress: OnProgress) -> None:
    """One connection: append to the part what the server still has of the file."""
    start = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with client.stream("GET", file.url, headers=headers) as response:
            if response.is_server_error:
                raise httpx.ReadError(f"HTTP {response.status_code} {response.reason_phrase}")
            if response.is_error or response.is_redirect:
                raise FetchError(
                    f"{file.url}: HTTP {response.status_code} {response.reason_phrase}"
                )
            goes_on = _goes_on(response, start)
            with part.open("ab" if goes_on else "wb") as out:
                _copy(file, response, out.write, start if goes_on else 0, on_progress)
    except httpx.InvalidURL as error:
        raise FetchError(f"{file.url}: {error}") from error


def _goes_on(response: httpx.Response, start: int) -> bool:
    """Whether the answer begins where the part ends; else it is the whole file."""
    span = response.headers.get("Content-Range", "")
    return response.status_code == httpx.codes.PARTIAL_CONTENT and span.startswith(
        f"bytes {start}-"
    )


def _copy(
    file: DataFile,
    response: httpx.Response,
    write: Callable[[bytes], object],
    done: int,
    on_progress: OnProgress,
) -> None:
    for chunk in response.iter_bytes(CHUNK_BYTES):
        if done + len(chunk) > file.size:
            raise FetchError(
                f"{file.url} is longer than the pinned file of {file.size:,} bytes: it is"
                " another one"
            )
        write(chunk)
        done += len(chunk)
        on_progress(done)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def http_client() -> httpx.Client:
    """Client for downloads; follows redirects, as public homes use them."""
    return httpx.Client(follow_redirects=True, timeout=TIMEOUT_S)
