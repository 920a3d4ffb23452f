"""Convolutions that are built low-rank before training: products of one-way filters in the place of n-way kernels.

Boukraichi, Akkari, Casenave, Ryckelynck 2023, "A priori compression of convolutional neural networks for wave
simulators", arXiv 2304.04964. The paper says that 2- and 3-way kernels are replaced by one-way filters and publishes no
code; the forms here are that reading ("per_pair") and the known ones it belongs to (Rigamonti 2013, Jaderberg 2014,
Lebedev 2015). Every form equals a dense convolution with the kernel W:

    per_pair       W[o, i] = Σ_r a_{oir} ⊗ b_{oir} (⊗ c_{oir})       R·n·k·out·in parameters
    sequential     vertical to R maps, then horizontal to the outputs   R·k·(in + out); R·k·(in + out + R) in volumes
    cp             W = Σ_r λ_r · u_r ⊗ v_r ⊗ a_r ⊗ b_r                R·(out + in + n·k + 1)
    tucker         1 × 1 to R maps, a k-way kernel, 1 × 1               R·(out + in) + R²·k^n
    depthwise_1d   a filter an axis for each channel, then 1 × 1        in·n·k + in·out

against out·in·k^n (k equal, one group). All but per_pair can be run as their factors, for as many multiply-adds a
position as they have parameters (k^n for a tucker core); per_pair is multiplied out, which costs nothing beside a map.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice
from torchconv.catalog import part
from torchconv.ops._common import CONV, Padding, Size, check_channels, check_input, check_padding, make_conv, ntuple
from torchconv.ops._factored import (
    EXECUTIONS,
    FORMS,
    Rank,
    default_rank,
    dense_kernel,
    factor_shapes,
    factored_conv,
    terms,
)
from torchconv.ops.factorise import Factorisation, factorise_kernel

__all__ = [
    "FORMS",
    "APrioriConv",
    "APrioriConv1d",
    "APrioriConv2d",
    "APrioriConv3d",
    "Factorisation",
    "dense_kernel",
    "factored_conv",
    "factorise_kernel",
]


class _CPWeight(nn.Module):
    """The factors of a CP kernel under the names of tensorly-torch: ``weights`` and ``factors.factor_0`` …"""

    weights: nn.Parameter

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.weights = parameters["weights"]
        self.factors = nn.Module()
        for name, parameter in parameters.items():
            if name != "weights":
                self.factors.register_parameter(name, parameter)

    def param_options(self) -> dict[str, dict[str, float]]:
        """λ is not decayed: it only scales the terms."""
        return {"weights": {"weight_decay": 0.0}}


@part(
    "apriori",
    paper="apriori",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": 3},
    keywords="low-rank separable one-way filters CP Tucker tensor decomposition compression wave simulator surrogate",
)
class APrioriConv(nn.Module):
    """Convolution whose kernel is a product of small factors from the start.

    Args:
        in_channels, out_channels: channels, both divisible by ``groups``; ``out_channels`` unset is ``in_channels``.
        kernel_size, stride, padding, dilation, groups, bias: as in ``nn.ConvNd``; "same" at any stride.
        form: "per_pair" (the paper's, as we read it), "sequential", "cp", "tucker" or "depthwise_1d"; with groups, cp
            and tucker share their input factors among the groups.
        rank: R, for tucker also (outputs, inputs) of the core; unset: 1 for per_pair, the larger number of channels for
            cp, half the smaller one for sequential (a multiple of ``groups``) and tucker.
        execute: see :func:`factored_conv`.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = APrioriConv2d(64, 64, 3, form="sequential", rank=32)
        >>> sum(p.numel() for p in layer.parameters()), layer.kernel().shape
        (12352, torch.Size([64, 64, 3, 3]))

    Reference: Boukraichi et al., arXiv 2304.04964.
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
        form: str = "per_pair",
        rank: Rank | None = None,
        execute: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_channels(in_channels, out_channels, groups)
        check_padding(padding, self.ndim)
        check_choice("form", form, FORMS)
        check_choice("execute", execute, EXECUTIONS)
        refused = form == "per_pair" and execute == "factored"
        check(not refused, "execute", execute, "per_pair as passes needs out·in·R maps; use 'auto' or 'dense'")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.padding, self.form, self.execute = padding, form, execute
        self.rank: Rank = default_rank(form, out_channels, in_channels, groups) if rank is None else rank
        shapes = factor_shapes(form, out_channels, in_channels, self.kernel_size, self.rank, groups)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        parameters = {name: nn.Parameter(torch.empty(shape, **options)) for name, shape in shapes.items()}
        self._names = tuple(shapes)
        if form == "cp":
            self.weight = _CPWeight(parameters)
        else:
            for name, parameter in parameters.items():
                self.register_parameter(name, parameter)
        self.bias = nn.Parameter(torch.empty(out_channels, **options)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_conv(
        cls, conv: nn.Module, form: str = "sequential", rank: Rank | None = None, energy: float | None = None
    ) -> Self:
        """Factorise a trained ``nn.ConvNd``; ``layer.factorisation_error`` is the relative error of its kernel.

        Args:
            conv: of this dimension, padded with zeros.
            form, rank, energy: as in :func:`factorise_kernel`.

        Raises:
            ValueError: ``conv`` is something else, or the form cannot do what is asked.
        """
        if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) or conv.weight.dim() != cls.ndim + 2:
            raise ValueError(f"conv={type(conv).__name__}: expected an nn.{CONV[cls.ndim].__name__}")
        check(conv.padding_mode == "zeros", "padding_mode", conv.padding_mode, "only zero padding can be factorised")
        found = factorise_kernel(conv.weight, rank, energy, form, conv.groups)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            form=form,
            rank=found.rank,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            for name, factor in layer.factors().items():
                factor.copy_(found.factors[name])
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        layer.factorisation_error = found.error
        return layer.train(conv.training)

    factorisation_error: float | None = None

    def reset_parameters(self) -> None:
        """Factors whose product has the variance that PyTorch gives a dense kernel; the bias likewise."""
        fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
        factors = self.factors()
        shapes = {name: tuple(f.shape) for name, f in factors.items()}
        count, multiplied = terms(self.form, self.rank, self.groups, shapes)
        deviation = (1 / (3 * fan_in) / count) ** (0.5 / multiplied)
        for name, factor in factors.items():
            if name == "weights":
                nn.init.ones_(factor)
            else:
                nn.init.normal_(factor, std=deviation)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(fan_in**-0.5), fan_in**-0.5)

    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        if self.form == "cp":
            named = dict(self.weight.factors.named_parameters())
            return {"weights": self.weight.weights, **named}
        return {name: self.get_parameter(name) for name in self._names}

    def kernel(self) -> Tensor:
        """The dense kernel (out, in/groups, \\*kernel_size)."""
        return dense_kernel(self.factors(), self.form, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        check_input(x, self.in_channels, self.ndim)
        factors = self.factors()
        place = (self.stride, self.padding, self.dilation, self.groups, self.execute)
        return factored_conv(x, factors, self.form, self.bias, *place)

    def merge(self) -> nn.Module:
        """The plain ``nn.ConvNd`` with the kernel multiplied out; it may need more multiply-adds than the passes."""
        return make_conv(self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"form={self.form!r}, rank={self.rank}"
        )


class APrioriConv1d(APrioriConv):
    """Convolution in tensor format over (N, C, L)."""

    ndim = 1


class APrioriConv2d(APrioriConv):
    """Convolution in tensor format over (N, C, H, W)."""

    ndim = 2


class APrioriConv3d(APrioriConv):
    """Convolution in tensor format over (N, C, D, H, W)."""

    ndim = 3
