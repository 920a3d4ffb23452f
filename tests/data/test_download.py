"""Downloads from a server on this machine: whole, resumed, interrupted, wrong and absent."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchconv.data import download as module
from torchconv.data.download import cache_dir, download, md5

BODY = bytes(range(256)) * 400


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY; ``server.mode`` chooses how well."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        server: Any = self.server
        server.seen.append(self.headers.get("Range"))
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if server.mode == "missing":
            return self.send_error(404)
        if server.mode == "plain":  # knows nothing of ranges
            start = 0
        elif start >= len(BODY):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(BODY)}")
            self.end_headers()
            return None
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        stop = start + 30_000 if server.mode == "drops" else None
        self.wfile.write(BODY[start:stop])

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.mode, running.seen = "good", []  # type: ignore[attr-defined]
        running.url = f"http://127.0.0.1:{running.server_port}/set.gz"  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def whole(path: Path) -> None:
    if path.read_bytes() != BODY:
        raise ValueError("wrong content")


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_whole(server: Any, tmp_path: Path) -> None:
    target = download([server.url], tmp_path / "new" / "set.gz", whole)
    assert target.read_bytes() == BODY
    assert files(tmp_path / "new") == ["set.gz"]
    download([server.url], target, whole)
    assert server.seen == [None]  # what is there is not fetched again


@pytest.mark.parametrize(("mode", "have"), [("good", 1000), ("plain", 1000), ("good", len(BODY))])
def test_resume(server: Any, tmp_path: Path, mode: str, have: int) -> None:
    server.mode = mode
    (tmp_path / "set.gz.part").write_bytes(BODY[:have])
    assert download([server.url], tmp_path / "set.gz", whole).read_bytes() == BODY
    assert server.seen == [f"bytes={have}-"]
    assert files(tmp_path) == ["set.gz"]


@pytest.mark.parametrize("stale", [b"x" * 1000, b"x" * len(BODY), b"x" * (len(BODY) + 5)])
def test_stale_part_is_replaced(server: Any, tmp_path: Path, stale: bytes) -> None:
    (tmp_path / "set.gz.part").write_bytes(stale)
    assert download([server.url], tmp_path / "set.gz", whole).read_bytes() == BODY


def test_dropped_connections_are_continued(server: Any, tmp_path: Path) -> None:
    server.mode = "drops"
    assert download([server.url], tmp_path / "set.gz", whole).read_bytes() == BODY
    assert server.seen == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]


def test_interruption_leaves_a_part_to_continue(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.mode = "drops"
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    with pytest.raises(OSError, match=r"connection closed after 30000 of 102400 bytes"):
        download([server.url], tmp_path / "set.gz", whole)
    assert files(tmp_path) == ["set.gz.part"]
    server.mode = "good"
    assert download([server.url], tmp_path / "set.gz", whole).read_bytes() == BODY


def test_wrong_content_is_thrown_away(server: Any, tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise ValueError("wrong content")

    with pytest.raises(ValueError, match="wrong content"):
        download([server.url], tmp_path / "set.gz", refuse)
    assert files(tmp_path) == []
    assert server.seen == [None]


def test_second_address_is_tried(server: Any, tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9/set.gz"
    assert download([nobody, server.url], tmp_path / "set.gz", whole).read_bytes() == BODY


def test_unreachable(server: Any, tmp_path: Path) -> None:
    server.mode = "missing"
    with pytest.raises(OSError, match=r"set\.gz: HTTP 404"):
        download([server.url], tmp_path / "set.gz", whole)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9/set\.gz: .*refused"):
        download(["http://127.0.0.1:9/set.gz"], tmp_path / "set.gz", whole)
    assert files(tmp_path) == []


def test_file_address_and_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").write_bytes(BODY)
    (tmp_path / "set.gz.part").write_bytes(BODY[:10])
    download([(tmp_path / "source").as_uri()], tmp_path / "set.gz", whole, progress=True)
    assert (tmp_path / "set.gz").read_bytes() == BODY
    assert capfd.readouterr().out == ""


def test_two_at_once_fetch_once(server: Any, tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("file locks are only used on systems with fcntl")
    threads = [threading.Thread(target=download, args=([server.url], tmp_path / "set.gz", whole)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "set.gz").read_bytes() == BODY
    assert server.seen == [None]


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "torchconv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    if os.name != "nt":
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_dir() == tmp_path / ".cache" / "torchconv"


def test_md5_of_bytes_and_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert md5(b"abc") == md5(tmp_path / "file") == "900150983cd24fb0d6963f7d28e17f72"
