"""Optional dependencies: a missing one says which extra to install."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import ``module`` or raise ``ImportError`` naming the extra of torchconv that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ImportError(f"{module} is not installed; run: pip install 'torchconv[{extra}]'") from None
