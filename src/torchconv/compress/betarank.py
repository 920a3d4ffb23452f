"""Which filters of a trained convolution to remove: beta-rank, the L1 norm of a filter times what it does to the data.

M. Homayounfar, M. Koohi-Moghadam, R. Rawassizadeh, V. Vardhanabhuti, "Beta-Rank: A Robust Convolutional Filter Pruning
Method For Imbalanced Medical Image Analysis", arXiv 2304.07461. A criterion that sees only weights ignores the data,
one that sees only maps is noisy for small and imbalanced sets; this one joins both, without gradients or labels:

    S_k = mean|f_k| · Σ_p σ_out(k, p) / σ_in(p)                     ("out_over_in", as the released code has it)
    S_k = mean|f_k| · Σ_p σ_in(p) / σ_out(k, p)                     ("in_over_out", as the paper has it)

p runs over output pixels; σ_in is the deviation of the receptive patch of p over batch, channels and kernel window,
σ_out that of output pixel p of filter k over the batch, before normalisation and activation. Ranks are S scaled to
[0, 1] within a layer, and the filters of the largest are kept.

Cost: one forward pass, and two reductions of every input and output, O(B·C·H·W + B·O·H'·W'), in memory of one map for
the inputs and two for the outputs. Nothing is unfolded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive, did_you_mean
from torchconv.analysis._cka_features import place
from torchconv.catalog.parts import part
from torchconv.compress._betarank_selection import (
    filter_masks,
    keep_largest,
    normalise_ranks,
    select,
    union_fraction,
)
from torchconv.compress._betarank_statistics import (
    AXES,
    RATIOS,
    Geometry,
    Spread,
    filter_norm,
    geometry_of,
)

__all__ = [
    "CRITERIA",
    "BetaRank",
    "beta_rank",
    "filter_masks",
    "hrank",
    "keep_largest",
    "l1_rank",
    "normalise_ranks",
    "select",
    "union_fraction",
]

CRITERIA = ("beta", "l1", "hrank")


def beta_rank(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    ratio: str = "out_over_in",
    axes: str = "patch",
    *,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """S of every filter of one layer, from one batch of its inputs and outputs; not yet scaled to [0, 1].

    Patches or outputs that do not change contribute nothing.

    Args:
        x: inputs of the layer.
        y: its outputs, before normalisation and activation; a bias changes nothing.
        weight: its filters.
        stride, padding, dilation, groups: of the convolution; zeros of the padding count as data.
        ratio: "out_over_in" as in the released code, "in_over_out" as in the paper. The first grows with the square of
            a filter's scale, the second does not depend on it.
        axes: "patch", the receptive patch; "released", windows over (channel, row) as the released code takes them by
            a wrong order of axes, for comparison with it (2-D, one group).
        transposed: the layer is a transposed convolution and weight (in, out / groups, *kernel).

    Shape:
        - x: (B, C, *space), B ≥ 2; y: (B, O, *space'); weight: (O, C / groups, *kernel), 1 to 3 dimensions.
        - Output: (O,), float64.

    Raises:
        ValueError: shapes that do not belong together, one sample only, unknown options.

    Example:
        >>> x, weight = torch.randn(8, 3, 9, 9), torch.randn(5, 3, 3, 3)
        >>> y = torch.nn.functional.conv2d(x, weight, padding=1)
        >>> beta_rank(x, y, weight, padding=1).shape
        torch.Size([5])

    Reference: arXiv 2304.07461, equation of R^β.
    """
    check_choice("ratio", ratio, RATIOS)
    geometry = geometry_of(weight, stride, padding, dilation, groups, transposed)
    fan_in = weight.shape[0] // groups if transposed else weight.shape[1]
    check(x.shape[1:2] == (fan_in * groups,), "x", tuple(x.shape), f"weight and groups want {fan_in * groups} channels")
    spread = Spread(geometry, _axes(axes, geometry))
    spread.add(x, y)
    return spread.score(weight, ratio)


def _axes(axes: str, geometry: Geometry) -> str:
    check_choice("axes", axes, AXES)
    plain = len(geometry.kernel_size) == 2 and geometry.groups == 1 and not geometry.transposed
    check(axes == "patch" or plain, "axes", axes, "released for 2-D convolutions of one group; use 'patch'")
    return axes


def l1_rank(weight: Tensor, positions: int = 1, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """mean|f_k| times the number of output pixels: the criterion that sees only weights.

    Args:
        weight: (O, C / groups, *kernel), or (C, O / groups, *kernel) with ``transposed``.
        positions: output pixels of a map; the same for all filters, so that it changes no order.
        groups, transposed: of the convolution.

    Returns:
        (O,), float64.

    Example:
        >>> l1_rank(torch.tensor([[[1.0, -3.0]], [[0.0, 2.0]]]), 10)
        tensor([20., 10.], dtype=torch.float64)
    """
    check_positive("positions", positions)
    return filter_norm(weight, groups, transposed) * positions


def hrank(maps: Tensor) -> Tensor:
    """HRank: the mean rank, as a matrix, of each filter's maps after the activation (arXiv 2002.10179).

    Args:
        maps: (B, O, H, W).

    Returns:
        (O,), float64.

    Example:
        >>> hrank(torch.stack([torch.eye(4), torch.ones(4, 4)])[None])
        tensor([4., 1.], dtype=torch.float64)
    """
    check(maps.dim() == 4 and len(maps) > 0, "maps", tuple(maps.shape), "must be (B, O, H, W), at least one sample")
    return torch.linalg.matrix_rank(maps.detach().float()).double().mean(0)


@part(
    "beta-rank",
    paper="betarank",
    kind="compression",
    dims=(1, 2, 3),
    keywords="filter pruning criterion importance ranking L1 HRank activation statistics imbalanced structured channel",
)
class BetaRank:
    """Ranks the filters of a network's convolutions by what they do to data, in one forward pass.

    Args:
        model: the trained network; left as it was.
        layers: names of convolutions (``nn.ConvNd``, ``nn.ConvTransposeNd``); by default all that are not depthwise,
            because depthwise filters go with their inputs.
        criterion: "beta"; "l1", which needs the data only for the sizes of maps; "hrank", the mean matrix rank of maps.
        ratio, axes: of "beta", see :func:`beta_rank`.
        batches: how many batches :meth:`collect` takes, None for all. One batch, as published, makes noisy ranks for
            small sets.
        after: for "hrank", layer → module whose output is ranked in its place (its activation); without one, the
            positive part of the layer's output.

    Raises:
        ValueError: unknown layers, criteria or options; no convolution to rank.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> ranks = BetaRank(net).collect([torch.randn(16, 3, 9, 9)])
        >>> {name: len(keep) for name, keep in select(ranks, 0.5).items()}
        {'0': 4, '2': 2}

    Reference: arXiv 2304.07461.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        criterion: str = "beta",
        ratio: str = "out_over_in",
        axes: str = "patch",
        batches: int | None = 1,
        after: Mapping[str, str] | None = None,
    ) -> None:
        check_choice("criterion", criterion, CRITERIA)
        check_choice("ratio", ratio, RATIOS)
        check_choice("axes", axes, AXES)
        if batches is not None:
            check_positive("batches", batches)
        model = getattr(model, "_orig_mod", model)  # a compiled network calls no hooks
        modules = dict(model.named_modules())
        convolutions = {n: m for n, m in modules.items() if isinstance(m, nn.modules.conv._ConvNd)}
        if layers is None:
            layers = [n for n, m in convolutions.items() if m.groups == 1 or m.groups < m.in_channels]
        check(not isinstance(layers, str), "layers", layers, "must be a list of names")
        check(len(layers) > 0, "layers", list(layers), "the model has no convolution to rank")
        for name in layers:
            check(name in convolutions, "layers", name, did_you_mean(name, convolutions))
        for name, other in (after or {}).items():
            check(name in layers, "after", name, did_you_mean(name, layers))
            check(other in modules, "after", other, did_you_mean(other, modules))
        self.model = model
        self.layers = {name: convolutions[name] for name in layers}
        self.criterion, self.ratio, self.axes, self.batches = criterion, ratio, axes, batches
        self.after = {name: modules[(after or {}).get(name, name)] for name in layers}
        for layer in self.layers.values() if criterion == "beta" else ():
            _axes(axes, Geometry.of(layer))

    @torch.no_grad()
    def scores(self, loader: Iterable[Any]) -> dict[str, Tensor]:
        """Layer → scores (O,) in float64, as :func:`beta_rank`, :func:`l1_rank` or :func:`hrank` give them.

        Layers come in the order in which they run.

        Args:
            loader: batches, tensors or sequences whose first item is one. The network runs in eval mode.

        Raises:
            ValueError: no batch, layers that did not run, maps whose sizes differ between batches.
        """
        turn = itertools.count()
        found = {n: _Meter(self, m, self.after[n] is m, turn) for n, m in self.layers.items()}
        modes = {m: m.training for m in self.model.modules()}
        taken = 0
        with ExitStack() as hooks:
            for name, meter in found.items():
                watched = self.after[name] if self.criterion == "hrank" else self.layers[name]
                hooks.callback(watched.register_forward_hook(meter).remove)
            self.model.eval()
            try:
                for batch in loader:
                    images = batch[0] if isinstance(batch, Sequence) else batch
                    check(isinstance(images, Tensor), "loader", type(images).__name__, "must give tensors of images")
                    self.model(place(self.model, images))
                    taken += 1
                    if taken == self.batches:
                        break
            finally:
                for module, mode in modes.items():
                    module.training = mode
        check(taken > 0, "loader", loader, "gave no batch")
        idle = [name for name, meter in found.items() if not meter.calls]
        check(not idle, "layers", idle, "did not run")
        return {name: meter.score() for name, meter in sorted(found.items(), key=lambda item: item[1].turn)}

    def collect(self, loader: Iterable[Any]) -> dict[str, Tensor]:
        """Layer → ranks (O,) in [0, 1], scaled within the layer; as :meth:`scores` otherwise."""
        return {name: normalise_ranks(s) for name, s in self.scores(loader).items()}


class _Meter:
    """Forward hook of one layer (or of its activation) that gathers what its score needs."""

    def __init__(self, owner: BetaRank, layer: Any, rectify: bool, turns: Iterator[int]) -> None:
        self.owner, self.layer, self.rectify, self.turns = owner, layer, rectify, turns
        self.spread = Spread(Geometry.of(layer), owner.axes)
        self.turn = self.calls = self.positions = self.samples = 0
        self.total: Tensor | float = 0.0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not self.calls:
            self.turn = next(self.turns)
        self.calls += 1
        self.positions = output[0, 0].numel()
        if self.owner.criterion == "beta":
            self.spread.add(inputs[0], output)
        elif self.owner.criterion == "hrank":
            self.total = self.total + hrank(output.relu() if self.rectify else output) * len(output)
            self.samples += len(output)

    def score(self) -> Tensor:
        if self.owner.criterion == "beta":
            return self.spread.score(self.layer.weight, self.owner.ratio)
        if self.owner.criterion == "l1":
            groups, transposed = self.layer.groups, self.layer.transposed
            return l1_rank(self.layer.weight, self.positions, groups=groups, transposed=transposed)
        return torch.as_tensor(self.total) / self.samples
