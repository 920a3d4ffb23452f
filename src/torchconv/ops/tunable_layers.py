"""The other tunable layers: linear layer and plain parameter; and a whole model made tunable.

Maggioni et al. 2023, arXiv 2304.00898; see :mod:`torchconv.ops.tunable`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._tunable_mixing import Params, Tunable
from torchconv.ops.tunable import TunableConv1d, TunableConv2d, TunableConv3d, mix, one_or_each
from torchconv.ops.tunable_transposed import (
    TunableConvTranspose1d,
    TunableConvTranspose2d,
    TunableConvTranspose3d,
)


def tunable_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mixing: Tensor) -> Tensor:
    """Linear map with a mixed matrix: y_b = x_b · (Σ_n a_bn W_n)ᵀ + Σ_n a_bn β_n.

    Args:
        x: (B, \\*, in).
        weight: (N, out, in); bias: (N, out) or None.
        mixing: (N,) for the whole batch, or (B, N).

    Shape:
        (B, \\*, in) → (B, \\*, out).
    """
    mixing = one_or_each(mixing, weight.shape[0], x.shape[0])
    beta = None if bias is None else mix(mixing, bias)
    if mixing.dim() == 1:
        return F.linear(x, mix(mixing, weight), beta)
    if x.dim() == 2:
        # One row an item: mixing the N results costs no more than mixing the matrices.
        y = torch.einsum(
            "bn,bno->bo", mixing.to(weight.dtype), F.linear(x, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])
        )
        return y if beta is None else y + beta
    rows = x.flatten(1, -2)
    y = rows @ mix(mixing, weight).transpose(1, 2)
    if beta is not None:
        y = y + beta.unsqueeze(1)
    return y.reshape(*x.shape[:-1], weight.shape[1])


@part(
    "tunable-linear",
    paper="tunable",
    kind="layer",
    mixes="channels",
    merges="self",
    probe={"build": {"in_features": 6, "out_features": 4}, "inputs": [[2, 5, 6]]},
    keywords="tunable dense fully connected kernels mixture",
)
class TunableLinear(Tunable):
    """Linear layer whose matrix is mixed by ω.

    ``weight`` (1, N, out, in) and ``bias`` (1, N, out) have the authors' names.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        num_params, expand_params, mode: as in :class:`~torchconv.ops.tunable.TunableConv`.

    Shape:
        x (B, \\*, in_features), params (P,), (1, P) or (B, P) → (B, \\*, out_features).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> TunableLinear(5, 3)(torch.zeros(2, 4, 5), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).shape
        torch.Size([2, 4, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_params: int = 2,
        expand_params: int = 1,
        mode: str = "mlp",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_params, expand_params, mode, device=device, dtype=dtype)
        check_positive("in_features", in_features)
        check_positive("out_features", out_features)
        self.in_features, self.out_features = in_features, out_features
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(1, self.num_kernels, out_features, in_features, **options))
        self.bias = nn.Parameter(torch.empty(1, self.num_kernels, out_features, **options)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_params: int = 2, expand_params: int = 1, mode: str = "mlp") -> Self:
        """A tunable layer whose N matrices are copies of that of ``linear``: the same map where Σω = 1."""
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear={type(linear).__name__}: expected an nn.Linear")
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            num_params=num_params,
            expand_params=expand_params,
            mode=mode,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer._copy_into_slots({"weight": linear.weight, "bias": linear.bias})
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Each matrix and bias as PyTorch draws those of a plain linear layer."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.mlp is not None:
            self.mlp.reset_parameters()

    def forward(self, x: Tensor, params: Params | None = None) -> Tensor:
        """Apply the matrix mixed by ``params``, by default by ``tuning``."""
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (B, *, {self.in_features})")
        bias = None if self.bias is None else self.bias[0]
        return tunable_linear(x, self.weight[0], bias, self.mixing(params, x.shape[0]))

    def merge(self, params: Params | None = None) -> nn.Module:
        """The plain ``nn.Linear`` at one ω, by default at ``tuning``."""
        mixing, weight = self._mixing_for_merge(params), self.weight.detach()
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **options)
        state = {"weight": mix(mixing, weight[0])}
        if self.bias is not None:
            state["bias"] = mix(mixing, self.bias.detach()[0])
        linear.load_state_dict(state)
        return linear.eval()

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._describe()}"


@part(
    "tunable-parameter",
    paper="tunable",
    kind="layer",
    probe={"build": {"value": [[[1.0]], [[-2.0]], [[0.5]]]}, "inputs": [[2, 2]]},
    keywords="tunable learned scale relative position bias mixture",
)
class TunableParameter(Tunable):
    """A learned tensor (a scale, a relative position bias) that is mixed by ω from N copies of ``value``.

    Args:
        value: initial value of every copy, of any shape.
        num_params, expand_params, mode: as in :class:`~torchconv.ops.tunable.TunableConv`.

    Shape:
        params (P,) or None → (\\*value), params (B, P) → (B, \\*value).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> TunableParameter(torch.zeros(8, 1, 1), mode="linear")(torch.eye(2)).shape
        torch.Size([2, 8, 1, 1])
    """

    def __init__(
        self,
        value: Tensor | Sequence[Any],
        *,
        num_params: int = 2,
        expand_params: int = 1,
        mode: str = "mlp",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_params, expand_params, mode, device=device, dtype=dtype)
        start = torch.as_tensor(value, device=device, dtype=dtype or torch.get_default_dtype()).detach()
        self.data = nn.Parameter(start.expand(1, self.num_kernels, *start.shape).clone())

    def forward(self, params: Params | None = None) -> Tensor:
        """The tensor at ``params``, by default at ``tuning``."""
        return mix(self.mixing(params), self.data[0])

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"shape={tuple(self.data.shape[2:])}, {self._describe()}"


_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: TunableConv1d,
    nn.Conv2d: TunableConv2d,
    nn.Conv3d: TunableConv3d,
    nn.ConvTranspose1d: TunableConvTranspose1d,
    nn.ConvTranspose2d: TunableConvTranspose2d,
    nn.ConvTranspose3d: TunableConvTranspose3d,
}


def make_tunable(model: nn.Module, num_params: int = 2, expand_params: int = 1, mode: str = "mlp") -> nn.Module:
    """A copy of ``model`` in which every convolution and linear layer is tunable.

    Its kernels are copies of the trained one: it computes what ``model`` does wherever Σω = 1, until it is trained.
    Set ω for all layers with :func:`~torchconv.ops.tunable.set_tuning`, or for each item within
    :func:`~torchconv.ops.tunable.tuned`.

    Raises:
        ValueError: there is nothing to replace, or a convolution pads with other values than zeros.
    """

    def convert(module: nn.Module) -> nn.Module | None:
        if type(module) is nn.Linear:
            return TunableLinear.from_linear(module, num_params, expand_params, mode)
        kind = _CONVOLUTIONS.get(type(module))
        converted: nn.Module | None = kind.from_conv(module, num_params, expand_params, mode) if kind else None
        return converted

    result = copy.deepcopy(model)
    # A layer in several places is one tunable layer in all of them.
    found = {module: new for module in result.modules() if (new := convert(module)) is not None}
    check(bool(found), "model", type(model).__name__, "has no convolution or linear layer to make tunable")
    if result in found:
        return found[result]
    for name, module in list(result.named_modules(remove_duplicate=False)):
        if module in found:
            parent, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(parent), leaf, found[module])
    for module in result.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused inference reads the weights of plain linear layers
    return result
