"""Random state: seeded for a run, kept in its checkpoint, given back to the caller afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, device: torch.device | str = "cpu") -> None:
    """Seed Python, NumPy and PyTorch's generators of the CPU and of ``device``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    where = torch.device(device)
    if where.type == "cuda":
        with torch.cuda.device(where):
            torch.cuda.manual_seed(seed)
    elif where.type == "mps":
        torch.mps.manual_seed(seed)


def get_rng_state(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state of those generators, of types that ``torch.load(weights_only=True)`` accepts."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = numpy
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    where = torch.device(device)
    if where.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(where)
    elif where.type == "mps":
        state["device"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Put back what :func:`get_rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    where = torch.device(device)
    if "device" in state and where.type == "cuda":
        torch.cuda.set_rng_state(state["device"], where)
    elif "device" in state and where.type == "mps":
        torch.mps.set_rng_state(state["device"])


@contextmanager
def preserved_rng(device: torch.device | str = "cpu") -> Iterator[None]:
    """Run a block that may seed and draw, and leave the generators as they were."""
    before = get_rng_state(device)
    try:
        yield
    finally:
        set_rng_state(before, device)
