"""Slow nets: coordinate networks that generate hyper-kernels (Terminator, arXiv 2401.17948).

With c the coordinates in [−1, 1] of every position, sine filters g_l(c) = sin(W_l c + b_l) and a plane p:

    z = g_0(c);   z ← g_i(c) ⊙ V_i(z) + p  for i = 1 … L;   K = U(z)

a multiplicative filter network after the MAGNet of FlexConv (Romero et al. 2021, arXiv 2110.08059). The local form is
made content-dependent by the activations: s, from their mean over the batch, scales z in every layer after a
re-normalisation. Cost: O(L·h²) a position and kernel, whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.ops._common import CONV, ntuple

CONTEXTS = ("batch", "running", "image")
_POOL: tuple[Any, ...] = (None, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def axes_of(size: Sequence[int]) -> tuple[int, ...]:
    """A ``size`` of one to three axes, checked."""
    ok = isinstance(size, Sequence) and 1 <= len(size) <= 3
    check(ok, "size", size, "give one number for each of one to three axes")
    return ntuple("size", size, len(size))


def coordinates(size: Sequence[int], device: Any = None, dtype: Any = None) -> Tensor:
    """Coordinates (d, positions) of a grid, each axis from −1 to 1, rows first.

    Example:
        >>> coordinates((2, 3))
        tensor([[-1., -1., -1.,  1.,  1.,  1.],
                [-1.,  0.,  1., -1.,  0.,  1.]])
    """
    axes = [torch.linspace(-1, 1, n, device=device, dtype=dtype) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def renormalise(z: Tensor, alpha: float = 1.0, beta: float = 0.1, detach: bool = True) -> Tensor:
    """α·z + β·z/‖z‖ with the norm over the last axis; with ``detach`` gradients pass the second term only.

    Example:
        >>> renormalise(torch.tensor([3.0, 4.0]))
        tensor([3.0600, 4.0800])
    """
    return alpha * (z.detach() if detach else z) + beta * F.normalize(z, dim=-1)


def plane_at(plane: Tensor, size: Sequence[int]) -> Tensor:
    """A learned plane (1, 1, \\*) at another size, interpolated linearly with the corners kept."""
    if tuple(plane.shape[2:]) == tuple(size):
        return plane
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(plane, tuple(size), mode=mode, align_corners=True)


def wide(tensor: Tensor) -> Tensor:
    """At least single precision: half of it has too few bits for the phase of a sine, and variances overflow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _point(conv: Any, x: Tensor) -> Tensor:
    """A 1 × 1 convolution on (N, C, positions)."""
    return wide(conv.weight).flatten(1) @ x + wide(conv.bias)[:, None]


class SineFilter(nn.Module):
    """One filter, sin(linear(c)); ``linear`` is a 1 × 1 convolution from the axes to the hidden channels."""

    def __init__(self, ndim: int, hidden: int, device: Any, dtype: Any) -> None:
        super().__init__()
        self.linear = CONV[ndim](ndim, hidden, 1, device=device, dtype=dtype)

    def reset_parameters(self, scale: float, concentration: float, rate: float) -> None:
        """Frequencies: the convolution's default times ``scale`` times a Gamma variable each; biases 0."""
        self.linear.reset_parameters()
        nn.init.zeros_(self.linear.bias)
        weight = self.linear.weight
        if weight.is_meta:
            return
        shape = torch.full(weight.shape, concentration, device=weight.device)
        gamma = torch.distributions.Gamma(shape, torch.full_like(shape, rate)).sample()
        with torch.no_grad():
            weight.mul_(scale * gamma.to(weight.dtype))

    def forward(self, c: Tensor) -> Tensor:
        """(N, d, positions) → (N, hidden, positions)."""
        return torch.sin(_point(self.linear, c))


