"""Effective receptive field: which input elements the centre of a feature map really depends on.

W. Luo et al., NeurIPS 2016, arXiv 1701.04128; measured as in X. Ding et al., "Scaling Up Your Kernels to 31 × 31",
CVPR 2022, arXiv 2203.06717, section 5 and appendix, which UniRepLKNet (arXiv 2311.15599, 2410.08049) takes over.

For an image x with last feature map F: s = Σ_c relu(F[c, centre]), centre = size // 2 on every axis; the contribution
map is Σ_channels relu(∂s/∂x). P is its mean over images, A = log10(P + 1) / max. The high-contribution side for a
threshold t is the side 2i + 1 of the smallest centred square (i ≥ 1) that holds more than t of the sum of A.

Cost: one forward and one backward pass an image; memory that of ``batch_size`` images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive, did_you_mean
from torchconv.catalog import part

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
PREFIX = 8  # tokens in front that are no patches, at most
Images = Tensor | Iterable[Tensor]
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class ERFResult:
    """What was measured; ``map`` and ``log_map`` have the images' spatial shape.

    Attributes:
        map: P, mean contribution of every input element.
        log_map: A = log10(P + 1) / max, in 0..1; zero where nothing contributes at all.
        sides: threshold → side of the smallest centred square holding more than that share of A; None when none does.
        ratios: threshold → the square's share of the area, or None.
        layer: the name of the layer whose output was taken, "" for the model's own output.
        images: how many images are in the mean.
        skipped: how many were left out because their map was not finite.
        layout: where that layer's output has its channels: "first", "last", or "tokens", in rows of patches.
    """

    map: Tensor
    log_map: Tensor
    sides: dict[float, int | None] = field(default_factory=dict)
    ratios: dict[float, float | None] = field(default_factory=dict)
    layer: str = ""
    images: int = 0
    skipped: int = 0
    layout: str = "first"


def high_contribution(
    log_map: Tensor, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[dict[float, int | None], dict[float, float | None]]:
    """Side and area share of the smallest centred square that holds more than each threshold of the map's sum.

    Args:
        log_map: A ≥ 0 of 1 to 3 axes. The centre is size // 2 on every axis; squares have side 2i + 1 with
            1 ≤ i ≤ size₀ // 2 − 1, and i at most half of every other axis. An interval in 1-D, a cube in 3-D.
        thresholds: shares in [0, 1).

    Returns:
        (sides, ratios), each by threshold; None where no square holds more (always for maps below 4 elements).

    Raises:
        ValueError: the map has no axis or more than three, or a threshold is out of range.

    Example:
        >>> delta = torch.zeros(9, 9)
        >>> delta[4, 4] = 1
        >>> high_contribution(delta, [0.5])[0]
        {0.5: 3}

    Reference: arXiv 2203.06717, appendix (high-contribution area ratio).
    """
    check(1 <= log_map.dim() <= 3, "log_map", tuple(log_map.shape), "must have 1, 2 or 3 axes")
    for threshold in thresholds:
        check(0 <= threshold < 1, "thresholds", threshold, "must be at least 0 and below 1")
    data = log_map.detach().double().cpu()
    shape, total = data.shape, float(data.sum())
    shares = []
    for i in range(1, min(shape[0] // 2 - 1, *(n // 2 for n in shape)) + 1):
        box = tuple(slice(n // 2 - i, n // 2 + i + 1) for n in shape)
        shares.append(float(data[box].sum()) / total if total > 0 else 0.0)
    sides: dict[float, int | None] = {}
    ratios: dict[float, float | None] = {}
    for threshold in thresholds:
        found = next((2 * i + 1 for i, share in enumerate(shares, 1) if share > threshold), None)
        ratio = None
        if found is not None:
            ratio = 1.0
            for n in shape:
                ratio *= found / n
        sides[threshold], ratios[threshold] = found, ratio
    return sides, ratios


def log_normalised(contribution: Tensor) -> Tensor:
    """A = log10(P + 1) / max over all elements; zeros for a map of zeros."""
    scaled = torch.log10(contribution + 1)
    largest = scaled.max() if scaled.numel() else scaled.new_zeros(())
    return scaled / largest if largest > 0 else torch.zeros_like(scaled)


def _maps_in(output: Any, ndim: int) -> list[Tensor]:
    """Feature maps (N, C, *spatial) in a model's or layer's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.dim() == ndim + 2 and output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in _maps_in(item, ndim)]
    return []


def _reading(output: Tensor, image: Sequence[int], grid: Sequence[int]) -> str:
    """How a layer's output for images is a map: its channels "first" or "last", as "tokens" of the grid, or "" not."""
    if not output.is_floating_point():
        return ""
    if output.dim() == 4:
        return "first" if _alike(output.shape[2:], image) else "last" if _alike(output.shape[1:3], image) else ""
    patches = math.prod(grid) if grid else 0
    return "tokens" if output.dim() == 3 and patches > 1 and 0 <= output.shape[1] - patches <= PREFIX else ""


