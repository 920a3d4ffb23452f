"""What the layers with long kernels share: the position-wise projection, its activations, and remembered spectra."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check_choice
from torchconv.kernels._custom import in_ordinary_operators
from torchconv.kernels.long import Spectrum, long_conv, long_conv_spectrum


class _SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class _Laplace(nn.Module):
    """The normal distribution function of mean √½ and deviation √(1/4π), close to a squared ReLU (arXiv 2209.10655)."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


ACTIVATIONS: dict[str | None, Callable[[], nn.Module]] = {
    None: nn.Identity,
    "id": nn.Identity,
    "identity": nn.Identity,
    "linear": nn.Identity,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "sqrelu": _SquaredReLU,
    "relu2": _SquaredReLU,
    "laplace": _Laplace,
}
_INITIALIZERS: dict[str, Callable[[Tensor, str], Any]] = {
    "uniform": lambda w, nonlinearity: nn.init.kaiming_uniform_(w, nonlinearity=nonlinearity),  # type: ignore[arg-type]
    "normal": lambda w, nonlinearity: nn.init.kaiming_normal_(w, nonlinearity=nonlinearity),  # type: ignore[arg-type]
    "xavier": lambda w, nonlinearity: nn.init.xavier_normal_(w),
    "zero": lambda w, nonlinearity: nn.init.zeros_(w),
    "one": lambda w, nonlinearity: nn.init.ones_(w),
}


def make_activation(name: str | None, argument: str = "activation") -> nn.Module:
    """An element-wise activation by its name."""
    check_choice(argument, name, ACTIVATIONS)
    return ACTIVATIONS[name]()


class Projection(nn.Linear):
    """A linear map of the features of (B, D, L), or of (B, L, D) when not ``transposed``; optionally weight-normed."""

    initializer: str | None = None
    weight_norm = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        transposed: bool,
        initializer: str | None = None,
        nonlinearity: str | None = None,
        weight_norm: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_choice("initializer", initializer, [None, *_INITIALIZERS])
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        known = nonlinearity in ("relu", "tanh", "sigmoid")
        self.transposed, self.initializer, self.nonlinearity = (
            transposed,
            initializer,
            nonlinearity if known else "linear",
        )
        if initializer is not None:
            _INITIALIZERS[initializer](self.weight, str(self.nonlinearity))
        self.weight_norm = weight_norm
        if weight_norm:
            weight: Any = self.weight
            del self.weight
            self.weight_g = nn.Parameter(weight.detach().norm(dim=1, keepdim=True))
            self.weight_v = nn.Parameter(weight.detach().clone())

    def reset_parameters(self) -> None:
        """As ``nn.Linear``, or by the initializer."""
        weight = self.weight_v if self.weight_norm else self.weight
        bound = 1 / math.sqrt(self.in_features)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        nn.init.uniform_(self.bias, -bound, bound)
        if self.initializer is not None:
            _INITIALIZERS[self.initializer](weight, str(self.nonlinearity))
        if self.weight_norm:
            with torch.no_grad():
                self.weight_g.copy_(weight.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map the features."""
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)) if self.weight_norm else None
        weight = self.weight if weight is None else weight
        if not self.transposed:
            return F.linear(x, weight, self.bias)
        return F.conv1d(x, weight.unsqueeze(-1), self.bias)


def projection(
    in_features: int,
    out_features: int,
    transposed: bool,
    postact: str | None,
    initializer: str | None = None,
    weight_norm: bool = False,
    device: Any = None,
    dtype: Any = None,
) -> nn.Module:
    """A projection with its activation: "glu" doubles the width and gates the features with the second half."""
    gated = postact == "glu"
    if not gated:
        make_activation(postact, "postact")
    width = 2 * out_features if gated else out_features
    linear = Projection(in_features, width, transposed, initializer, postact, weight_norm, device, dtype)
    if postact is None:
        return linear
    return nn.Sequential(linear, nn.GLU(-2 if transposed else -1) if gated else make_activation(postact))


class SpectrumCache:
    """Kernels with their transforms, remembered while the weights they were made from stay as they are.

    Used where no gradient is recorded and nobody looks into the operators. On a CPU the weights themselves are
    compared, which costs less than a transform and sees every change; on other devices their identities and versions
    are, which changes through ``.data`` escape. Copies and pickles of a module begin with an empty cache.
    """

    def __init__(self) -> None:
        self._held: tuple[Any, tuple[Tensor, ...], tuple[Tensor, int, Spectrum]] | None = None

    def __deepcopy__(self, memo: Any) -> SpectrumCache:
        return SpectrumCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return SpectrumCache, ()

    def convolve(
        self,
        x: Tensor,
        sources: Sequence[Tensor],
        make: Callable[[], tuple[Tensor, int]],
        settings: tuple[Any, ...] = (),
        dropout: nn.Dropout | None = None,
        **options: Any,
    ) -> Tensor:
        """``long_conv`` of ``x`` with the kernel and origin that ``make()`` gives from the weights ``sources``.

        ``settings`` are what else the kernel depends on, ``dropout`` what makes it random.
        """
        if (
            torch.is_grad_enabled()
            or (dropout is not None and dropout.training and dropout.p > 0)
            or torch.compiler.is_compiling()
            or in_ordinary_operators()
            or any(t.is_inference() for t in sources)
            or x.shape[-1] < 1
            or not x.is_floating_point()
        ):
            kernel, origin = make()
            return long_conv(x, kernel, False, origin, **options)
        length = x.shape[-1]
        onlooking = x.device.type != "cpu"
        key: Any = (length, x.device, settings, [(t.dtype, t.shape) for t in sources])
        if onlooking:
            key = (*key, [(t.data_ptr(), t._version) for t in sources])
        held, same = self._held, operator.is_ if onlooking else torch.equal
        if held is None or held[0] != key or not all(map(same, held[1], sources)):
            kernel, origin = make()
            spectrum = long_conv_spectrum(kernel, length, False, origin)
            # Tensors that are held do not leave their addresses to others of the same version.
            kept = tuple(t if onlooking else t.detach().clone() for t in sources)
            held = self._held = (key, kept, (kernel, origin, spectrum))
        kernel, origin, spectrum = held[2]
        return long_conv(x, kernel, False, origin, spectrum=spectrum, **options)


def with_skip(kernel: Tensor, skip: Tensor | None, origin: int) -> Tensor:
    """``skip`` added to the tap at lag 0, in the wider of both types."""
    if skip is None:
        return kernel
    return kernel + F.pad(skip.unsqueeze(-1), (origin, kernel.shape[-1] - 1 - origin))