class KernelNet(nn.Module):
    """The coordinate network inside a slow net; parameter names are those of the authors.

    Args:
        size: of the kernel, one number an axis.
        out_channels: channels of the kernel.
        hidden: h.
        num_layers: L.
        omega_0: base frequency ω₀; weights of filter l start as 2π·ω₀·γ times the default, γ ~ Gamma(6/(l+1), 1).
        context_channels: channels of the activations that condition the kernel; None for a kernel of its own.
        detach: see :func:`renormalise`; with a context only.
    """

    def __init__(
        self,
        size: Sequence[int],
        out_channels: int,
        hidden: int,
        num_layers: int,
        omega_0: float = 1.0,
        context_channels: int | None = None,
        detach: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("out_channels", out_channels)
        check_positive("hidden", hidden)
        check_positive("num_layers", num_layers)
        check(omega_0 > 0, "omega_0", omega_0, "must be positive")
        self.size, self.omega_0, self.detach = axes_of(size), omega_0, detach
        ndim = len(self.size)
        conv = CONV[ndim]
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.filters = nn.ModuleList(SineFilter(ndim, hidden, **options) for _ in range(num_layers + 1))
        self.linears = nn.ModuleList(conv(hidden, hidden, 1, **options) for _ in range(num_layers))
        self.output_linear = conv(hidden, out_channels, 1, **options)
        plane = nn.Parameter(torch.empty(1, 1, *self.size, **options))
        self.fast_linears_x = nn.ModuleList()
        self.bias_p: nn.Parameter | None = None
        self.bias_pk: nn.Parameter | None = None
        if context_channels is None:
            self.bias_p = plane
        else:
            self.bias_pk = plane
            self.fast_reduce = conv(context_channels, hidden, 1, **options)
            self.fast_fc1 = conv(hidden, hidden, 1, **options)
            self.fast_linears_x.extend(conv(hidden, hidden, 1, **options) for _ in range(num_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published; the output's division by √positions, which the authors do at the first call, is done here."""
        for level, filter_ in enumerate(self.filters):
            assert isinstance(filter_, SineFilter)
            filter_.reset_parameters(2 * math.pi * self.omega_0, 6.0 / (level + 1), 1.0)
        inner: list[Any] = [*self.linears, *self.fast_linears_x]
        if self.bias_pk is not None:
            self.fast_reduce.reset_parameters()
            self.fast_fc1.reset_parameters()
        for layer in inner:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            nn.init.ones_(layer.bias)
        nn.init.kaiming_uniform_(self.output_linear.weight, nonlinearity="linear")
        nn.init.zeros_(self.output_linear.bias)
        nn.init.zeros_(self._plane())
        with torch.no_grad():
            self.output_linear.weight.div_(math.sqrt(math.prod(self.size)))

    def _plane(self) -> Tensor:
        plane = self.bias_p if self.bias_p is not None else self.bias_pk
        assert plane is not None
        return plane

    def forward(self, context: Tensor | None = None, size: Sequence[int] | None = None) -> Tensor:
        """The kernel (N, out_channels, \\*size).

        Args:
            context: pooled activations (N, context_channels, \\*size of the kernel), for a net that has a context.
            size: another size to draw the kernel at; the plane p is interpolated.
        """
        size = self.size if size is None else tuple(size)
        weight = self.output_linear.weight
        kind = weight.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            c = coordinates(size, weight.device, dtype)[None]
            plane = plane_at(wide(self._plane()), size).flatten(2)
            s: Tensor | None = None
            if context is not None:
                s = F.gelu(_point(self.fast_fc1, _point(self.fast_reduce, context.to(dtype).flatten(2))))
            z = self.filters[0](c)
            for level, linear in enumerate(self.linears):
                z = self.filters[level + 1](c) * _point(linear, z) + plane
                if s is not None:
                    z = renormalise(z, detach=self.detach) * _point(self.fast_linears_x[level], s)
            kernel = _point(self.output_linear, z).to(weight.dtype)
        return kernel.unflatten(2, size)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"size={self.size}, omega_0={self.omega_0}"


class SlowNet(nn.Module):
    """A kernel of its own, independent of any input: (1, out_channels, \\*size), the ``G`` and ``GC`` nets.

    Args:
        size: of the kernel, one number an axis.
        out_channels: channels of the kernel; 1 for the kernel over channels, whose ``size`` is (channels,).
        hidden, num_layers, omega_0: see :class:`KernelNet`.

    Example:
        >>> SlowNet((4, 5), 3, 8)().shape
        torch.Size([1, 3, 4, 5])

    Reference: arXiv 2401.17948.
    """

    def __init__(
        self,
        size: Sequence[int],
        out_channels: int,
        hidden: int = 32,
        num_layers: int = 2,
        omega_0: float = 1.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.Kernel = KernelNet(size, out_channels, hidden, num_layers, omega_0, **options)

    def forward(self, size: Sequence[int] | None = None) -> Tensor:
        """The kernel, at another ``size`` where one is given."""
        kernel: Tensor = self.Kernel(None, size)
        return kernel


class LocalSlowNet(nn.Module):
    """Depthwise kernels (channels, 1, \\*kernel_size) that the activations ``x`` condition, the ``L`` nets.

    Args:
        channels: C of the activations and of the kernels.
        kernel_size: one number an axis.
        hidden, num_layers, omega_0: see :class:`KernelNet`.
        context: what the activations are averaged over: "batch" as published, in eval too, so that results depend on
            the other items of the batch; "running" takes a running mean in eval; "image" gives every image a kernel of
            its own, (N, channels, \\*kernel_size).
        detach: as published, no gradient through the first term of the re-normalisation.
        momentum: of the running mean.

    Shape:
        (N, channels, \\*spatial) → (channels, 1, \\*kernel_size).

    Reference: arXiv 2401.17948.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Sequence[int],
        hidden: int = 32,
        num_layers: int = 2,
        omega_0: float = 1.0,
        *,
        context: str = "batch",
        detach: bool = True,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("context", context, CONTEXTS)
        self.context, self.momentum = context, momentum
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.Kernel = KernelNet(kernel_size, channels, hidden, num_layers, omega_0, channels, detach, **options)
        self.running_context: Tensor | None
        mean = torch.zeros(1, channels, *self.Kernel.size, **options) if context == "running" else None
        self.register_buffer("running_context", mean)

    def pooled(self, x: Tensor) -> Tensor:
        """The activations averaged in as many boxes as the kernel has taps, and over what ``context`` says."""
        if self.running_context is not None and not self.training:
            return self.running_context
        boxes: Tensor = _POOL[x.dim() - 2](x, self.Kernel.size)
        if self.context == "image":
            return boxes
        if boxes.shape[0] == 0:  # has no mean: neither the running one nor a gradient may become not-a-number
            return boxes.new_zeros(1, *boxes.shape[1:])
        mean = boxes.mean(0, keepdim=True)
        if self.running_context is not None:
            self.running_context.lerp_(mean.detach().to(self.running_context), self.momentum)
        return mean

    def forward(self, x: Tensor) -> Tensor:
        """The kernels for ``x``."""
        kernel: Tensor = self.Kernel(self.pooled(x))
        return kernel if self.context == "image" else kernel.transpose(0, 1)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"context={self.context!r}"


class FrozenKernel(nn.Module):
    """A kernel that a slow net made, kept as a buffer."""

    kernel: Tensor

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel.detach().clone())

    def forward(self, of: Any = None) -> Tensor:
        """The kernel, whatever the input; another size than its own is refused."""
        if of is not None and not isinstance(of, Tensor) and tuple(of) != tuple(self.kernel.shape[2:]):
            own = tuple(self.kernel.shape[2:])
            raise ValueError(f"size={tuple(of)}: the frozen kernel has size {own}; use the network before merge()")
        return self.kernel


@torch.no_grad()
def freeze_kernels(module: nn.Module) -> None:
    """Replace, in place, every slow net below ``module`` whose kernel does not depend on the input by its kernel."""
    for name, child in module.named_children():
        if isinstance(child, SlowNet):
            setattr(module, name, FrozenKernel(child()))
        elif isinstance(child, LocalSlowNet):
            if child.running_context is not None:
                kernel = child.Kernel(child.running_context).transpose(0, 1)
                setattr(module, name, FrozenKernel(kernel))
        else:
            freeze_kernels(child)
