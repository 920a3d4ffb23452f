"""Kernels in tensor format: the shapes of the factors, the dense kernel they stand for, and convolution by either.

Tensors are named as the parameters of :class:`torchconv.ops.apriori.APrioriConv`. A kernel is (out, in/groups, *k).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchconv._common import check, check_choice, check_positive
from torchconv.ops._common import Padding, Size, conv_nd, ntuple

EXECUTIONS = ("auto", "factored", "dense")
FORMS = ("per_pair", "sequential", "cp", "tucker", "depthwise_1d")
PASSES = {1: ("vertical", "horizontal"), 2: ("vertical", "horizontal"), 3: ("depthward", "vertical", "horizontal")}
"""Names of the one-way passes; in one dimension the second is a 1 × 1 convolution."""

Factors = Mapping[str, Tensor]
Rank = int | tuple[int, int]
"""R, or for tucker (outputs, inputs) of the core."""


def factor_shapes(
    form: str, out_channels: int, in_channels: int, kernel_size: Sequence[int], rank: Rank, groups: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the factors of a form, by name.

    Raises:
        ValueError: the form is unknown, or ``rank`` is not one that it can have.
    """
    check_choice("form", form, FORMS)
    ndim, inner = len(kernel_size), in_channels // groups
    if isinstance(rank, tuple):
        check(form == "tucker" and len(rank) == 2, "rank", rank, "only tucker has two ranks, (outputs, inputs)")
    for r in rank if isinstance(rank, tuple) else (rank,):
        check_positive("rank", r)
    if form == "tucker":
        outer, within = rank if isinstance(rank, tuple) else (rank, rank)
        outer, within = min(outer, out_channels), min(within, inner)
        core = (outer, within, *kernel_size)
        return {"core": core, "outputs": (out_channels, outer), "inputs": (inner, within)}
    assert isinstance(rank, int)
    if form == "per_pair":
        return {f"axis{j}": (out_channels, inner, rank, k) for j, k in enumerate(kernel_size)}
    if form == "cp":
        sizes = (out_channels, inner, *kernel_size)
        return {"weights": (rank,)} | {f"factor_{j}": (n, rank) for j, n in enumerate(sizes)}
    if form == "depthwise_1d":
        check(rank == 1, "rank", rank, "depthwise_1d has one filter an axis and channel; leave rank unset")
        axes: dict[str, tuple[int, ...]] = {f"axis{j}": (in_channels, k) for j, k in enumerate(kernel_size)}
        return {**axes, "pointwise": (out_channels, inner)}
    check(rank % groups == 0, "rank", rank, f"the sequential form needs a multiple of groups={groups}")
    names, shapes = PASSES[ndim], {}
    for number, name in enumerate(names):
        before = in_channels if number == 0 else rank
        after = out_channels if number == len(names) - 1 else rank
        taps = [kernel_size[j] if j == number else 1 for j in range(ndim)]
        shapes[name] = (after, before // groups, *taps)
    return shapes


def default_rank(form: str, out_channels: int, in_channels: int, groups: int) -> int:
    """per_pair 1 (one filter a way for each kernel), cp as many terms as channels, the others half the channels."""
    if form in ("per_pair", "depthwise_1d"):
        return 1
    if form == "cp":
        return max(in_channels, out_channels)
    half = (min(in_channels, out_channels) + 1) // 2
    return -(-half // groups) * groups


def terms(form: str, rank: Rank, groups: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(number of products that a weight is the sum of, number of random factors in each)."""
    if form == "tucker":
        return math.prod(shapes["core"][:2]), 3
    assert isinstance(rank, int)
    if form == "sequential":
        return (rank // groups) ** (len(shapes) - 1), len(shapes)
    # λ starts at 1, so that it is no random factor.
    return rank if form in ("per_pair", "cp") else 1, len(shapes) - (form == "cp")


def _outer(axes: Sequence[Tensor], shared: int) -> Tensor:
    """Outer product of the last axes, the first ``shared`` axes kept."""
    product = axes[0]
    for axis in axes[1:]:
        place = (*axis.shape[:shared], *[1] * (product.dim() - shared), axis.shape[-1])
        product = product.unsqueeze(-1) * axis.reshape(place)
    return product


def dense_kernel(factors: Factors, form: str, groups: int = 1) -> Tensor:
    """The dense kernel (out, in/groups, \\*k) that the factors stand for.

    Args:
        factors: tensors by name, shapes as :func:`factor_shapes` gives them.
        form: "per_pair", W[o, i] = Σ_r a⁰_{oir} ⊗ … ⊗ aⁿ_{oir}; "sequential", the product of one-way convolutions;
            "cp", Σ_r λ_r · u_r ⊗ v_r ⊗ …; "tucker", a small kernel between two matrices over channels; "depthwise_1d",
            a filter an axis for each input channel, then a matrix over channels.
        groups: as in ``nn.ConvNd``.

    Example:
        >>> dense_kernel({"axis0": torch.ones(1, 1, 1, 2), "axis1": torch.tensor([[[[1.0, 2.0]]]])}, "per_pair")
        tensor([[[[1., 2.],
                  [1., 2.]]]])
    """
    check_choice("form", form, FORMS)
    if form == "per_pair":
        *axes, last = [factors[f"axis{j}"] for j in range(len(factors))]
        if not axes:
            return last.sum(2)
        product = _outer(axes, 3)
        # The sum over R is a matrix product with the last axis, so that R kernels are never held.
        flat = product.flatten(3).transpose(2, 3) @ last
        return flat.reshape(*product.shape[:2], *product.shape[3:], last.shape[3])
    if form == "cp":
        spatial = _outer([factors[f"factor_{j}"].T for j in range(2, len(factors) - 1)], 1)
        scaled = factors["factor_0"] * factors["weights"]
        flat = torch.einsum("or,ir,rt->oit", scaled, factors["factor_1"], spatial.flatten(1))
        return flat.reshape(*flat.shape[:2], *spatial.shape[1:])
    if form == "tucker":
        core = factors["core"]
        # The outputs first: two products, and nothing of the size out·in·R.
        halfway = (factors["outputs"] @ core.flatten(1)).reshape(-1, *core.shape[1:])
        return torch.einsum("iq,oq...->oi...", factors["inputs"], halfway)
    if form == "depthwise_1d":
        spatial = _outer([factors[f"axis{j}"] for j in range(len(factors) - 1)], 1)
        pointwise = factors["pointwise"]
        grouped = spatial.reshape(groups, 1, pointwise.shape[1], -1)
        flat = pointwise.reshape(groups, -1, pointwise.shape[1], 1) * grouped
        return flat.reshape(*pointwise.shape, *spatial.shape[1:])
    ndim = next(iter(factors.values())).dim() - 2
    kernel: Tensor | None = None
    for name in PASSES[ndim]:
        one = factors[name].reshape(groups, -1, factors[name].shape[1], factors[name].shape[2:].numel())
        if kernel is None:
            kernel = one  # (groups, rank, in, taps so far)
        else:
            kernel = torch.einsum("gorb,grit->goitb", one, kernel).flatten(3)
    assert kernel is not None
    sizes = [factors[name].shape[2 + j] for j, name in enumerate(PASSES[ndim][:ndim])]
    return kernel.reshape(-1, kernel.shape[2], *sizes)


def factored_conv(
    x: Tensor,
    factors: Factors,
    form: str,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    execute: str = "factored",
) -> Tensor:
    """Convolution with a kernel given by its factors.

    Args:
        x: the map.
        factors, form: see :func:`dense_kernel`.
        bias: (out,) or None, added once at the end.
        stride, padding, dilation, groups: as in ``nn.ConvNd``; each pass takes those of its own axis.
        execute: "factored" runs the passes, "dense" multiplies the kernel out; "auto" takes the passes where they need
            less than half of the multiply-adds of the dense kernel (a quarter for cp and depthwise_1d).

    Shape:
        (N, in, \\*spatial) → (N, out, \\*spatial').

    Raises:
        ValueError: an unknown form or execution, or per_pair as passes (they would need out·in·R maps).

    Reference: arXiv 2304.04964.
    """
    check_choice("execute", execute, EXECUTIONS)
    refused = form == "per_pair" and execute == "factored"
    check(not refused, "execute", execute, "per_pair as passes needs out·in·R maps; use 'auto' or 'dense'")
    ndim = x.dim() - 2
    if execute == "dense" or (execute == "auto" and not _passes_pay(factors, form, ndim, groups)):
        return conv_nd(x, dense_kernel(factors, form, groups), bias, stride, padding, dilation, groups)
    strides, dilations = ntuple("stride", stride, ndim), ntuple("dilation", dilation, ndim)
    pads = padding if isinstance(padding, str) else ntuple("padding", padding, ndim, least=0)
    one = (1,) * ndim

    def along(x: Tensor, kernel: Tensor, axis: int, bias: Tensor | None, groups: int) -> Tensor:
        """A pass over one axis, with this axis' stride, padding and dilation."""
        here = [j == axis for j in range(ndim)]
        s = tuple(v if h else 1 for v, h in zip(strides, here, strict=True))
        d = tuple(v if h else 1 for v, h in zip(dilations, here, strict=True))
        p = pads if isinstance(pads, str) else tuple(v if h else 0 for v, h in zip(pads, here, strict=True))
        return conv_nd(x, kernel, bias, s, p, d, groups)

    def channels(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv_nd(x, matrix.reshape(*matrix.shape, *one), bias, groups=groups)

    if form == "sequential":
        names = PASSES[ndim]
        for number, name in enumerate(names):
            x = along(x, factors[name], number, bias if number == len(names) - 1 else None, groups)
        return x
    if form == "tucker":
        core = factors["core"]
        x = channels(x, factors["inputs"].T.repeat(groups, 1))
        x = conv_nd(x, core.repeat(groups, *[1] * (core.dim() - 1)), None, strides, padding, dilations, groups)
        return channels(x, factors["outputs"], bias)
    if form == "cp":
        x = channels(x, factors["factor_1"].T.repeat(groups, 1))
        axes = [factors[f"factor_{j + 2}"].T.repeat(groups, 1) for j in range(ndim)]
        last = factors["factor_0"] * factors["weights"]
    else:
        axes, last = [factors[f"axis{j}"] for j in range(ndim)], factors["pointwise"]
    for j, axis in enumerate(axes):
        taps = [axis.shape[1] if i == j else 1 for i in range(ndim)]
        x = along(x, axis.reshape(len(axis), 1, *taps), j, None, len(axis))
    return channels(x, last, bias)


def pass_macs(factors: Factors, form: str, groups: int) -> int:
    """Multiply-adds a position as passes: what cp's and tucker's groups share is stored once and run for each group."""
    once = {"cp": ("factor_0", "weights"), "tucker": ("outputs",)}.get(form, tuple(factors))
    return sum(f.numel() * (1 if name in once else groups) for name, f in factors.items() if name != "weights")


def _passes_pay(factors: Factors, form: str, ndim: int, groups: int) -> bool:
    """Passes move more memory a multiply-add than one dense convolution, depthwise ones most: factors as measured."""
    if form == "per_pair":
        return False
    passes = pass_macs(factors, form, groups)
    if form == "cp":
        out, inner = factors["factor_0"].shape[0], factors["factor_1"].shape[0]
        taps = math.prod(factors[f"factor_{j + 2}"].shape[0] for j in range(ndim))
    elif form == "tucker":
        out, inner = factors["outputs"].shape[0], factors["inputs"].shape[0]
        taps = factors["core"].shape[2:].numel()
    elif form == "sequential":
        names = PASSES[ndim]
        out, inner = factors[names[-1]].shape[0], factors[names[0]].shape[1]
        taps = math.prod(factors[name].shape[2:].numel() for name in names)
    else:
        out, inner = factors["pointwise"].shape
        taps = math.prod(factors[f"axis{j}"].shape[1] for j in range(ndim))
    return (4 if form in ("cp", "depthwise_1d") else 2) * passes < out * inner * taps