def _alike(size: Sequence[int], image: Sequence[int]) -> bool:
    """Whether a map has the proportions of the image; attention's heads × tokens × channels have not."""
    (h, w), (height, width) = size, image
    return abs(h * width - w * height) <= max(height, width) or 0.8 <= h * width / (w * height) <= 1.25


def _as_map(output: Tensor, reading: str, grid: Sequence[int]) -> Tensor:
    if reading == "tokens":
        return output[:, output.shape[1] - math.prod(grid) :].transpose(1, 2).unflatten(2, tuple(grid))
    return output.movedim(-1, 1) if reading == "last" else output


class _Tap:
    """Runs the model and returns the wanted feature map."""

    def __init__(self, model: nn.Module | Callable[[Tensor], Any], feature: str | None) -> None:
        self.model, self.layer = model, feature or ""
        self.reading = ""  # of a layer that was found
        self.grid: tuple[int, ...] = ()
        if feature is not None:
            check(isinstance(model, nn.Module), "feature", feature, "a callable has no layers; let it return the map")
            names = [n for n, _ in model.named_modules() if n]  # type: ignore[union-attr]
            if feature not in names:
                raise ValueError(f"feature={feature!r}: the model has no such layer; {did_you_mean(feature, names)}")

    def __call__(self, x: Tensor) -> Tensor:
        ndim = x.dim() - 2
        if self.reading:
            return _as_map(self._hooked([self.layer], x)[-1][1], self.reading, self.grid)
        if self.layer:
            maps = [(n, m) for n, o in self._hooked([self.layer], x) for m in _maps_in(o, ndim)]
        else:
            maps = [("", m) for m in _maps_in(self.model(x), ndim)]
        if not maps and not self.layer and isinstance(self.model, nn.Module):
            maps = self._found(x, ndim)
        if not maps:
            where = f"layer {self.layer!r}" if self.layer else "the model"
            wanted = ", ".join(("N", "C", *("D", "H", "W")[3 - ndim :]))
            remedy = f"{where} gives no feature map ({wanted}); name a layer that does, or pass a callable"
            raise ValueError(f"feature={self.layer or None!r}: {remedy}")
        self.layer, feature_map = maps[-1]
        return feature_map

    def _found(self, x: Tensor, ndim: int) -> list[tuple[str, Tensor]]:
        """A classifier's last layer with more than one position, before the pooling."""
        model: Any = self.model
        if ndim == 2 and (kept := self._read(x)) is not None:
            name, output = kept
            return [(name, _as_map(output, self.reading, self.grid))]
        # In one and three dimensions shapes do not tell where the channels are; layers that work on the last axis do.
        names = [n for n, m in model.named_modules() if n and not isinstance(m, nn.Linear | nn.LayerNorm)]
        found = [(n, m) for n, o in self._hooked(names, x) for m in _maps_in(o, ndim)]
        return [(n, m) for n, m in found if m[0, 0].numel() > 1] or found

    def _read(self, x: Tensor) -> tuple[str, Tensor] | None:
        """The last layer whose output is a map of the image's proportions, or tokens of one."""
        model: Any = self.model
        kept: tuple[str, Tensor] | None = None
        grid: tuple[int, ...] = ()
        for name, output in self._hooked([n for n, _ in model.named_modules() if n], x):
            reading = _reading(output, x.shape[2:], grid) if isinstance(output, Tensor) else ""
            size = tuple(_as_map(output, reading, grid).shape[2:]) if reading else ()
            if reading and math.prod(size) > 1:
                kept, grid = (name, output), size
                self.reading, self.grid = reading, grid
        return kept

    def _hooked(self, names: Sequence[str], x: Tensor) -> list[tuple[str, Any]]:
        """Outputs of the named layers, in the order in which they ran."""
        model: Any = self.model
        found: list[tuple[str, Any]] = []
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: found.append((name, output))
            )
            for name in names
        ]
        try:
            model(x)
        finally:
            for handle in handles:
                handle.remove()
        return found


def _batches(images: Images, size: int) -> Iterator[Tensor]:
    """Images (C, *spatial) or batches of them, cut into batches of at most ``size``."""
    for item in [images] if isinstance(images, Tensor) else images:
        if len(item):
            yield from item.split(size)


