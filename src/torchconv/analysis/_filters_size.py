"""Size and number of filters: receptive fields of any module, what stacks cost, advice from images, redundancy.

    r ← r + (k − 1)·d·j,  j ← j·s   over the layers (kernel k, stride s, dilation d)

No theory fixes size and number, they depend on the data (arXiv 2410.21644, conclusion): so the advice is made from
images and says why.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchconv._common import check
from torchconv.analysis._filters_layers import TRANSPOSED, is_conv
from torchconv.analysis._filters_learned import patches, principal_filters
from torchconv.catalog import part

# What architectures chose: (kernel side, filters) of the layers, or a word.
PRESETS = {
    "LeNet-5 (LeCun 1998)": "5 @ 6, 5 @ 16, 5 @ 120",
    "AlexNet (Krizhevsky 2012)": "11 @ 96 stride 4, 5 @ 256, 3 @ 384, 3 @ 384, 3 @ 256",
    "VGG (arXiv 1409.1556)": "3 everywhere @ 64, doubled at every pooling up to 512",
    "GoogLeNet (arXiv 1409.4842)": "1, 3 and 5 side by side",
    "ResNet (arXiv 1512.03385)": "7 @ 64 stride 2, then 3, or 1-3-1",
    "ConvNeXt (arXiv 2201.03545)": "7 depthwise, 1 × 1 between",
    "RepLKNet, UniRepLKNet (arXiv 2203.06717, 2311.15599)": "13 to 31 depthwise",
}


def receptive_field(layers: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Receptive field and jump (input elements per output element) of layers one after the other.

    Args:
        layers: (kernel, stride, dilation), or its first one or two entries; stride and dilation are 1 by default.

    Example:
        >>> receptive_field([(7, 2), (3, 2), (3,), (3,)])
        (27, 4)
    """
    size, jump = 1, 1
    for layer in layers:
        kernel, stride, dilation = (*layer, *(1, 1)[len(layer) - 1 :])
        size += (kernel - 1) * dilation * jump
        jump *= stride
    return size, jump


class Field(NamedTuple):
    """What a layer's centre unit sees of the input, by axis; ``clipped`` when it reaches the input's border."""

    size: tuple[int, ...]
    jump: tuple[int, ...]
    clipped: bool


class _Average(nn.Module):
    """In the place of max pooling, whose gradient takes one path only: the same window, all of its places."""

    def __init__(self, pool: Any, ndim: int) -> None:
        super().__init__()
        self.ndim = ndim
        arguments = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        self.sizes = [(v,) * ndim if isinstance(v, int) else tuple(v) for v in arguments]
        self.original = pool.forward  # the bound method: the pooling shall not count as a layer

    def forward(self, x: Tensor) -> Tensor:
        size, stride, padding, dilation = self.sizes
        wanted = self.original(x).shape
        # Room for the incomplete last window of ceil_mode; what is too much is cut off.
        x = F.pad(x, [v for s in reversed(stride) for v in (0, s - 1)])
        kernel = x.new_full((x.shape[1], 1, *size), 1 / math.prod(size))
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[self.ndim - 1]
        out: Tensor = conv(x, kernel, None, stride, padding, dilation, x.shape[1])
        return out[tuple(slice(n) for n in wanted)]


def _positive(model: nn.Module) -> nn.Module:
    """A copy in float64 whose standard layers add and never cancel; other layers keep their weights."""
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(model).double().cpu().eval()
    pools = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, pools) and not child.return_indices:
                setattr(module, name, _Average(child, pools.index(type(child)) + 1))
    with torch.no_grad():
        for module in model.modules():
            any_module: Any = module
            weighted = isinstance(module, (*TRANSPOSED, nn.Linear)) or is_conv(module)
            if weighted:
                fan = max(1, any_module.weight[0].numel())
                any_module.weight.copy_(torch.rand(any_module.weight.shape, generator=generator).add(0.5) / fan)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()
            if weighted and any_module.bias is not None:
                any_module.bias.zero_()
    return model


