import asyncio
import hashlib

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from pointsman_learning.workloads.fetch import ATTEMPTS, Fetched, FetchError, fetch_file
from pointsman_learning.workloads.fetch import http_client as make_client
from pointsman_learning.workloads.folder import DataFile

CONTENT = bytes(range(256)) * 2000
"""512,000 bytes."""


class Home:
    """A server of one file that can break the connection or know no ranges."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.ranges = True
        self.statuses: list[int] = []
        """Answers of the next requests, before the file is served."""
        self.breaks_after: list[int] = []
        """Bytes after which the next answers break off."""
        self.asked: list[str] = []
        """Range header of each request."""

    async def turn(self, request: web.Request) -> web.Response:
        raise web.HTTPFound(request.path)

    async def garble(self, _: web.Request) -> web.Response:
        return web.Response(body=b"not gzip", headers={"Content-Encoding": "gzip"})

    async def serve(self, request: web.Request) -> web.StreamResponse:
        asked = request.headers.get("Range", "")
        self.asked.append(asked)
        if self.statuses:
            return web.Response(status=self.statuses.pop(0))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        response = web.StreamResponse(status=206 if start else 200)
        if start:
            last = len(self.content) - 1
            response.headers["Content-Range"] = f"bytes {start}-{last}/{len(self.content)}"
        response.content_length = len(self.content) - start
        await response.prepare(request)
        if self.breaks_after:
            await response.write(self.content[start : start + self.breaks_after.pop(0)])
            request.transport.close()
            return response
        await response.write(self.content[start:])
        return response


@pytest.fixture
async def home():
    home = Home()
    app = web.Application()
    app.router.add_get("/file", home.serve)
    app.router.add_get("/turning", home.turn)
    app.router.add_get("/garbled", home.garble)
    async with TestServer(app) as server:
        home.url = str(server.make_url("/file"))
        yield home


@pytest.fixture
def fetch(home, tmp_path):
    async def run(**changes):
        arguments = {
            "path": "some/file.csv",
            "url": home.url,
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
            "size": len(CONTENT),
            "licence": "MIT",
            "what": "bytes",
        }
        file = DataFile(**(arguments | changes))
        seen: list[int] = []

        def blocking():
            with make_client() as client:
                return fetch_file(file, tmp_path, client, on_progress=seen.append, pause_s=0.0)

        how = await asyncio.to_thread(blocking)
        assert seen == sorted(seen)
        assert seen[-1] == file.size
        return how

    return run


@pytest.fixture
def target(tmp_path):
    return tmp_path / "some" / "file.csv"


@pytest.fixture
def part(target):
    return target.with_name("file.csv.part")


def leave(file, content: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(content)


async def test_download_and_once_more(home, fetch, target, part):
    assert await fetch() is Fetched.DOWNLOADED
    assert target.read_bytes() == CONTENT
    assert not part.exists()
    assert await fetch() is Fetched.KEPT
    assert home.asked == [""]


async def test_broken_connections_go_on_where_they_broke(home, fetch, target):
    home.breaks_after = [200_000, 100_000]
    assert await fetch() is Fetched.DOWNLOADED
    assert target.read_bytes() == CONTENT
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in home.asked[1:]]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1] < len(CONTENT)


async def test_connection_that_breaks_every_time_leaves_what_came(home, fetch, target, part):
    home.breaks_after = [100_000] * ATTEMPTS
    with pytest.raises(FetchError, match=r"of 512,000 bytes\. Run the same command again to go on"):
        await fetch()
    came = part.read_bytes()
    assert len(came) > 100_000
    assert came == CONTENT[: len(came)]
    assert not target.exists()
    assert await fetch() is Fetched.RESUMED
    assert target.read_bytes() == CONTENT


async def test_part_of_an_earlier_run_is_continued(home, fetch, target, part):
    leave(part, CONTENT[:300_000])
    assert await fetch() is Fetched.RESUMED
    assert target.read_bytes() == CONTENT
    assert home.asked == ["bytes=300000-"]


async def test_server_without_ranges_starts_again(home, fetch, target, part):
    home.ranges = False
    leave(part, b"x" * 300_000)
    await fetch()
    assert target.read_bytes() == CONTENT


async def test_complete_part_needs_no_connection(home, fetch, part):
    leave(part, CONTENT)
    assert await fetch() is Fetched.RESUMED
    assert home.asked == []


async def test_corrupted_part_is_reported_and_left(fetch, target, part):
    leave(part, b"x" + CONTENT[1:1000])
    with pytest.raises(FetchError, match=r"is not the pinned file: its sha256 is .*; delete it"):
        await fetch()
    assert not target.exists()
    assert part.stat().st_size == len(CONTENT)


async def test_other_content_is_reported_and_left(home, fetch, target, part):
    home.content = CONTENT[::-1]
    with pytest.raises(FetchError, match="is not the pinned file"):
        await fetch()
    assert part.read_bytes() == home.content
    assert not target.exists()


async def test_longer_content_is_another_file(home, fetch, target):
    home.content = CONTENT + b"more"
    with pytest.raises(FetchError, match="is longer than the pinned file of 512,000 bytes"):
        await fetch()
    assert not target.exists()


async def test_shorter_content(home, fetch):
    home.content = CONTENT[:1000]
    home.ranges = False
    with pytest.raises(FetchError, match="the answer ended early, after 1,000 of 512,000 bytes"):
        await fetch()
    assert len(home.asked) == ATTEMPTS


async def test_wrong_file_that_is_there_is_left(fetch, target, home):
    leave(target, b"mine")
    with pytest.raises(FetchError, match=r"file\.csv is there, but is not the pinned file"):
        await fetch()
    assert target.read_bytes() == b"mine"
    assert home.asked == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/turning", "/turning: Exceeded maximum allowed redirects"),
        ("/garbled", "/garbled: Error -3 while decompressing"),
    ],
)
async def test_other_failures_are_told_with_the_address(home, fetch, url, message):
    with pytest.raises(FetchError, match=message):
        await fetch(url=home.url.removesuffix("/file") + url)


async def test_an_address_of_another_protocol_is_told_at_once(fetch):
    with pytest.raises(FetchError, match="ftp://somewhere/file cannot be reached"):
        await fetch(url="ftp://somewhere/file")


@pytest.mark.parametrize("status", [404, 403, 416])
async def test_refusal_is_final(home, fetch, status):
    home.statuses = [status]
    with pytest.raises(FetchError, match=f"/file: HTTP {status} "):
        await fetch()
    assert len(home.asked) == 1


async def test_server_errors_are_tried_again(home, fetch):
    home.statuses = [503, 500]
    assert await fetch() is Fetched.DOWNLOADED
    home.statuses = [503] * ATTEMPTS
    with pytest.raises(FetchError, match="HTTP 503 Service Unavailable, after 0 of"):
        await fetch(path="other.csv")


async def test_no_server(fetch):
    with pytest.raises(FetchError, match="cannot be reached"):
        await fetch(url="http://127.0.0.1:1/file")


async def test_place_that_cannot_be_written(fetch, tmp_path):
    (tmp_path / "some").write_text("a file where the folder should be")
    with pytest.raises(FetchError, match=r"some/file\.csv: "):
        await fetch()


async def test_folder_in_the_place_of_the_file(fetch, target):
    target.mkdir(parents=True)
    with pytest.raises(FetchError, match=r"file\.csv is not a file"):
        await fetch()
