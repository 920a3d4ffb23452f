"""What is timed: for each operator its inputs, our form, the obvious PyTorch expression, and a published peer.

A file here holds the cases of a family. A case function under ``@case("operator")`` yields a :class:`Case` for every
representative shape; peers that are not installed are left out of a run and named in its result.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Build = Callable[["Place"], Iterator["Case"]]


@dataclass(frozen=True)
class Place:
    """Where a case is built."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers; the run sets the seed."""
        return torch.randn(*shape).mul_(scale).to(self.device, self.dtype)

    def put(self, module: Any) -> Any:
        """A module on the device, in the type, in eval mode."""
        return module.to(self.device, self.dtype).eval()


@dataclass(frozen=True)
class Case:
    """One operator on one shape.

    Attributes:
        label: the shape, in a few characters.
        ours: our form, called with ``inputs``.
        inputs: tensors; gradients are taken for the floating-point ones.
        eager: the obvious PyTorch expression of the same function; None where there is none.
        peers: published packages by name, the same function or the nearest they have.
        params: tensors that get gradients besides the inputs; modules among the forms take their own parameters.
        alike: peers (or "eager") compute the same numbers, which is checked before timing; False where a peer is only
            the nearest relative.
        backward: time gradients too.
        flops: of the direct form; counted on ``eager`` (or ``ours``) when None.
    """

    label: str
    ours: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    eager: Callable[..., Tensor] | None = None
    peers: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    params: tuple[Tensor, ...] = ()
    alike: bool = True
    backward: bool = True
    flops: int | None = None


_FOUND: dict[str, Build] = {}


def case(op: str) -> Callable[[Build], Build]:
    """Announce the cases of an operator or kernel."""

    def decorate(build: Build) -> Build:
        _FOUND[op] = build
        return build

    return decorate


def cases() -> dict[str, Build]:
    """All case functions by operator."""
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        importlib.import_module(f"torchconv.bench.cases.{path.stem}")
    return dict(sorted(_FOUND.items()))


def installed(package: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(package) is not None
