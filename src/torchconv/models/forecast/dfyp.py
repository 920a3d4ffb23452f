"""DFYP for MODIS: a convolutional and a transformer branch on histograms of a county, added with learned weights.

Zhang, Yan, Zhang, Miao, Wang 2025, "DFYP: A Dynamic Fusion Framework with Spectral Channel Attention and Adaptive
Operator Learning for Crop Yield Prediction", arXiv 2507.05849. The network for Sentinel-2 is in ``dfyp_sentinel``.

    s = attention(x)                                            maximum pooling
    y = a₁ · cnn(ω · edges_year(s) + (1 − ω) · s) + a₂ · vit(s)

26,790,713 parameters for 32 dates, of which the first of two linear layers in a row holds 16.8 million: ``merge()``
makes one of 8 thousand from the two. Parameter names are those of the authors' checkpoints.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.models.forecast.dfyp_vit import ViT, convert_tokens
from torchconv.ops._common import check_input
from torchconv.ops.dfyp import OperatorRouter, ResolutionAttention, blend
from torchconv.ops.dfyp_yield import ConvBlock

Years = Sequence[Hashable] | Tensor | int | None
# The operator of each year that the authors found best for its validation set.
YEARS = {
    2009: "scharr",
    2010: "scharr",
    2011: "sobel",
    2012: "learnable",
    2013: "scharr",
    2014: "learnable",
    2015: "sobel",
}
WIDTHS = (128, 256, 256, 512, 512, 512)


class ConvBranch(nn.Module):
    """Edges of the year blended in, convolution blocks of strides 1, 2, 1, 2, …, two linear layers in a row.

    Args:
        in_chans: bands.
        size: dates and bins.
        num_classes: outputs.
        widths: channels of the blocks.
        hidden: width between the linear layers.
        table, default, soft: see :class:`~torchconv.ops.dfyp.OperatorRouter`.
        dropout: in the blocks.

    Shape:
        (N, in_chans, dates, bins), years → (N, num_classes).
    """

    def __init__(
        self,
        in_chans: int,
        size: tuple[int, int],
        num_classes: int,
        widths: Sequence[int],
        hidden: int,
        table: Mapping[Hashable, str],
        default: str,
        soft: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.operator_router = OperatorRouter(table, default, soft)
        self.operator_weight = nn.Parameter(torch.tensor(0.5))
        strides = [1 + index % 2 for index in range(len(widths))]
        self.convblocks = nn.ModuleList(
            ConvBlock(before, after, 3, stride, dropout)
            for before, after, stride in zip((in_chans, *widths), widths, strides, strict=False)
        )
        self.reduced = tuple(_halved(n, sum(s == 2 for s in strides)) for n in size)
        features = widths[-1] * self.reduced[0] * self.reduced[1]
        self.dense_layers = nn.Sequential(nn.Linear(features, hidden), nn.Linear(hidden, num_classes))
        for name, parameter in self.dense_layers.named_parameters():
            (nn.init.zeros_ if name.endswith("bias") else nn.init.kaiming_uniform_)(parameter)

    def param_options(self) -> dict[str, dict[str, float]]:
        """The share of the edges is not decayed; it would fall to zero."""
        return {"operator_weight": {"weight_decay": 0.0}}

    def edges(self, x: Tensor, years: Years) -> Tensor:
        """Of each item by the operator of its year; one year may stand for all."""
        router = self.operator_router
        if isinstance(years, int) and router.logits is None:
            y: Tensor = router.operators[router.kinds([years])[0]](x)
            return y
        z: Tensor = router(x, None if isinstance(years, int) else years)
        return z

    def forward_features(self, x: Tensor, years: Years = None) -> Tensor:
        """What the last linear layer reads: (N, hidden), or in the inference form the flat maps of the last block."""
        y = blend(x, self.edges(x, years), self.operator_weight)
        for block in self.convblocks:
            y = block(y)
        z: Tensor = self.dense_layers[:-1](y.flatten(1))
        return z

    def forward(self, x: Tensor, years: Years = None) -> Tensor:
        """Apply the branch."""
        y: Tensor = self.dense_layers[-1](self.forward_features(x, years))
        return y

    def merge(self) -> ConvBranch:
        """The same branch with its batch norms folded and its two linear layers as one, for inference."""
        twin = copy.deepcopy(self).eval()
        for index, block in enumerate(self.convblocks):
            assert isinstance(block, ConvBlock)
            twin.convblocks[index] = block.merge()
        if len(self.dense_layers) == 2:
            first, second = (layer.get_parameter("weight") for layer in self.dense_layers)
            inner, outer = (layer.get_parameter("bias") for layer in self.dense_layers)
            weight = second.detach().double() @ first.detach().double()
            bias = second.detach().double() @ inner.detach().double() + outer.detach()
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight, linear.bias = (nn.Parameter(t.to(first.dtype)) for t in (weight, bias))
            twin.dense_layers = nn.Sequential(linear)
        return twin


def _halved(length: int, times: int) -> int:
    return -(-length // 2**times)


@part(
    "dfyp-net",
    paper="dfyp",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="crop yield prediction regression MODIS histogram satellite agriculture CNN ViT fusion",
)
class DFYPNet(nn.Module):
    """Yield of a county from its histograms by band and date.

    Args:
        time: dates T of the input. Inputs may have fewer, as long as the convolutions reduce them to as many rows.
        in_chans: bands.
        num_classes: outputs.
        num_periods, num_bins: dates for which the transformer holds positions (``time`` may be smaller), and bins.
        table, default, soft: operator by year, see :class:`~torchconv.ops.dfyp.OperatorRouter`.
        reduction: of the channel attention.
        widths: channels of the convolution blocks, of strides 1, 2, 1, 2, ….
        hidden: width between the two linear layers.
        patch_size, dim, depth, heads, dim_head, mlp_dim: of the transformer, see
            :class:`~torchconv.models.forecast.dfyp_vit.ViT`; patches must tile the input.
        dropout, emb_dropout: in the transformer.
        conv_dropout: in the convolution blocks; 0.5 as published, whatever ``dropout`` is.

    Shape:
        x (N, in_chans, T, num_bins), years: N of them, one for all, or None for the default → (N, num_classes).

    Raises:
        ValueError: an argument is out of range, or an input of another size.

    Example:
        >>> net = DFYPNet(20, table={2009: "scharr"}, widths=(8, 12), hidden=16, dim=8, depth=1, mlp_dim=16).eval()
        >>> net(torch.zeros(2, 9, 20, 32), [2009, 2010]).shape
        torch.Size([2, 1])

    Reference: arXiv 2507.05849.
    """

    def __init__(
        self,
        time: int = 32,
        in_chans: int = 9,
        num_classes: int = 1,
        num_periods: int = 32,
        num_bins: int = 32,
        *,
        table: Mapping[Any, str] | None = None,
        default: str = "learnable",
        soft: bool = False,
        reduction: int = 16,
        widths: Sequence[int] = WIDTHS,
        hidden: int = 2048,
        patch_size: int = 4,
        dim: int = 256,
        depth: int = 4,
        heads: int = 8,
        dim_head: int = 64,
        mlp_dim: int = 512,
        dropout: float = 0.5,
        emb_dropout: float = 0.1,
        conv_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_positive("time", time)
        check_positive("num_periods", num_periods)
        check_positive("num_bins", num_bins)
        check_positive("hidden", hidden)
        check(time <= num_periods, "time", time, f"positions are held for num_periods={num_periods}; raise that")
        check(len(widths) > 0, "widths", widths, "needs the channels of one block or more")
        years: dict[Hashable, str] = {_year(key): kind for key, kind in (table or {}).items()}
        self.in_chans, self.num_classes, self.num_bins = in_chans, num_classes, num_bins
        self.se_block = ResolutionAttention(in_chans, reduction, "max")
        size = (time, num_bins)
        branch = (in_chans, size, num_classes, tuple(widths), hidden, years, default, soft, conv_dropout)
        self.cnn_model = ConvBranch(*branch)
        self.vit_model = ViT(
            (num_periods, num_bins),
            patch_size,
            in_chans,
            num_classes,
            dim,
            depth,
            heads,
            dim_head,
            mlp_dim,
            dropout,
            emb_dropout,
        )
        self.a1 = nn.Parameter(torch.tensor(0.5))
        self.a2 = nn.Parameter(torch.tensor(0.5))

    def param_options(self) -> dict[str, dict[str, float]]:
        """The weights of the branches are not decayed."""
        return {name: {"weight_decay": 0.0} for name in ("a1", "a2")}

    def branches(self, x: Tensor, years: Years = None) -> tuple[Tensor, Tensor]:
        """What the convolutional and the transformer branch say, before they are weighted: (N, num_classes) each."""
        check_input(x, self.in_chans, 2)
        blocks, reduced = self.cnn_model.convblocks, self.cnn_model.reduced
        steps = len(blocks) // 2
        if (_halved(x.shape[2], steps), _halved(x.shape[3], steps)) != reduced:
            dates, bins = (f"{(n - 1) * 2**steps + 1} to {n * 2**steps}" for n in reduced)
            raise ValueError(f"x of shape {tuple(x.shape)}: this network takes {dates} dates and {bins} bins; pad it")
        self.vit_model.check(x)
        s = self.se_block(x)
        return self.cnn_model(s, years), self.vit_model(s)

    def forward(self, x: Tensor, years: Years = None) -> Tensor:
        """The yields."""
        cnn, vit = self.branches(x, years)
        return self.a1 * cnn + self.a2 * vit

    def merge(self) -> DFYPNet:
        """The same network with batch norms folded and two linear layers as one, for inference: 10 million weights."""
        twin = copy.deepcopy(self).eval()
        twin.cnn_model = self.cnn_model.merge()
        return twin


def _year(key: Any) -> int:
    """A year as an integer, also where JSON has made a text of it."""
    try:
        return int(key)
    except (TypeError, ValueError):
        raise ValueError(f"table={key!r}: keys must be years") from None


_FIXED = re.compile(r"(^|\.)(sobel|scharr|kernel)_[xy]$")


def convert_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state under this library's names: constant kernels dropped, tokens with a batch axis.

    Example:
        >>> state = {"vit_model.cls_token": torch.zeros(1, 8), "cnn_model.operator_gate.sobel.kernel_x": torch.ones(3)}
        >>> {n: tuple(t.shape) for n, t in convert_official(state).items()}
        {'vit_model.cls_token': (1, 1, 8)}
    """
    kept = {n: t for n, t in state.items() if not _FIXED.search(n)}
    return convert_tokens(convert_tokens(kept), "vit_model.")