@part(
    "receptive-field",
    paper="filterdesign",
    kind="analysis",
    dims=(1, 2, 3),
    keywords="theoretical receptive field jump stride layer calculator support of the gradient",
)
def receptive_fields(
    model: nn.Module, input_shape: Sequence[int], layers: Iterable[str] | None = None
) -> dict[str, Field]:
    """Theoretical receptive field and jump of every layer of any module, branches and own layers included.

    They are the support of a unit's gradient with respect to the input, measured on a copy in which convolutions and
    linear layers have positive weights, max pooling averages and normalisations are fresh. A field that reaches the
    border of the input is at least as large as reported (``clipped``): give a larger input. In networks with layers of
    this library, which may go by transforms, contributions below 1e-14 of the largest do not count.

    Args:
        model: takes one floating-point tensor. Pooling called as a function takes one path only, and is underrated.
        input_shape: (C, *spatial) of an input.
        layers: names; by default all modules without children whose class says "conv" or "pool".

    Returns:
        Name → :class:`Field`, in the order in which the layers ran.

    Raises:
        ValueError: no such layer, or one that ran without giving a feature map.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3))
        >>> receptive_fields(net, (3, 32, 32))["2"]
        Field(size=(7, 7), jump=(2, 2), clipped=False)
    """
    # Our layers may go by transforms, whose rounding reaches everywhere.
    ours = any(type(m).__module__.startswith("torchconv.") for m in model.modules())
    floor = 1e-14 if ours else 0.0
    model = _positive(model)
    modules = dict(model.named_modules())
    if layers is None:
        kinds = ("conv", "pool", "_average")
        wanted = [n for n, m in modules.items() if not any(m.children()) and _says(m, kinds)]
    else:
        wanted = list(layers)
        unknown = [n for n in wanted if n not in modules]
        check(not unknown, "layers", unknown, f"no such layers; the model has {', '.join(n for n in modules if n)}")
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == len(input_shape) + 1:
                outputs.pop(name, None)
                outputs[name] = output

        return hook

    x = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    # Two equal inputs: the first one asks the centre unit, the second one its neighbour; their distance is the jump.
    x = x.expand(2, *input_shape).clone().requires_grad_()
    handles = [modules[n].register_forward_hook(keep(n)) for n in wanted]
    with torch.enable_grad():
        model(x)
    for handle in handles:
        handle.remove()
    missing = [n for n in wanted if n not in outputs] if layers is not None else []
    check(not missing, "layers", missing, "gave no feature map of the input's number of axes")
    with torch.enable_grad():  # whatever the caller is in
        return {name: _field(output, x, floor) for name, output in outputs.items()}


def _says(module: nn.Module, words: tuple[str, ...]) -> bool:
    return any(w in type(module).__name__.lower() for w in words)


