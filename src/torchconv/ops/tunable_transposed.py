"""Tunable transposed convolution (arXiv 2304.00898 has the plain one; see :mod:`torchconv.ops.tunable`).

Kernels follow ``nn.ConvTransposeNd``, (in, out/groups, \\*kernel), behind the axes of the slots.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check
from torchconv.catalog import part
from torchconv.kernels._layout import keep_layout
from torchconv.ops._common import Size, check_channels, check_input, ntuple
from torchconv.ops._tunable_mixing import Params, Tunable
from torchconv.ops.tunable import mix, one_or_each

_TRANSPOSE: tuple[Any, ...] = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_TRANSPOSED: tuple[Any, ...] = (nn.Module, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def tunable_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mixing: Tensor,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """Transposed convolution with a mixed kernel, one for the batch or one for each item.

    Args:
        x: the map.
        weight: (N, in, out/groups, \\*kernel).
        bias: (N, out) or None.
        mixing: (N,) or (1, N) for the whole batch, or (B, N).
        stride, padding, output_padding, groups, dilation: as in ``nn.ConvTransposeNd``.

    Shape:
        (B, in, \\*spatial) → (B, out, \\*spatial').

    Raises:
        ValueError: a ``mixing`` of another shape.

    Reference: the layer of arXiv 2304.00898, transposed.
    """
    transpose = _TRANSPOSE[x.dim() - 2]
    mixing = one_or_each(mixing, weight.shape[0], x.shape[0])
    if mixing.dim() == 1:
        beta = None if bias is None else mix(mixing, bias)
        y: Tensor = transpose(x, mix(mixing, weight), beta, stride, padding, output_padding, groups, dilation)
        return y
    if torch.compiler.is_exporting() or x.shape[0] == 0:
        # All N kernels, then the mixture of the results: a graph for any batch size.
        parts = [transpose(x, w, None, stride, padding, output_padding, groups, dilation) for w in weight]
        y = torch.einsum("bn,bno...->bo...", mixing.to(x.dtype), torch.stack(parts, 1))
    else:
        flat, kernels = x.flatten(0, 1).unsqueeze(0), mix(mixing, weight).flatten(0, 1)
        y = transpose(flat, kernels, None, stride, padding, output_padding, groups * x.shape[0], dilation)
        y = keep_layout(y.reshape(x.shape[0], -1, *y.shape[2:]), x)
    return y if bias is None else y + mix(mixing, bias).reshape(-1, y.shape[1], *[1] * (x.dim() - 2))


class TunableConvTranspose(Tunable):
    """Transposed convolution whose kernel is mixed by ω.

    Args:
        in_channels, out_channels: channels, both divisible by ``groups``.
        kernel_size, stride, padding, output_padding, groups, bias, dilation: as in ``nn.ConvTransposeNd``.
        num_params, expand_params, mode: as in :class:`~torchconv.ops.tunable.TunableConv`.

    Shape:
        x (B, in_channels, \\*spatial), params (P,), (1, P) or (B, P) → (B, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> TunableConvTranspose2d(4, 3, 2, stride=2)(torch.zeros(1, 4, 5, 6)).shape
        torch.Size([1, 3, 10, 12])
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        *,
        num_params: int = 2,
        expand_params: int = 1,
        mode: str = "mlp",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_params, expand_params, mode, device=device, dtype=dtype)
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.padding = ntuple("padding", padding, self.ndim, least=0)
        self.output_padding = ntuple("output_padding", output_padding, self.ndim, least=0)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        limits = [max(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]
        fits = all(p < limit for p, limit in zip(self.output_padding, limits, strict=True))
        check(fits, "output_padding", output_padding, f"must be smaller than stride or dilation, {tuple(limits)}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (1, self.num_kernels, in_channels, out_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.empty(1, self.num_kernels, out_channels, **options)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_conv(cls, conv: nn.Module, num_params: int = 2, expand_params: int = 1, mode: str = "mlp") -> Self:
        """A tunable layer whose N kernels are copies of a plain ``nn.ConvTransposeNd``: the same map where Σω = 1."""
        kinds = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
        if not isinstance(conv, kinds) or conv.weight.dim() != cls.ndim + 2:
            raise ValueError(f"conv={type(conv).__name__}: expected an nn.{_TRANSPOSED[cls.ndim].__name__}")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,  # type: ignore[arg-type]
            conv.output_padding,
            conv.groups,
            conv.bias is not None,
            conv.dilation,
            num_params=num_params,
            expand_params=expand_params,
            mode=mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer._copy_into_slots({"weight": conv.weight, "bias": conv.bias})
        return layer.train(conv.training)

    def reset_parameters(self) -> None:
        """Each kernel and bias as PyTorch draws those of a plain transposed convolution."""
        bound = torch.Size(self.weight.shape[3:]).numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.mlp is not None:
            self.mlp.reset_parameters()

    def _options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.output_padding, self.groups, self.dilation

    def forward(self, x: Tensor, params: Params | None = None) -> Tensor:
        """Apply the kernels mixed by ``params``, by default by ``tuning``."""
        check_input(x, self.in_channels, self.ndim)
        bias = None if self.bias is None else self.bias[0]
        return tunable_conv_transpose(x, self.weight[0], bias, self.mixing(params, x.shape[0]), *self._options())

    def merge(self, params: Params | None = None) -> nn.Module:
        """The plain ``nn.ConvTransposeNd`` at one ω, by default at ``tuning``."""
        mixing = self._mixing_for_merge(params)
        weight = self.weight.detach()
        conv: nn.Module = _TRANSPOSED[self.ndim](
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.bias is not None,
            self.dilation,
            device=weight.device,
            dtype=weight.dtype,
        )
        state = {"weight": mix(mixing, weight[0])}
        if self.bias is not None:
            state["bias"] = mix(mixing, self.bias.detach()[0])
        conv.load_state_dict(state)
        return conv.eval()

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, output_padding={self.output_padding}, groups={self.groups}, "
            f"bias={self.bias is not None}, dilation={self.dilation}, {self._describe()}"
        )


class TunableConvTranspose1d(TunableConvTranspose):
    """Tunable transposed convolution over (B, C, L)."""

    ndim = 1


@part(
    "tunable-transposed",
    paper="tunable",
    kind="layer",
    dims=(2,),
    mixes="space+channels",
    merges="self",
    probe={"build": {"in_channels": 4, "out_channels": 3, "kernel_size": 3, "stride": 2}, "inputs": [[2, 4, 5, 6]]},
    keywords="tunable transposed deconvolution upsampling kernels mixture",
)
class TunableConvTranspose2d(TunableConvTranspose):
    """Tunable transposed convolution over (B, C, H, W)."""

    ndim = 2


class TunableConvTranspose3d(TunableConvTranspose):
    """Tunable transposed convolution over (B, C, D, H, W)."""

    ndim = 3
