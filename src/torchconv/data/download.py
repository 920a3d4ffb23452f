"""Fetch a publisher's file once: resumable, verified, moved into place only when it is whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchconv._version import __version__
from torchconv.data.progress import bar

TIMEOUT = 20.0
ATTEMPTS = 5
_BLOCK = 1 << 18


def cache_dir() -> Path:
    """Where downloads are kept: torchconv/ in $XDG_CACHE_HOME, else in %LOCALAPPDATA% on Windows, else in ~/.cache."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "torchconv"
    if os.name == "nt" and (home := os.environ.get("LOCALAPPDATA")):
        return Path(home) / "torchconv"
    return Path.home() / ".cache" / "torchconv"


def md5(data: bytes | Path) -> str:
    """MD5 of bytes or of a file: publishers give it, and it tells a damaged file from a whole one."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def download(
    urls: Sequence[str],
    target: Path,
    verify: Callable[[Path], None],
    *,
    progress: bool = False,
) -> Path:
    """Bring the first reachable of ``urls`` to ``target``.

    The bytes collect in ``target.part``, which a later call continues; ``verify`` sees the whole file before it takes
    its final name, and a file that it refuses is thrown away.

    Args:
        urls: addresses of the same file, http(s) or file.
        target: final path; its folder is created.
        verify: raises ``ValueError`` on a wrong file.
        progress: show a bar on standard error.

    Raises:
        OSError: no address could be reached, or the target cannot be written.
        ValueError: what came is not the file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with _alone(part):
        if target.exists():  # another process has just finished it
            return target
        failure: Exception | None = None
        for url in urls:
            for _ in range(ATTEMPTS):
                before = _size(part)
                try:
                    _fetch(url, part, target.name, progress)
                    verify(part)
                except _TROUBLE as error:
                    failure = OSError(f"{url}: {_reason(error)}")
                    if _size(part) <= before:  # nothing came: another try would only wait again
                        break
                except ValueError as error:
                    part.unlink(missing_ok=True)
                    failure = error
                    if not before:  # else the piece found here may have been the wrong one: once more, from the start
                        break
                else:
                    os.replace(part, target)
                    return target
        assert failure is not None
        raise failure


_TROUBLE = (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException)


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return str(getattr(error, "reason", "") or error or type(error).__name__)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch(url: str, part: Path, name: str, progress: bool) -> None:
    """Append to ``part`` what is missing of ``url``; start afresh when the server cannot continue."""
    have = _size(part)
    headers = {"User-Agent": f"torchconv/{__version__}"}
    if have and not url.startswith("file:"):
        headers["Range"] = f"bytes={have}-"
    try:
        answer: Any = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing lies beyond what we have
            raise
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if whole and int(whole[1]) == have:
            return
        part.unlink()
        return _fetch(url, part, name, progress)
    with answer:
        started = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        resumed = answer.status == 206 and started is not None and int(started[1]) == have
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if resumed else "wb") as file, bar(name, total, progress, unit="bytes") as advance:
            advance(have)
            while block := answer.read(_BLOCK):
                file.write(block)
                have += len(block)
                advance(len(block))
        if total is not None and have < total:
            raise ConnectionError(f"connection closed after {have} of {total} bytes")


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """One process at a time per file, where the system offers file locks; elsewhere the checksum is the guard."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = part.with_name(f".{part.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
