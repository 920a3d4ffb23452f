"""Accuracy of a trained classifier when its inputs get noisy or blurred.

Noise: x + s · std · ε with ε standard normal, s in units of the data's standard deviation per channel. Blur: a Gaussian
of σ pixels (samples, voxels) along every axis, the edge value repeated outside. Both work on any number of axes. The
noise is drawn once per seed and only scaled by the level, and every model sees the same draw, so that curves differ by
the models and not by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check

__all__ = [
    "BLUR_LEVELS",
    "NOISE_LEVELS",
    "accuracy_under_blur",
    "accuracy_under_noise",
    "add_noise",
    "blur",
    "robustness",
]

#: Standard deviations of the data.
NOISE_LEVELS = (0.0, 0.1, 0.2, 0.4, 0.8)
#: Pixels.
BLUR_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0)

# Part of what a seed means: the generator is consumed in pieces of this many items.
_PIECE = 1024

Predict = Callable[[Tensor], Tensor]


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, C, \\*spatial) over its spatial axes, one axis and one channel at a time.

    The kernel is exp(−t²/2σ²), t = −r … r with r = ⌈3σ⌉, normalised to sum 1; outside, the edge value repeats.

    Args:
        x: floating-point, one or more spatial axes.
        sigma: ≥ 0 in pixels; 0 returns ``x``.

    Raises:
        ValueError: ``sigma`` is negative, or ``x`` has no spatial axis or is not floating-point.

    Example:
        >>> blur(torch.ones(1, 1, 5), 2.0).allclose(torch.ones(1, 1, 5))
        True
    """
    check(math.isfinite(sigma) and sigma >= 0, "sigma", sigma, "must be a number of pixels >= 0")
    check(x.dim() >= 3, "x", tuple(x.shape), "must be (N, C, *spatial) with at least one spatial axis")
    check(x.is_floating_point(), "x", x.dtype, "must be floating-point; convert uint8 images with x.float() / 255")
    if sigma == 0 or x.numel() == 0:
        return x
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weight = (kernel / kernel.sum()).to(x)[None, None]
    for axis in range(2, x.dim()):
        lines = x.movedim(axis, -1)
        padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (radius, radius), mode="replicate")
        x = F.conv1d(padded, weight).reshape(lines.shape).movedim(-1, axis)
    return x


def add_noise(x: Tensor, level: float, std: float | Sequence[float] | Tensor, *, generator: torch.Generator) -> Tensor:
    """x + level · std · ε, ε standard normal from ``generator`` (a CPU one, whatever device ``x`` is on).

    Args:
        x: (N, C, \\*spatial), floating-point.
        level: ≥ 0, in standard deviations.
        std: of the data, one number or one per channel.
        generator: is advanced even at level 0.

    Raises:
        ValueError: a negative level, or as many ``std`` as the channels are not.
    """
    check(math.isfinite(level) and level >= 0, "level", level, "must be a number of standard deviations >= 0")
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    return x + level * _per_channel(std, x) * noise


def accuracy_under_noise(
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    levels: Sequence[float] = NOISE_LEVELS,
    std: float | Sequence[float] | Tensor | None = None,
    seed: int = 0,
) -> list[float]:
    """Accuracy at each level of Gaussian noise.

    Args:
        predict: takes (N, C, \\*spatial) as float and returns logits (N, classes) or classes (N,).
        x: inputs; uint8 is taken as x / 255, as :func:`torchconv.data.normalise` does. Noisy values are not clipped.
        y: classes (N,).
        levels: in units of ``std``, each ≥ 0.
        std: per channel or one number, of the float values; taken from ``x`` per channel when None.
        seed: the same seed gives every model the same noise.

    Raises:
        ValueError: ``x`` and ``y`` disagree, there are no items, or a level is negative.
    """
    _check_items(x, y)
    scale = _std_of(x) if std is None else std
    for level in levels:  # before any work is done
        check(math.isfinite(level) and level >= 0, "levels", level, "each must be a number of standard deviations >= 0")

    def noisy(level: float) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for part, target in _pieces(x, y):
            yield add_noise(part, level, scale, generator=generator), target

    return [_accuracy(predict, noisy(level)) for level in levels]


