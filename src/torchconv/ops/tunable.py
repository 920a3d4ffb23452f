"""Tunable convolution: several kernels mixed by a small vector ω that is chosen when the network is used.

Maggioni, Tanay, Babiloni, McDonagh, Leonardis 2023, "Tunable Convolutions with Parametric Multi-Loss Optimization",
arXiv 2304.00898 (CVPR 2023).

A layer holds N = P·E kernels; P numbers ω (denoising strength, distortion against perception …) say how they mix:

    a = ω   or   a = A·ω + c,   W = Σ_n a_n · W_n,   β = Σ_n a_n · β_n,   y = W ∗ x + β

In training ω is drawn for every item and weighs the losses too (:mod:`torchconv.ops.tunable_loss`), which ties each
kernel to an objective. N times the parameters of a plain convolution, plus P·N + N of the affine map; one weighted sum
of N kernels for each ω, N·|W| multiply-adds, on top of the plain convolution; nothing once ω is fixed by ``merge``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice
from torchconv.catalog import part
from torchconv.kernels._layout import keep_layout
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_channels,
    check_input,
    check_padding,
    conv_nd,
    make_conv,
    ntuple,
)
from torchconv.ops._tunable_mixing import Params, Tunable, set_tuning, tuned

BACKENDS = ("auto", "grouped", "basis")
__all__ = [
    "TunableConv",
    "TunableConv1d",
    "TunableConv2d",
    "TunableConv3d",
    "mix",
    "set_tuning",
    "tunable_conv",
    "tuned",
]


def mix(mixing: Tensor, slots: Tensor) -> Tensor:
    """Weighted sum over the slots: mixing (N,) or (B, N), slots (N, …) → (…) or (B, …)."""
    rows = slots.flatten(1) if slots.dim() > 1 else slots.unsqueeze(1)
    return (mixing.to(slots.dtype) @ rows).reshape(*mixing.shape[:-1], *slots.shape[1:])


def one_or_each(mixing: Tensor, slots: int, batch: int) -> Tensor:
    """``mixing`` for the whole batch, (N,), or for each item, (B, N); a single row is for all."""
    shape = tuple(mixing.shape)
    fits = len(shape) in (1, 2) and shape[-1] == slots
    if fits and len(shape) == 2 and not torch.compiler.is_exporting() and shape[0] != batch:
        fits = shape[0] == 1
        mixing = mixing.flatten()
    if not fits:
        raise ValueError(f"mixing of shape {shape}: expected ({slots},) or ({batch}, {slots})")
    return mixing


def tunable_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mixing: Tensor,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolution whose kernel is a mixture, one for the batch or one for each item.

    y_b = (Σ_n a_bn W_n) ∗ x_b + Σ_n a_bn β_n.

    Args:
        x: the map.
        weight: (N, out, in/groups, \\*kernel).
        bias: (N, out) or None.
        mixing: (N,) or (1, N) for the whole batch, or (B, N).
        stride, padding, dilation, groups: as in ``nn.ConvNd``; "same" gives ceil(L / stride).
        backend: for (B, N): "grouped" mixes kernels and is one convolution with B·groups groups; "basis" convolves
            with all N kernels and mixes the results, N times the multiply-adds. "auto" is "grouped" (measured: 1.2 to
            4 times faster on a CPU), except for an empty batch and in exported graphs, which then fit any batch.

    Shape:
        (B, in, \\*spatial) → (B, out, \\*spatial').

    Raises:
        ValueError: an unknown backend, or a ``mixing`` of another shape.

    Example:
        >>> weight = torch.tensor([1.0, 10.0]).reshape(2, 1, 1, 1)
        >>> tunable_conv(torch.ones(2, 1, 1), weight, None, torch.tensor([[1.0, 0.0], [0.5, 0.5]])).flatten()
        tensor([1.0000, 5.5000])

    Reference: arXiv 2304.00898, section 3.1.
    """
    check_choice("backend", backend, BACKENDS)
    mixing = one_or_each(mixing, weight.shape[0], x.shape[0])
    if mixing.dim() == 1:
        beta = None if bias is None else mix(mixing, bias)
        return conv_nd(x, mix(mixing, weight), beta, stride, padding, dilation, groups)

    def convolve(x: Tensor, kernels: Tensor, groups: int) -> Tensor:
        return conv_nd(x, kernels, None, stride, padding, dilation, groups)

    if backend == "basis" or (backend == "auto" and (torch.compiler.is_exporting() or x.shape[0] == 0)):
        slots, out, *rest = weight.shape
        # Slots beside the outputs within each group, so that one grouped convolution serves all of them.
        bank = weight.reshape(slots, groups, out // groups, *rest).transpose(0, 1).reshape(slots * out, *rest)
        y = convolve(x, bank, groups).unflatten(1, (groups, slots, out // groups))
        y = torch.einsum("bn,bgno...->bgo...", mixing.to(y.dtype), y).flatten(1, 2)
    else:
        kernels = mix(mixing, weight)
        y = convolve(x.flatten(0, 1).unsqueeze(0), kernels.flatten(0, 1), x.shape[0] * groups)
        y = keep_layout(y.reshape(x.shape[0], weight.shape[1], *y.shape[2:]), x)
    return y if bias is None else y + mix(mixing, bias).reshape(-1, y.shape[1], *[1] * (x.dim() - 2))


@part(
    "tunable",
    paper="tunable",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": 3},
    keywords="tunable controllable kernels mixture multi-loss trade-off restoration strength omega interactive control",
)
class TunableConv(Tunable):
    """Convolution whose kernel is mixed from N = num_params · expand_params kernels by a tuning vector ω.

    Called with one argument it uses the vector set by :meth:`set_tuning` (1/P each at first), so that it stands
    wherever a plain convolution does; ``layer(x, params)`` takes ω (a tensor or numbers) from the caller, one for all
    or one for each item. ``weight`` (1, N, out, in/groups, \\*kernel), ``bias`` (1, N, out), ``mlp.weight`` and
    ``mlp.bias`` have the authors' names and shapes.

    Args:
        in_channels, out_channels: channels, both divisible by ``groups``; ``out_channels`` unset is ``in_channels``.
        kernel_size, stride, padding, dilation, groups, bias: as in ``nn.ConvNd``; "same" at any stride.
        num_params: P, length of ω (number of objectives).
        expand_params: E, kernels for each entry of ω; above 1 the affine map is used in both modes.
        mode: "mlp" for a = A·ω + c (one affine map, no activation), "linear" for a = ω.
        backend: see :func:`tunable_conv`.

    Shape:
        x (B, in_channels, \\*spatial), params (P,), (1, P) or (B, P) → (B, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = TunableConv2d(3, 8, 3, num_params=2, mode="linear")
        >>> layer(torch.zeros(4, 3, 9, 9), torch.tensor([0.2, 0.8])).shape
        torch.Size([4, 8, 9, 9])
        >>> layer.merge([0.2, 0.8])
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))

    Reference: Maggioni et al., arXiv 2304.00898.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        num_params: int = 2,
        expand_params: int = 1,
        mode: str = "mlp",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_params, expand_params, mode, device=device, dtype=dtype)
        out_channels = in_channels if out_channels is None else out_channels
        check_channels(in_channels, out_channels, groups)
        check_padding(padding, self.ndim)
        check_choice("backend", backend, BACKENDS)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.padding, self.backend = padding, backend
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (1, self.num_kernels, out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.empty(1, self.num_kernels, out_channels, **options)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_conv(cls, conv: nn.Module, num_params: int = 2, expand_params: int = 1, mode: str = "mlp") -> Self:
        """A tunable layer whose N kernels are copies of a plain ``nn.ConvNd``: the same map wherever Σω = 1.

        Raises:
            ValueError: ``conv`` is no ``nn.ConvNd`` of this dimension, or pads with other values than zeros.
        """
        name = CONV[cls.ndim].__name__
        if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) or conv.weight.dim() != cls.ndim + 2:
            raise ValueError(f"conv={type(conv).__name__}: expected an nn.{name}")
        check(conv.padding_mode == "zeros", "padding_mode", conv.padding_mode, "only zero padding can be made tunable")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            num_params=num_params,
            expand_params=expand_params,
            mode=mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer._copy_into_slots({"weight": conv.weight, "bias": conv.bias})
        return layer.train(conv.training)

    def reset_parameters(self) -> None:
        """Each kernel and bias as PyTorch draws those of a plain convolution; likewise the affine map."""
        bound = torch.Size(self.weight.shape[3:]).numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.mlp is not None:
            self.mlp.reset_parameters()

    def forward(self, x: Tensor, params: Params | None = None) -> Tensor:
        """Convolve ``x`` with the kernels mixed by ``params``, by default by ``tuning``."""
        check_input(x, self.in_channels, self.ndim)
        bias = None if self.bias is None else self.bias[0]
        mixing = self.mixing(params, x.shape[0])
        return tunable_conv(
            x, self.weight[0], bias, mixing, self.stride, self.padding, self.dilation, self.groups, self.backend
        )

    def merge(self, params: Params | None = None) -> nn.Module:
        """The plain ``nn.ConvNd`` at one ω, by default at ``tuning``."""
        mixing = self._mixing_for_merge(params)
        bias = None if self.bias is None else mix(mixing, self.bias[0])
        return make_conv(mix(mixing, self.weight[0]), bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"{self._describe()}"
        )


class TunableConv1d(TunableConv):
    """Tunable convolution over (B, C, L)."""

    ndim = 1


class TunableConv2d(TunableConv):
    """Tunable convolution over (B, C, H, W)."""

    ndim = 2


class TunableConv3d(TunableConv):
    """Tunable convolution over (B, C, D, H, W)."""

    ndim = 3