def _scores(tap: _Tap, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        features = tap(x)
        centre: tuple[Any, ...] = tuple(n // 2 for n in features.shape[2:])
        score = features[(slice(None), slice(None), *centre)].relu().sum()
        if not score.requires_grad:
            raise ValueError(f"feature={tap.layer!r}: the feature map does not depend differentiably on the images")
        (gradient,) = torch.autograd.grad(score, x)
    return gradient.relu().sum(1)


def _each(tap: _Tap, images: Images, batch_size: int, device: Any, progress: Progress | None) -> Iterator[Tensor]:
    check_positive("batch_size", batch_size)
    model = tap.model
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [m for m in modules if m.training]
    floating = [p for m in modules[:1] for p in m.parameters() if p.is_floating_point()]
    total = len(images) if isinstance(images, Tensor) else None
    done, shape = 0, None
    try:
        for module in training:
            module.training = False
        for batch in _batches(images, batch_size):
            check(batch.dim() in (3, 4, 5), "images", tuple(batch.shape), "must be batches (N, C, 1 to 3 spatial axes)")
            check(batch.is_floating_point(), "images", batch.dtype, "must be floating point, normalised for the model")
            shape = shape or batch.shape[2:]
            check(
                batch.shape[2:] == shape, "images", tuple(batch.shape), f"must all have the spatial size {tuple(shape)}"
            )
            like = floating[0] if floating else batch
            yield _scores(tap, batch.to(device or like.device, like.dtype)).cpu()
            done += len(batch)
            if progress is not None:
                progress(done, total)
    finally:
        for module in training:
            module.training = True


def contribution_map(
    model: nn.Module | Callable[[Tensor], Any],
    images: Images,
    feature: str | None = None,
    *,
    batch_size: int = 1,
    device: Any = None,
    progress: Progress | None = None,
) -> Tensor:
    """How much every input element contributes to the centre of a feature map, an image at a time.

    map[n] = Σ_channels relu(∂s/∂x_n), s = Σ_c relu(F[n, c, size // 2, …]), in eval mode.

    Args:
        model: a module, or a callable from images to the feature map (or to a list ending with it).
        images: floating point (N, C, \\*spatial), 1 to 3 spatial axes, or an iterable of such batches of one size.
        feature: name of the layer whose output is F. None takes the model's output when it is a feature map (the last
            of several), else the output of the last layer with more than one position (a classifier's, before its
            pooling). For images that may be a map with its channels last, or a transformer's tokens in rows of
            patches; a layer that is named gives channels first.
        batch_size: images in memory at once, ≥ 1. The result does not depend on it.
        device: where to run; the model's device by default.
        progress: called with (images done, their number or None) after every batch.

    Shape:
        (N, C, \\*spatial) → (N, \\*spatial), on the CPU.

    Raises:
        ValueError: no such layer, no feature map, or images of different sizes.

    Example:
        >>> conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        >>> _ = conv.weight.data.fill_(1.0)
        >>> contribution_map(conv, torch.rand(1, 1, 7, 7)).sum().item()
        9.0

    Reference: arXiv 2203.06717, appendix; arXiv 2410.08049.
    """
    tap = _Tap(model, feature)
    maps = list(_each(tap, images, batch_size, device, progress))
    check(bool(maps), "images", 0, "give at least one image")
    return torch.cat(maps)


@part(
    "erf",
    paper="unireplknet",
    kind="analysis",
    dims=(1, 2, 3),
    keywords="effective receptive field contribution gradient area ratio long range",
)
def erf(
    model: nn.Module | Callable[[Tensor], Any],
    images: Images,
    feature: str | None = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    batch_size: int = 1,
    device: Any = None,
    progress: Progress | None = None,
) -> ERFResult:
    """Measure the effective receptive field of a model's centre unit: its map, its sides and its area shares.

    P = mean over images of :func:`contribution_map`, A = log10(P + 1) / max P's, sides by :func:`high_contribution`.
    The paper takes 50 images of 1024 × 1024. A depends on the images' scale (log10(P + 1)), so compare models under
    the same normalisation. One map is held at a time; images whose map is not finite are left out and counted.

    Args:
        model, images, feature, batch_size, device, progress: as for :func:`contribution_map`.
        thresholds: shares of the total contribution, in [0, 1).

    Raises:
        ValueError: as for :func:`contribution_map`, or no image gives a finite map.

    Example:
        >>> net = nn.Conv2d(1, 4, 5, padding=2)
        >>> erf(net, torch.rand(2, 1, 16, 16)).sides[0.99]
        5

    Reference: arXiv 2203.06717, section 5 and appendix; arXiv 2410.08049.
    """
    high_contribution(torch.zeros(1), thresholds)
    tap = _Tap(model, feature)
    total, images_used, skipped, dtype = None, 0, 0, torch.float32
    for maps in _each(tap, images, batch_size, device, progress):
        finite = maps.flatten(1).isfinite().all(1)
        part_sum = maps[finite].double().sum(0)
        total = part_sum if total is None else total + part_sum
        images_used += int(finite.sum())
        skipped += int((~finite).sum())
        dtype = torch.promote_types(maps.dtype, torch.float32)
    if total is None or images_used == 0:
        raise ValueError(f"images={images_used + skipped}: give at least one image whose gradient is finite")
    mean = total / images_used
    log_map = log_normalised(mean)
    sides, ratios = high_contribution(log_map, thresholds)
    return ERFResult(
        mean.to(dtype), log_map.to(dtype), sides, ratios, tap.layer, images_used, skipped, tap.reading or "first"
    )