def accuracy_under_blur(
    predict: Predict, x: Tensor, y: Tensor, *, levels: Sequence[float] = BLUR_LEVELS
) -> list[float]:
    """Accuracy at each σ of Gaussian blur, in pixels; arguments as in :func:`accuracy_under_noise`."""
    _check_items(x, y)
    for level in levels:
        check(math.isfinite(level) and level >= 0, "levels", level, "each must be a number of pixels >= 0")
    return [_accuracy(predict, ((blur(part, level), target) for part, target in _pieces(x, y))) for level in levels]


def robustness(
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    blur_levels: Sequence[float] = BLUR_LEVELS,
    std: float | Sequence[float] | Tensor | None = None,
    seed: int = 0,
) -> dict[str, dict[str, list[float]]]:
    """Both curves, as result files hold them: {"noise": {"levels", "accuracy"}, "blur": {"levels", "accuracy"}}.

    Example:
        >>> x, y = torch.tensor([[[-1.0, -1.0]], [[1.0, 1.0]]]), torch.tensor([0, 1])
        >>> robustness(lambda x: (x.mean((1, 2)) > 0).long(), x, y, noise_levels=[0.0], blur_levels=[1.0])["noise"]
        {'levels': [0.0], 'accuracy': [1.0]}
    """
    noise = accuracy_under_noise(predict, x, y, levels=noise_levels, std=std, seed=seed)
    blurred = accuracy_under_blur(predict, x, y, levels=blur_levels)
    return {
        "noise": {"levels": [float(v) for v in noise_levels], "accuracy": noise},
        "blur": {"levels": [float(v) for v in blur_levels], "accuracy": blurred},
    }


def _check_items(x: Tensor, y: Tensor) -> None:
    check(x.dim() >= 3, "x", tuple(x.shape), "must be (N, C, *spatial) with at least one spatial axis")
    check(x.dtype == torch.uint8 or x.is_floating_point(), "x", x.dtype, "must be uint8 or floating-point")
    check(y.shape == x.shape[:1], "y", tuple(y.shape), f"must hold one class per item of x, shape ({len(x)},)")
    check(len(x) > 0, "x", tuple(x.shape), "must hold at least one item")


def _float(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def _pieces(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(x), _PIECE):
        yield _float(x[start : start + _PIECE]), y[start : start + _PIECE]


def _std_of(x: Tensor) -> Tensor:
    """Standard deviation per channel over all items, piece by piece in float64."""
    total = square = torch.zeros((), dtype=torch.float64)
    axes = [0, *range(2, x.dim())]
    for start in range(0, len(x), _PIECE):
        part = _float(x[start : start + _PIECE]).double().cpu()
        total, square = total + part.sum(axes), square + part.square().sum(axes)
    n = x.numel() // x.shape[1]
    return (square / n - (total / n).square()).clamp_min(0).sqrt()


def _per_channel(std: Any, x: Tensor) -> Tensor:
    values = torch.as_tensor(std, dtype=torch.float32, device="cpu").reshape(-1)
    check(
        len(values) in (1, x.shape[1]), "std", values.tolist(), f"must be one number or one per channel ({x.shape[1]})"
    )
    return values.reshape(1, -1, *[1] * (x.dim() - 2)).to(x)


@torch.no_grad()
def _accuracy(predict: Predict, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    right = total = 0
    for part, target in batches:
        answer = predict(part)
        check(answer.dim() in (1, 2) and len(answer) == len(part), "predict", tuple(answer.shape),
              "must return logits (N, classes) or classes (N,)")  # fmt: skip
        classes = answer.argmax(1) if answer.dim() == 2 else answer
        right += int((classes.cpu() == target.cpu()).sum())
        total += len(part)
    return right / total