def read_vit(state: Mapping[str, Tensor], heads: int, prefix: str = "vit_model.") -> dict[str, Any]:
    """Options of :class:`~torchconv.models.forecast.dfyp_vit.ViT` that shapes tell, apart from image and patch."""
    layers = {n.split(".")[2] for n in (n.removeprefix(prefix) for n in state) if n.startswith("transformer.layers.")}
    found: dict[str, Any] = {
        "num_classes": state[f"{prefix}mlp_head.weight"].shape[0],
        "dim": state[f"{prefix}mlp_head.weight"].shape[1],
        "depth": len(layers),
    }
    if layers:
        block = f"{prefix}transformer.layers.0."
        found["mlp_dim"] = state[f"{block}1.net.1.weight"].shape[0]
        found["dim_head"] = state[f"{block}0.to_qkv.weight"].shape[0] // (3 * heads)
    return found


def read_official(state: Mapping[str, Tensor], heads: int = 8, num_bins: int = 32) -> dict[str, Any]:
    """Options of :class:`DFYPNet` that the shapes of a state tell; heads and bins they do not."""
    if not {"cnn_model.dense_layers.0.weight", "cnn_model.convblocks.0.conv.weight"} <= set(state):
        return {}  # of another network: loading it lists what does not fit
    convs = [n for n in state if re.fullmatch(r"cnn_model\.convblocks\.\d+\.conv\.weight", n)]
    widths = tuple(state[f"cnn_model.convblocks.{i}.conv.weight"].shape[0] for i in range(len(convs)))
    dense = state["cnn_model.dense_layers.0.weight"]
    steps = len(widths) // 2
    in_chans = state["se_block.fc.0.weight"].shape[1]
    patch = round((state["vit_model.to_patch_embedding.2.weight"].shape[1] / in_chans) ** 0.5)
    periods = (state["vit_model.pos_embedding"].shape[-2] - 1) * patch // (num_bins // patch)
    rows = dense.shape[1] // (widths[-1] * _halved(num_bins, steps))
    return {
        **read_vit(state, heads),
        "time": min(rows * 2**steps, periods),
        "in_chans": in_chans,
        "num_periods": periods,
        "num_bins": num_bins,
        "reduction": in_chans // state["se_block.fc.0.weight"].shape[0],
        "widths": widths,
        "hidden": dense.shape[0],
        "patch_size": patch,
        "heads": heads,
    }


@register_model("dfyp")
def dfyp_modis(**options: Any) -> DFYPNet:
    """DFYP for MODIS histograms, with the published operators by year; 26,790,713 parameters for 32 dates."""
    return DFYPNet(**{"table": YEARS, **options})
