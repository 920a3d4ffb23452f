"""Tests of ``torchconv.data`` see no data but their own, unless they ask for the real sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REAL = os.environ.get("TORCHCONV_DATA")


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.delenv("TORCHCONV_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def real() -> Path:
    """The folder with the real sets."""
    if not REAL:
        pytest.skip("set TORCHCONV_DATA to a folder with fashion_mnist, cifar10_* and ucr_uea to run this")
    return Path(REAL)


def picture(path: Path, colour: Any = 0, size: tuple[int, int] = (8, 8), mode: str = "L", **options: Any) -> Path:
    """Save a plain picture of (width, height) ``size``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """Make DIR/CLASS/N.png for the given classes, every picture of its own grey level."""

    def make(
        classes: tuple[str, ...] = ("cat", "dog"), each: int = 10, below: str = "set", size: tuple[int, int] = (8, 8)
    ) -> Path:
        for k, name in enumerate(classes):
            for i in range(each):
                picture(tmp_path / below / name / f"{i}.png", 1 + k * each + i, size)
        return tmp_path / below.split("/")[0]

    return make


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., str]:
    """Save arrays and return the path."""

    def make(**arrays: Any) -> str:
        path = tmp_path / "set.npz"
        np.savez(path, **arrays)
        return str(path)

    return make
