"""PuYun: a fully convolutional network with large kernel attention that forecasts the global weather.

Zhu et al. 2024, "PuYun: Medium-Range Global Weather Forecasting Using Large Kernel Attention Convolutional Networks",
arXiv 2409.02123. Two states of 69 fields, six hours apart, and the time give the state six hours later:

    z = patches((x − μ)/σ) + Linear(time);   z ← block(z), L times, at constant resolution;   x_t + σ · shuffle(P·z)

with the blocks of :mod:`torchconv.models.forecast.van`. Weights, training code, width, depth and patches are not
public: inputs, outputs, units, order of the fields and encoding of the time are those of the authors' inference
plug-in, the sizes ours. About L·C·(3·C + 74 + 2r·C + 9r) multiply-adds a patch for L blocks of width C and ratio r, and
3·C·F·p² for F fields in patches of p × p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.models.forecast.van import VANBlock
from torchconv.ops.puyun import PADDING_MODES, pad_circular, pad_sphere

LEVELS = (50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 850, 925, 1000)  # hPa
CHANNELS = (*(f"{variable}{level}" for variable in "ztuvr" for level in LEVELS), "2t", "10u", "10v", "msl")
Fields = Tensor | Sequence[float] | float
WINDS = tuple(i for i, name in enumerate(CHANNELS) if name.strip("0123456789") in ("u", "v"))


def pad_state(
    x: Tensor, margin: int, padding_mode: str = "longitude", winds: Sequence[int] = (), pole_rows: bool = True
) -> Tensor:
    """Continue physical fields beyond the edges of their map.

    Args:
        x: (N, C, H, W), rows from pole to pole.
        margin: rows and columns added at every edge.
        padding_mode: "zeros"; "longitude", periodic columns and zeros beyond the poles; "sphere", beyond a pole the
            other side of it.
        winds: channels of vector components, whose sign changes beyond a pole.
        pole_rows: the first and last row are the poles themselves, which are not repeated.

    Shape:
        (N, C, H, W) → (N, C, H + 2·margin, W + 2·margin).

    Raises:
        ValueError: another mode, or a map on which "sphere" is impossible.

    Example:
        >>> u = torch.arange(8.0).reshape(1, 1, 2, 4)
        >>> pad_state(u, 1, "sphere", winds=[0], pole_rows=False)[0, 0, 0]
        tensor([-1., -2., -3., -0., -1., -2.])
    """
    check_choice("padding_mode", padding_mode, PADDING_MODES)
    check_positive("margin", margin, zero=True)
    if padding_mode == "zeros":
        return F.pad(x, [margin] * 4)
    if padding_mode == "longitude":
        return F.pad(pad_circular(x, (margin, margin)), [0, 0, margin, margin])
    x = pad_sphere(x, (margin, margin), (margin, margin), pole_rows)
    if not winds or not margin:
        return x
    sign = x.new_ones(x.shape[1], 1, 1)
    sign[list(winds)] = -1
    return torch.cat((x[:, :, :margin] * sign, x[:, :, margin:-margin], x[:, :, -margin:] * sign), 2)


@part(
    "puyun",
    paper="puyun",
    kind="model",
    dims=(2,),
    keywords="weather forecast global medium-range ERA5 autoregressive large kernel attention latitude longitude",
)
class PuYun(nn.Module):
    """Two states of the atmosphere and the time → the next state, all in physical units.

    Args:
        channels: fields of a state; 69 as published, see ``CHANNELS``.
        dim: width C.
        depth: blocks L.
        patch: side of the square patches that become one position.
        mlp_ratio: of the blocks' feed-forward parts.
        history: input states.
        time_features: numbers that tell the time; 4 · (history + 1) by default, see
            :func:`~torchconv.models.forecast.puyun_rollout.time_encoding`.
        padding_mode: beyond the edges, before every convolution: "longitude", periodic columns and zeros beyond the
            poles; "sphere", beyond a pole its other side; "zeros", for a part of the globe.
        norm: of the blocks: "layer", "group" or "batch"; the last needs many samples on a device.
        kernel_size, decomposition: of the attention.
        drop_path: chance of dropping a branch in training, in the last block; it grows linearly from 0.
        layer_scale: how much the branches add at first.
        margin: rows and columns that a patch sees of its neighbours.
        winds: channels whose sign changes beyond a pole in the margin; those of ``CHANNELS`` where there are 69.
        pole_rows: the first and last row are the poles.
        mean, std: of each field, (channels,) or numbers; also :meth:`set_statistics`.

    Shape:
        (N, history, channels, H, W), (N or 1, time_features) → (N, channels, H, W). Rows beyond the last whole patch
        (721: the south pole) are not looked at, and change like the row above them; columns only with "zeros".

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> net = PuYun(dim=16, depth=1)
        >>> y = net(torch.zeros(1, 2, 69, 33, 64), torch.zeros(1, 12))
        >>> y.shape
        torch.Size([1, 69, 33, 64])

    A new network forecasts persistence: its last layer is zero.

    Reference: arXiv 2409.02123, section 3.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: int = len(CHANNELS),
        dim: int = 256,
        depth: int = 12,
        patch: int = 4,
        *,
        mlp_ratio: float = 4.0,
        history: int = 2,
        time_features: int | None = None,
        padding_mode: str = "longitude",
        norm: str = "layer",
        kernel_size: int = 21,
        decomposition: int = 3,
        drop_path: float = 0.0,
        layer_scale: float = 1e-2,
        margin: int = 0,
        winds: Sequence[int] | None = None,
        pole_rows: bool = True,
        mean: Fields = 0.0,
        std: Fields = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in {"channels": channels, "dim": dim, "patch": patch, "history": history}.items():
            check_positive(name, value)
        check_positive("depth", depth, zero=True)
        check_positive("margin", margin, zero=True)
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        winds = (WINDS if channels == len(CHANNELS) else ()) if winds is None else tuple(winds)
        check(all(0 <= i < channels for i in winds), "winds", winds, f"are channels, 0 to {channels - 1}")
        features = 4 * (history + 1) if time_features is None else time_features
        check_positive("time_features", features)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.history, self.patch, self.margin = channels, history, patch, margin
        self.padding_mode, self.winds, self.pole_rows = padding_mode, winds, pole_rows
        self.grad_checkpointing = False
        self.register_buffer("mean", torch.zeros(channels, **options))
        self.register_buffer("std", torch.ones(channels, **options))
        self.embed = nn.Conv2d(history * channels, dim, patch + 2 * margin, patch, **options)
        self.time = nn.Linear(features, dim, **options)
        self.blocks = nn.ModuleList(
            VANBlock(
                dim,
                mlp_ratio,
                drop_path=drop_path * index / max(depth - 1, 1),
                layer_scale=layer_scale,
                kernel_size=kernel_size,
                decomposition=decomposition,
                padding_mode=padding_mode,
                norm=norm,
                **options,
            )
            for index in range(depth)
        )
        self.head = nn.Conv2d(dim, channels * patch * patch, 1, **options)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.set_statistics(mean, std)

    def set_statistics(self, mean: Fields, std: Fields) -> None:
        """Mean and standard deviation of each field over the training data, (channels,) or one number for all.

        Raises:
            ValueError: another shape, or a deviation that is not positive.
        """
        for name, value in {"mean": mean, "std": std}.items():
            given = torch.as_tensor(value)
            remedy = f"must be one number or one for each of the {self.channels} channels"
            check(tuple(given.shape) in ((), (self.channels,)), name, tuple(given.shape), remedy)
            ok = name == "mean" or given.is_meta or bool((given > 0).all())
            check(ok, name, value, "must be positive; leave out fields that do not vary")
            self.get_buffer(name).copy_(given)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and recompute the rest."""
        self.grad_checkpointing = enable

    def _patches(self, x: Tensor) -> Tensor:
        """Whole patches of the normalised states, each with its margin: (N, history·channels, H', W')."""
        margin = self.margin
        rows, columns = (size // self.patch * self.patch for size in x.shape[3:])
        x = (x - self.mean[:, None, None]) / self.std[:, None, None]
        x = x.flatten(1, 2)
        if margin:
            winds = tuple(t * self.channels + i for t in range(self.history) for i in self.winds)
            x = pad_state(x, margin, self.padding_mode, winds, self.pole_rows)
        return x[:, :, : rows + 2 * margin, : columns + 2 * margin]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The state after ``x``."""
        self._check(x, time)
        z = self.embed(self._patches(x)) + self.time(time.to(self.time.weight))[:, :, None, None]
        for block in self.blocks:
            again = self.grad_checkpointing and self.training
            z = checkpoint(block, z, use_reentrant=False) if again else block(z)
        change = F.pixel_shuffle(self.head(z), self.patch)
        rows, columns = x.shape[3] - change.shape[2], x.shape[4] - change.shape[3]
        if rows or columns:
            change = F.pad(change, [0, columns, 0, rows], mode="replicate")
        return x[:, -1] + self.std[:, None, None] * change

    def _check(self, x: Tensor, time: Tensor) -> None:
        ok = x.dim() == 5 and tuple(x.shape[1:3]) == (self.history, self.channels)
        check(ok, "x", tuple(x.shape), f"expected (N, {self.history}, {self.channels}, H, W)")
        features = self.time.in_features
        ok = time.dim() == 2 and time.shape[1] == features
        check(ok, "time", tuple(time.shape), f"expected (N, {features}) or (1, {features}), see time_encoding()")
        rows, columns = x.shape[3:]
        check(min(rows, columns) >= self.patch, "x", tuple(x.shape), f"holds no patch of {self.patch} × {self.patch}")
        whole = columns % self.patch == 0 or self.padding_mode == "zeros"
        check(whole, "x", tuple(x.shape), f"once around the globe must be a multiple of {self.patch} columns")


@register_model("puyun")
def puyun_toy(**options: Any) -> PuYun:
    """24 channels, 2 blocks, patches of one cell: for grids of a few degrees; 22,500 parameters and the fields'."""
    return PuYun(**{"dim": 24, "depth": 2, "patch": 1, **options})


@register_model("puyun")
def puyun_small(**options: Any) -> PuYun:
    """256 channels, 12 blocks, patches of 4 × 4."""
    return PuYun(**{"dim": 256, "depth": 12, "patch": 4, **options})


@register_model("puyun")
def puyun_base(**options: Any) -> PuYun:
    """1024 channels, 24 blocks, patches of 4 × 4."""
    return PuYun(**{"dim": 1024, "depth": 24, "patch": 4, **options})