def _field(output: Tensor, x: Tensor, floor: float) -> Field:
    centre = tuple(n // 2 for n in output.shape[2:])
    neighbour = tuple(max(0, c - 1) for c in centre)
    total = torch.zeros((), dtype=x.dtype)
    for row, place in zip(output, (centre, neighbour), strict=True):
        index: tuple[Any, ...] = (slice(None), *place)
        total = total + row[index].sum()
    support = torch.autograd.grad(total, x, retain_graph=True)[0].abs().sum(1)
    size, jump, clipped = [], [], False
    for axis, n in enumerate(x.shape[2:], start=1):
        line = support.movedim(axis, 1).reshape(2, n, -1).sum(2)
        line = line > floor * line.amax(1, keepdim=True)
        places = [row.nonzero()[:, 0].tolist() or [0, -1] for row in line]
        (start, end), (before, before_end) = ((p[0], p[-1]) for p in places)
        at_start, at_end = min(start, before) == 0, max(end, before_end) == n - 1
        size.append(end - start + 1)
        ratio = round(n / output.shape[axis + 1])
        jump.append(start - before if not at_start else end - before_end if not at_end else ratio)
        clipped |= start == 0 or end == n - 1
    return Field(tuple(size), tuple(jump), clipped)


@dataclass(frozen=True)
class Advice:
    """A recommended first layer, with the reasons and the table that it comes from; ``print`` it."""

    kernel_size: int
    filters: int
    reasons: list[str] = field(default_factory=list)
    table: list[dict[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.filters} filters of {self.kernel_size}", *(f"- {r}" for r in self.reasons)]
        return "\n".join(lines)


@part(
    "filter-advice",
    paper="filterdesign",
    kind="analysis",
    dims=(1, 2, 3),
    keywords="how many filters, which kernel size, choose number and size of filters from data",
)
def advise(
    images: Tensor,
    *,
    object_size: int | None = None,
    energy: float = 0.95,
    correlation: float = 0.5,
    sizes: Sequence[int] = (3, 5, 7, 9, 11),
) -> Advice:
    """Size and number of first-layer filters for these images, and why.

    Size: the smallest candidate that reaches as far to both sides as neighbouring values are correlated by more than
    ``correlation``. Number: the smallest L such that L principal components hold the share ``energy`` of the patches'
    variance (patches less their mean per channel). No theory gives these numbers; they are where to start.

    Args:
        images: (N, C, *spatial); a few hundred are plenty.
        object_size: what a unit at the end should see, for a word on depth.
        energy: in (0, 1].
        correlation: in (0, 1).
        sizes: odd candidates, ascending; those larger than the images are left out.

    Raises:
        ValueError: images that vary nowhere, a share out of range, no candidate that fits.

    Example:
        >>> print(advise(torch.randn(50, 1, 16, 16), sizes=(3, 5)).kernel_size)
        3

    Reference: arXiv 2410.21644; arXiv 1404.3606 for the energy of components.
    """
    check(0 < energy <= 1, "energy", energy, "is a share above 0, up to 1")
    check(0 < correlation < 1, "correlation", correlation, "must be between 0 and 1")
    fitting = [k for k in sizes if k <= min(images.shape[2:])]
    check(bool(fitting), "sizes", tuple(sizes), f"none fits images of {tuple(images.shape[2:])}")
    images = images.detach()[:512]
    images = images.double() if images.dtype == torch.float64 else images.float()
    reach = _correlation_length(images, correlation)
    wanted = 2 * reach + 1
    kernel = next((k for k in fitting if k >= wanted), fitting[-1])
    ndim = images.dim() - 2
    table = []
    for k in fitting:
        count, rank = components(images, k, energy)
        table.append({"kernel": k, "filters": count, "components": rank, "weights": count * images.shape[1] * k**ndim})
    filters = int(next(row["filters"] for row in table if row["kernel"] == kernel))
    chosen = next(row for row in table if row["kernel"] == kernel)
    reasons = [
        f"values {reach} apart are the furthest that correlate by more than {correlation:g}, so that a window of "
        f"{wanted} holds what belongs together; {kernel} is "
        + ("the nearest candidate" if kernel >= wanted else "the largest"),
        f"{filters} of {chosen['components']:.0f} principal components hold {100 * energy:g} % of the variance in "
        f"windows of {kernel}; a ReLU sees one sign of a filter, so that up to {2 * filters} can be of use",
    ]
    if kernel > 3:
        n = (kernel - 1) // 2
        reasons.append(
            f"{n} layers of 3 see as far as one of {kernel}, with {n * 3**ndim} weights a pair of channels instead of "
            f"{kernel**ndim}"
        )
    if object_size is not None:
        plain = max(1, math.ceil((object_size - 1) / (kernel - 1)))
        blocks = 1
        while receptive_field([(kernel, 1), (kernel, 2)] * blocks)[0] < object_size:
            blocks += 1
        reasons.append(
            f"to see {object_size} at once takes {plain} layers of {kernel} at full size, or {2 * blocks} when every "
            "second one halves the size"
        )
    return Advice(kernel, filters, reasons, table)


def _correlation_length(images: Tensor, level: float) -> int:
    """The largest distance along an axis up to which all correlations stay above ``level``."""
    spatial = tuple(range(2, images.dim()))
    centred = images - images.mean((0, *spatial), keepdim=True)
    variance = float(centred.square().mean())
    check(variance > 0, "images", variance, "is their variance: they must vary")
    furthest = 0
    for axis in spatial:
        n, lag = images.shape[axis], 1
        while lag < n:
            product = centred.narrow(axis, lag, n - lag) * centred.narrow(axis, 0, n - lag)
            if float(product.mean()) <= level * variance:
                break
            lag += 1
        furthest = max(furthest, lag - 1)
    return furthest


def components(images: Tensor, kernel_size: int, energy: float = 0.95) -> tuple[int, int]:
    """How many principal components of patches hold a share of their variance, and how many there are.

    Example:
        >>> components(torch.ones(1, 1, 4, 4) * torch.arange(4.0), 3, 0.99)[0]
        1
    """
    channels = images.shape[1]
    taps = kernel_size ** (images.dim() - 2)
    positions = math.prod(n - kernel_size + 1 for n in images.shape[2:])
    few = images[: max(1, 200_000 // max(1, positions))]
    x = patches(few, kernel_size).unflatten(1, (channels, taps))
    x = (x - x.mean(2, keepdim=True)).flatten(1)
    _, values = principal_filters(x, 1)
    shares = values.clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
    count = int((shares < energy - 1e-6).sum()) + 1
    return min(count, len(values)), channels * (taps - 1)


def filter_report(weight: Tensor, threshold: float = 0.95) -> dict[str, Any]:
    """Redundancy of a filter bank (o, i, *kernel).

    Returns:
        ``orthogonality``: ‖WWᵀ − I‖_F of the rows of unit norm; ``effective_rank``: exp of the entropy of the singular
        values' shares; ``duplicates``: pairs (a, b) whose |cosine|, at the best shift, is above the threshold.

    Example:
        >>> filter_report(torch.eye(4).reshape(4, 1, 4))["duplicates"][:1]  # shifted copies of one another
        [(0, 1)]

    Reference: Roy and Vetterli 2007 for the effective rank.
    """
    check(weight.dim() >= 2, "weight", tuple(weight.shape), "must be (out, in, *kernel)")
    w = weight.detach().double()
    flat = w.flatten(1)
    rows = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)
    gram = rows @ rows.T
    singular = torch.linalg.svdvals(flat)
    share = singular / singular.sum().clamp_min(1e-300)
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return {
        "orthogonality": float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).norm()),
        "effective_rank": float(entropy.exp()),
        "duplicates": _duplicates(rows.reshape(w.shape), gram, threshold),
    }


def _duplicates(unit: Tensor, gram: Tensor, threshold: float) -> list[tuple[int, int]]:
    """Pairs of filters of unit norm whose |cosine|, at the best shift, is above the threshold."""
    if unit.dim() == 2:
        return [(a, b) for a, b in (gram.abs().triu(1) > threshold).nonzero().tolist()]
    # Cross-correlation at all shifts, by one transform of twice the size. No shift brings a pair above the product of
    # their magnitude spectra, which is a matrix product for all of them and leaves few pairs to look at.
    size = [2 * k - 1 for k in unit.shape[2:]]
    axes = list(range(2, unit.dim()))
    spectrum = torch.fft.rfftn(unit, size, axes)
    twice = torch.full((spectrum.shape[-1],), 2.0, dtype=unit.dtype, device=unit.device)
    twice[0] = 1.0  # an odd size: every frequency but zero stands for two
    magnitude = (spectrum.abs() * (twice / math.prod(size)).sqrt()).flatten(1)
    pairs = ((magnitude @ magnitude.T).triu(1) > threshold - 1e-9).nonzero()
    found = []
    for some in pairs.split(max(1, 4_000_000 // spectrum[0].numel())) if len(pairs) else ():
        one, two = spectrum[some[:, 0]], spectrum[some[:, 1]]
        shifted = torch.fft.irfftn((one * two.conj()).sum(1), size, [a - 1 for a in axes])
        found += some[shifted.abs().flatten(1).amax(1) > threshold].tolist()
    return [(a, b) for a, b in found]
