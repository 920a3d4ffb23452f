"""Features of named layers, reduced to one row a stimulus while the network runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive, did_you_mean

REDUCTIONS = ("mean", "flatten", "cls", "samples", "random")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Reduction:
    """How the output of a layer becomes rows; recorded with every result.

    Attributes:
        how: "mean" over positions (tokens after ``prefix``), "flatten", "cls" (the first token), "samples" (every
            position a row of its own: more rows, no longer independent), "random" (Gaussian projection of "flatten").
        layout: where channels stand: "first", "last", or "auto": last for tokens (B, T, D) and for square maps
            (B, H, H, D) that can be no map (B, D, H, H), else first.
        prefix: tokens in front that are no patches; "mean" and "samples" leave them out. For channels-last outputs
            with one position axis.
        size: columns of "random".
        seed: of "random".
    """

    how: str = "mean"
    layout: str = "auto"
    prefix: int = 0
    size: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("how", self.how, REDUCTIONS)
        check_choice("layout", self.layout, ("auto", "first", "last"))
        check_positive("prefix", self.prefix, zero=True)
        check_positive("size", self.size)

    def __call__(self, output: Tensor) -> Tensor:
        """(B, …) → rows in float64, never a view of the output."""
        output = output.detach()
        last = self.layout == "last" or (self.layout == "auto" and _channels_last(output.shape))
        if self.how == "cls":
            check(output.dim() == 3 and last, "how", "cls", f"needs tokens (B, T, D), not {tuple(output.shape)}")
            return output[:, 0].to(torch.float64, copy=True)
        if output.dim() < 3 or self.how == "flatten":
            rows = output.flatten(1) if output.dim() > 1 else output[:, None]
            return self._project(rows) if self.how == "random" else rows.to(torch.float64, copy=True)
        if self.how == "random":
            return self._project(output.flatten(1))
        tokens = output.flatten(1, -2) if last else output.flatten(2).transpose(1, 2)
        if last and output.dim() == 3:
            tokens = tokens[:, self.prefix :]
        tokens = tokens.to(torch.float64, copy=True)
        return tokens.mean(1) if self.how == "mean" else tokens.flatten(0, 1)

    def _project(self, rows: Tensor) -> Tensor:
        """Johnson-Lindenstrauss, a slice of the matrix at a time: p × size numbers would not fit for wide maps."""
        generator = torch.Generator().manual_seed(self.seed)
        total = rows.new_zeros(len(rows), self.size, dtype=torch.float64)
        for part in rows.split(4096, 1):
            matrix = torch.randn(part.shape[1], self.size, generator=generator)
            total += part.double() @ matrix.to(rows.device, torch.float64)
        return total / self.size**0.5


def _channels_last(shape: Sequence[int]) -> bool:
    """Tokens, or a square map with its channels behind it, as in Swin."""
    return len(shape) == 3 or (len(shape) == 4 and shape[1] == shape[2] != shape[3] and shape[2] > 1)


def blocks(model: nn.Module) -> list[str]:
    """Names of the layers worth comparing: blocks of sequences, and convolutions and linear layers outside of them.

    Example:
        >>> blocks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)))
        ['0', '4']
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        inside = isinstance(module, nn.Sequential | nn.ModuleList)
        for name, child in module.named_children():
            if not any(True for _ in child.parameters()) or isinstance(child, _NORMS):
                continue
            leaf = not any(True for _ in child.children())
            if leaf or (inside and not isinstance(child, nn.Sequential | nn.ModuleList)):
                yield prefix + name
            else:
                yield from walk(child, f"{prefix}{name}.")

    return list(walk(model, ""))


def chosen(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """The named layers, or :func:`blocks`; refuses unknown names."""
    known = dict(model.named_modules())
    names = blocks(model) if layers is None else list(layers)
    for name in names:
        if name not in known:
            raise ValueError(f"layers={name!r}: no such module; {did_you_mean(name, [k for k in known if k])}")
    check(bool(names), "layers", names, f"{type(model).__name__} has no layers with weights; name modules to compare")
    return names


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, and back."""
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((v for v in values if isinstance(v, Tensor)), None)


@contextmanager
def recording(model: nn.Module, names: Sequence[str], reduction: Reduction) -> Iterator[dict[str, Tensor]]:
    """While open, a forward pass leaves the reduced output of each layer in the dictionary.

    Reduced at once, because a later module may change the output in place. A layer called again appears again as
    ``name#2``.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def hook(name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            value = _tensor(output)
            if value is None or not value.is_floating_point():
                return
            key, call = name, 1
            while key in found:
                call += 1
                key = f"{name}#{call}"
            found[key] = reduction(value)

        return record

    handles = [modules[n].register_forward_hook(hook(n)) for n in names]
    try:
        with quiet(model):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def place(model: nn.Module, images: Tensor) -> Tensor:
    """Images where the model's parameters are, in their type."""
    parameter = next(model.parameters(), None)
    return images if parameter is None else images.to(parameter.device, parameter.dtype)


def features(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str] | None = None,
    *,
    reduction: Reduction | None = None,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """Features of named layers for all images, in float64, from forward hooks in eval mode.

    Args:
        model: left as it was.
        images: (N, …), normalised as it expects them.
        layers: names of modules; :func:`blocks` by default.
        reduction: of maps and tokens to rows; the mean over positions by default.
        batch_size: images at once.

    Returns:
        Layer → (N, p), in the order in which layers ran.

    Raises:
        ValueError: an unknown layer, or one that did not run.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
        >>> features(net, torch.randn(5, 3, 8, 8))["0"].shape
        torch.Size([5, 8])
    """
    check_positive("batch_size", batch_size)
    names = chosen(model, layers)
    parts: dict[str, list[Tensor]] = {}
    with recording(model, names, reduction or Reduction()) as found:
        for batch in images.split(batch_size):
            found.clear()
            model(place(model, batch))
            for name, rows in found.items():
                parts.setdefault(name, []).append(rows)
    missing = [n for n in names if n not in parts]
    if missing and layers is not None:
        raise ValueError(f"layers={missing[0]!r}: did not run or gave no tensor")
    return {n: torch.cat(p) for n, p in parts.items()}
