"""Operators: one file a method, a functional form and a module each.

``from torchconv.ops import DCLSConv2d`` loads only that method's file; every class announced with ``@part`` is here.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from torchconv.catalog import parts


@cache
def _exports() -> dict[str, str]:
    names = {}
    for p in parts():
        if p.module.startswith("torchconv.ops."):
            names[p.target] = p.module
            if p.kind == "operator" and p.target[-2:] not in ("1d", "2d", "3d"):
                names.update({f"{p.target}{n}d": p.module for n in p.dims})
    return names


def __getattr__(name: str) -> Any:
    if name in _exports():
        return getattr(importlib.import_module(_exports()[name]), name)
    if name in ("as_conv", "as_mixer"):
        return getattr(importlib.import_module("torchconv.ops.roles"), name)
    raise AttributeError(f"module 'torchconv.ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_exports(), "as_conv", "as_mixer"])
