"""Files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it into place when the block ends without an exception."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(argument: str, path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """See that a file, or with ``folder`` a folder, can be written at ``path``, before long work.

    Raises:
        OSError: it cannot; the message names ``argument``, its value and what is in the way.
    """
    place = Path(path)
    if not folder and place.is_dir():
        raise IsADirectoryError(f"{argument}={str(path)!r}: is a folder; name a file in it")
    nearest = place if folder else place.parent
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(f"{argument}={str(path)!r}: {nearest} is a file; name another folder")
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        why = f"nothing can be written in {nearest} ({error.strerror}); name another folder"
        raise type(error)(f"{argument}={str(path)!r}: {why}") from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused, because other readers refuse them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
