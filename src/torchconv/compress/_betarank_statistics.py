"""Spread of what goes into a convolution and of what comes out, summed over batches in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, ntuple, resolve_padding

AXES = ("patch", "released")
RATIOS = ("out_over_in", "in_over_out")
_CONVOLVE = (None, F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSE = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_AT_ONCE = 1 << 19  # numbers in float64 at a time: few enough for the cache, which is four times as fast as 1 << 24
# A variance below this share of the mean square is rounding: float32 resolves a spread of 1e-7 of the values.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class Geometry:
    """What a convolution looks at, whatever its weights; ``padding`` is (before, after) per axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, layer: nn.Module) -> Geometry:
        """That of an ``nn.ConvNd`` or ``nn.ConvTransposeNd``."""
        assert isinstance(layer, nn.modules.conv._ConvNd)
        padding = resolve_padding(layer.padding, layer.kernel_size, layer.dilation)
        return cls(
            layer.kernel_size,
            layer.stride,
            padding,
            layer.dilation,
            layer.groups,
            layer.transposed,
            layer.padding_mode,
        )

    def window_mean(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """(G, *space) → (G, *size): means over the receptive patches, the zeros of the padding counted as data.

        The patch of a transposed convolution is that of the convolution of the same kernel over the stretched input.
        """
        ndim = len(self.kernel_size)
        ones = maps.new_ones(1, 1, *self.kernel_size) / torch.Size(self.kernel_size).numel()
        if self.transposed:
            before = [p for p, _ in self.padding]
            whole = [
                (n - 1) * s - 2 * p + d * (k - 1) + 1
                for n, s, p, d, k in zip(
                    maps.shape[1:], self.stride, before, self.dilation, self.kernel_size, strict=True
                )
            ]
            extra = [n - w for n, w in zip(size, whole, strict=True)]
            known = all(0 <= e < max(s, d) for e, s, d in zip(extra, self.stride, self.dilation, strict=True))
            check(
                known, "y", tuple(size), f"a transposed convolution of these options gives {tuple(whole)} or a bit more"
            )
            return _TRANSPOSE[ndim](maps[:, None], ones, None, self.stride, before, extra, 1, self.dilation)[:, 0]  # type: ignore[misc]
        pads = [p for pair in reversed(self.padding) for p in pair]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(maps[:, None], pads, mode) if any(pads) else maps[:, None]
        fits = all(
            n >= d * (k - 1) + 1 for n, d, k in zip(padded.shape[2:], self.dilation, self.kernel_size, strict=True)
        )
        check(fits, "x", tuple(maps.shape[1:]), f"smaller than the kernel {self.kernel_size}")
        found = _CONVOLVE[ndim](padded, ones, None, self.stride, 0, self.dilation)[:, 0]  # type: ignore[misc]
        remedy = f"a convolution of this kernel, stride, padding and dilation gives {tuple(found.shape[1:])}"
        check(tuple(found.shape[1:]) == tuple(size), "y", tuple(size), remedy)
        return found


@dataclass
class Spread:
    """Sums for one layer: :meth:`add` batches, then read :meth:`score`.

    Sums and counts are what is accumulated, and deviations are taken once at the end: the mean of the deviations of
    several batches would be too small.
    """

    geometry: Geometry
    axes: str = "patch"
    samples: int = 0
    size: tuple[int, ...] = ()
    inputs: list[Tensor] = field(default_factory=list)  # Σx/C and Σx²/C a pixel (or what `axes` wants)
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))  # of the output, per filter and pixel
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))  # Σ(y − mean)²

    def add(self, x: Tensor, y: Tensor) -> None:
        """One batch: ``x`` (B, C, *space) into the layer, ``y`` (B, O, *space') out of it."""
        ndim = len(self.geometry.kernel_size)
        check(x.dim() == ndim + 2, "x", tuple(x.shape), f"must have a batch, channels and {ndim} spatial axes")
        check(y.dim() == ndim + 2, "y", tuple(y.shape), f"must have a batch, channels and {ndim} spatial axes")
        check(len(x) == len(y), "y", len(y), f"must hold the outputs of the {len(x)} inputs")
        groups = self.geometry.groups
        check(x.shape[1] % groups == 0, "x", tuple(x.shape), f"channels must be divisible by groups={groups}")
        size = (*x.shape[1:], *y.shape[1:])
        check(not self.samples or size == self.size, "x", tuple(x.shape), "every batch must have maps of one size")
        self.size = size
        step = max(1, _AT_ONCE // max(1, x[:1].numel(), y[:1].numel()))
        for start in range(0, len(x), step):
            self._add(_double(x[start : start + step]), _double(y[start : start + step]))

    def _add(self, x: Tensor, y: Tensor) -> None:
        rows = x.unflatten(1, (self.geometry.groups, -1))
        # Patches: one map for each group. As released: (channel, row), summed over columns.
        kept = (0, 2) if self.axes == "patch" else (0, 1, 4)
        moments = [rows.mean(2).sum(0), rows.square().mean(2).sum(0)] if kept == (0, 2) else []
        if not moments:
            moments = [rows.sum(kept), rows.square().sum(kept)]
        self.inputs = [a + b for a, b in zip(self.inputs, moments, strict=True)] if self.inputs else moments
        # Chan's update of mean and sum of squares, which does not cancel as E[y²] − E[y]² would.
        count, total = len(y), self.samples + len(y)
        mean = y.mean(0)
        squares = (y - mean).square().sum(0)
        delta = mean - self.mean.to(mean)
        self.squares = self.squares.to(mean) + squares + delta.square() * (self.samples * count / total)
        self.mean = self.mean.to(mean) + delta * (count / total)
        self.samples = total

    def output_deviation(self) -> Tensor:
        """σ_out (O, *space'), over samples; 0 where the output does not change."""
        check(self.samples > 1, "x", self.samples, "a deviation over the batch needs at least two samples")
        return _deviation(self.mean, self.squares / self.samples)

    def input_deviation(self) -> Tensor:
        """σ_in (groups, *space') of the receptive patches; 0 where they are constant (or empty, as released)."""
        check(self.samples > 1, "x", self.samples, "a deviation over the batch needs at least two samples")
        size = self.mean.shape[1:]
        if self.axes == "patch":
            means = [self.geometry.window_mean(m / self.samples, size) for m in self.inputs]
        else:
            means = self._released(size)
        return _deviation(means[0], (means[1] - means[0].square()).clamp(min=0))

    def _released(self, size: Sequence[int]) -> list[Tensor]:
        """The array (B, C, H, W) sliced as if it were (B, H, W, C): windows over channels and rows, all columns.

        No offset for the padding; the step is the quotient of the widths; windows past the end are shorter or empty.
        """
        channels, height, width = self.size[:3]
        step = width // size[1]
        choose = []
        for count, length, extent in zip(size, (channels, height), self.geometry.kernel_size, strict=True):
            first = torch.arange(count, device=self.mean.device)[:, None] * step
            position = torch.arange(length, device=self.mean.device)
            choose.append(((position >= first) & (position < first + extent)).to(self.mean))
        area = torch.outer(choose[0].sum(1), choose[1].sum(1)) * (self.samples * width)
        return [(choose[0] @ m @ choose[1].T / area.clamp(min=1))[None] for m in self.inputs]

    def score(self, weight: Tensor, ratio: str = "out_over_in") -> Tensor:
        """S (O,) in float64 for the filters of ``weight``."""
        norm = filter_norm(weight, self.geometry.groups, self.geometry.transposed).to(self.mean)
        outgoing, incoming = self.output_deviation(), self.input_deviation()
        check(len(norm) == len(outgoing), "weight", tuple(weight.shape), f"y has {len(outgoing)} channels")
        known = bool(outgoing.isfinite().all() and incoming.isfinite().all())
        check(known, "x", "nan or inf", "the layer's inputs or outputs are not finite")
        incoming = incoming.repeat_interleave(len(norm) // self.geometry.groups, 0)
        above, below = (outgoing, incoming) if ratio == "out_over_in" else (incoming, outgoing)
        valid = (outgoing > 0) & (incoming > 0)
        return norm * torch.where(valid, above / below.masked_fill(~valid, 1), 0).flatten(1).sum(1)


def geometry_of(
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    transposed: bool,
) -> Geometry:
    """That of a functional convolution."""
    ndim = weight.dim() - 2
    check(ndim in (1, 2, 3), "weight", tuple(weight.shape), "must be (out, in / groups, *kernel) of 1 to 3 dimensions")
    check(groups >= 1 and len(weight) % groups == 0, "groups", groups, f"must divide the {len(weight)} of weight")
    steps, gaps = ntuple("stride", stride, ndim), ntuple("dilation", dilation, ndim)
    kernel_size = tuple(weight.shape[2:])
    check(not (transposed and isinstance(padding, str)), "padding", padding, "a transposed convolution takes integers")
    return Geometry(kernel_size, steps, resolve_padding(padding, kernel_size, gaps), gaps, groups, transposed)


def filter_norm(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """mean|f| (O,) in float64; the weight of a transposed convolution is (in, out / groups, *kernel)."""
    size = _double(weight.detach()).abs()
    if not transposed:
        return size.flatten(1).mean(1)
    return size.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1).mean(1)


def _double(tensor: Tensor) -> Tensor:
    """In float64, on the processor where the device has none."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _deviation(mean: Tensor, variance: Tensor) -> Tensor:
    return variance.masked_fill(variance <= _ROUNDING * (variance + mean.square()), 0).sqrt()
