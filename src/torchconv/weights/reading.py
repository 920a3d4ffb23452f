"""A state dict out of a file, whatever it is wrapped in."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
_AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.")


def read_state(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Wrappers (``{"model": …}``, ``{"state_dict": …}``) and prefixes that every name carries (``module.``, ``backbone.``)
    are taken off.

    Args:
        path: ``.safetensors``, or a file of ``torch.save`` (``.pth``, ``.pt``, ``.bin``, ``.tar``), read without
            running any code in it.
        ema: take the averaged weights, where the file holds both.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, holds objects other than tensors, or no tensors at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: no such file")
    found: Any
    if path.suffix == ".safetensors":
        try:
            found = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"path={str(path)!r}: not a readable safetensors file ({error})") from None
    else:
        found = _read_torch(path)
    return without_prefixes(_unwrapped(found, path, ema))


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = str(error).split("\n")[0]
        remedy = "it holds objects besides tensors, which are never unpickled; save its state dict as safetensors"
        raise ValueError(f"path={str(path)!r}: {remedy} ({why})") from None
    except Exception as error:  # the restricted unpickler meets garbage with any exception
        raise ValueError(f"path={str(path)!r}: not a readable checkpoint ({str(error).split(chr(10))[0]})") from None


def _unwrapped(found: Any, path: Path, ema: bool) -> dict[str, Tensor]:
    for _ in range(4):
        if not isinstance(found, Mapping):
            break
        keys = [k for k in ((*_AVERAGED, *_WRAPPERS) if ema else (*_WRAPPERS, *_AVERAGED)) if k in found]
        inner = next((k for k in keys if isinstance(found[k], Mapping)), None)
        if inner is None:
            break
        found = found[inner]
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise ValueError(f"path={str(path)!r}: holds no tensors under {', '.join(_WRAPPERS)} or at its top")
    return tensors


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without prefixes that all names have in common, of those that wrappers add."""
    names = dict(state)
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if names and all(n.startswith(prefix) for n in names):
                names = {n.removeprefix(prefix): t for n, t in names.items()}
                changed = True
    return names
