"""Optional dependencies: a missing one says which extra to install."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import ``module`` or raise ``ImportError`` naming the extra of torchconv that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ImportError(f"{module} is not installed; run: pip install 'torchconv[{extra}]'") from None


def extra_of(module: str) -> str | None:
    """The smallest extra of torchconv that brings ``module``, where one does."""
    top = module.split(".")[0]
    package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(top, top).lower()
    try:
        needed = importlib.metadata.requires("torchconv") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    pairs = [m.groups() for m in (re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)", line.lower()) for line in needed) if m]
    extras = [extra for _, extra in pairs]
    return min((extra for name, extra in pairs if name == package), key=extras.count, default=None)
