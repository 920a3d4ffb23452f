"""Scalable neural network kernels: a layer f(Wx + b) as the dot product of features of x and features of (W, b).

Sehanobish, Choromanski, Zhao, Dubey, Likhosherstov 2023, "Scalable Neural Network Kernels", arXiv 2310.13225 (ICLR
2024).

    y = Ψ(W, b) Φ(x),     Φ(x)_i = m^{-1/2} max(g_iᵀx, 0)          (ReLU-SNNK; other maps in ``_snnk_features``)

The m Gaussian rows g_i are fixed and Ψ, (out, m), is what is trained: inputs and parameters meet in a dot product only.
Two layers in a row are *bundled*: the second sees its input z = Ψ₁Φ₁(x) through G₂z = (G₂Ψ₁)Φ₁(x) alone, so that one
trainable (m₂, m₁) matrix takes the place of both. A wholly bundled network is linear in its last matrix, whose least
squares optimum has a closed form.

out·m trainable parameters (out·d for the linear layer); m·d + out·m multiply-adds a vector, fewer than out·d for
m < out·d/(out + d).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._snnk_features import (
    ReLUFeatures,
    URFeatures,
    arccos_kernel,
    exp_features,
    fit_closed_form,
    gaussian_rows,
    relu_features,
    wave_features,
)

__all__ = [
    "BundledFeatures",
    "ReLUFeatures",
    "SNNKLinear",
    "URFeatures",
    "arccos_kernel",
    "bundle",
    "convert_official",
    "exp_features",
    "fit_closed_form",
    "gaussian_rows",
    "relu_features",
    "to_snnk",
    "wave_features",
]

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardswish,
)
PASSED_OVER = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


def is_activation(module: nn.Module) -> bool:
    """One of PyTorch's activations, or another library's of the same name and without parameters (timm's GELU)."""
    named = type(module).__name__ in {a.__name__ for a in ACTIVATIONS}
    return isinstance(module, ACTIVATIONS) or (named and not list(module.parameters()))


@part(
    "snnk-linear",
    paper="snnk",
    kind="layer",
    probe={"build": {"in_features": 6, "out_features": 5, "features": 16, "bias": True}, "inputs": [[2, 4, 6]]},
    keywords="random features kernel feed-forward layer arc-cosine transformer uptraining compact",
)
class SNNKLinear(nn.Module):
    """A linear layer with its activation, f(Wx + b), as features of the input times trained features of (W, b).

    Args:
        in_features, out_features: d and the number of outputs.
        features: m for ReLU features, or a feature map: :class:`ReLUFeatures`, :class:`URFeatures`, whose device and
            type the layer has unless it is given others.
        bias: with a number of features: start from (W, b), the input extended by a constant 1. There is no additive
            bias. Feature maps of one's own decide that themselves.

    Shape:
        (\\*, d) → (\\*, out_features).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = SNNKLinear(6, 5, 16)
        >>> layer(torch.zeros(2, 6)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 5]), 80)

    The random rows are a buffer and are saved with the weights, which are useless without them.
    Reference: arXiv 2310.13225.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        features: int | ReLUFeatures | URFeatures = 32,
        bias: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("in_features", in_features)
        check_positive("out_features", out_features)
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        if isinstance(features, ReLUFeatures | URFeatures):
            given = features.in_features
            remedy = f"takes {given} inputs, the layer in_features={in_features}"
            check(given == in_features, "features", features, remedy)
            self.features: Any = features.to(device, dtype)
        else:
            check_positive("features", features)
            self.features = ReLUFeatures(in_features, features, bias, device=device, dtype=dtype)
        shape = (out_features, self.features.num_features)
        self.weights = nn.Parameter(self.features.projection_matrix.new_empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Features of weights (and biases) drawn as ``nn.Linear`` draws them."""
        options: dict[str, Any] = {"device": self.weights.device, "dtype": self.weights.dtype}
        self.set_from(nn.Linear(self.in_features, self.out_features, self.bias, **options))

    @torch.no_grad()
    def set_from(self, linear: nn.Linear) -> None:
        """Set the weights to the features of a linear layer's weight and bias."""
        self.weights.copy_(self.features.weight_features(linear.weight, linear.bias))

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        features: int | ReLUFeatures | URFeatures = 32,
        *,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        ridge: float = 1e-4,
    ) -> SNNKLinear:
        """The kernel form of ``linear`` and the activation after it.

        With "cos", "sin", "exp" or "gaussian" features the result estimates f(Wx + b). ReLU features estimate the
        arc-cosine kernel of x and W instead, which is not ReLU(Wx + b): fine-tune, or give examples.

        Args:
            linear: the layer to replace; it is not changed.
            features: as in the constructor.
            inputs, targets: examples (\\*, d) and wanted outputs (\\*, out): weights become the least squares fit.
            ridge: of that fit.

        Raises:
            ValueError: ``linear`` is something else, or one of ``inputs`` and ``targets`` is missing.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear={type(linear).__name__}: expected an nn.Linear")
        if (inputs is None) != (targets is None):
            missing, given = ("inputs", "targets") if inputs is None else ("targets", "inputs")
            raise ValueError(f"{missing}=None: a fit needs inputs and the wanted outputs, and {given} are given")
        weight = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            features,
            linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.set_from(linear)
        if inputs is not None and targets is not None:
            layer.weights.copy_(fit_closed_form(layer.features(inputs), targets, ridge))
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Φ(x) · weightsᵀ."""
        return nn.functional.linear(self.features(x), self.weights)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_features}, {self.out_features}"


class BundledFeatures(nn.Module):
    """ReLU features with a trained matrix: m^{-1/2} max(Bx + c, floor)^order, what bundling makes of two layers.

    Args:
        weight: B (m, inputs).
        bias: c (m,) or None.
        order, floor: see :func:`relu_features`.

    Shape:
        (\\*, inputs) → (\\*, m).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, order: int = 1, floor: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone()) if bias is not None else None
        self.order, self.floor = order, floor

    def forward(self, x: Tensor) -> Tensor:
        """The features of ``x``."""
        return relu_features(x, self.weight, self.bias, self.order, self.floor)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, order={self.order}, floor={self.floor}"


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    children = module.children() if isinstance(module, nn.Sequential) else [module]
    for child in children:
        yield from _flat(child) if isinstance(child, nn.Sequential) else [child]


def _linear(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, **options)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


@torch.no_grad()
def bundle(stack: nn.Module) -> nn.Sequential:
    """Consecutive SNNK and linear layers with one matrix between two feature maps: exact, and no wide activations.

    Ψ₁ and G₂ become G₂Ψ₁, a linear layer W after Ψ becomes WΨ. The first features keep their fixed rows; all the other
    matrices are trainable.

    Args:
        stack: a ``Sequential`` of :class:`SNNKLinear` and ``nn.Linear``; dropout is left out.

    Returns:
        A ``Sequential``: features, then :class:`BundledFeatures`, then one ``nn.Linear``; its weights are copies.

    Raises:
        ValueError: a module of another kind, or inner features that need the norm of their input (``URFeatures``, or
            ReLU features with ``normalize``), which cannot be bundled.

    Example:
        >>> stack = nn.Sequential(SNNKLinear(6, 50, 8), SNNKLinear(50, 70, 4), nn.Linear(70, 3))
        >>> [tuple(p.shape) for p in bundle(stack).parameters()]
        [(4, 8), (3, 4), (3,)]

    Reference: arXiv 2310.13225, section on bundling.
    """
    stages: list[nn.Module] = []
    matrix: Tensor | None = None  # the affine map since the last features
    offset: Tensor | None = None
    like = torch.empty(0)
    for module in _flat(stack):
        if isinstance(module, PASSED_OVER):
            continue
        if isinstance(module, nn.Linear):
            weight, bias = module.weight.double(), module.bias.double() if module.bias is not None else None
            like = module.weight
            if matrix is not None:
                carried = None if offset is None else weight @ offset
                bias = carried if bias is None else bias if carried is None else bias + carried
                weight = weight @ matrix
            matrix, offset = weight, bias
        elif isinstance(module, SNNKLinear):
            features, like = module.features, module.weights
            if matrix is None:
                stages.append(copy.deepcopy(features))
            else:
                absorbs = isinstance(features, ReLUFeatures) and features.normalize is None
                remedy = "needs the norm of its input and cannot be bundled; use ReLUFeatures without normalize"
                check(absorbs, "stack", type(features).__name__, remedy)
                rows = features.projection_matrix.double()
                offsets = [features.projection_offset, None if offset is None else rows @ offset]
                known = [t.double() for t in offsets if t is not None]
                inner = torch.stack(known).sum(0).to(like.dtype) if known else None
                stages.append(BundledFeatures((rows @ matrix).to(like.dtype), inner, features.order, features.floor))
            matrix, offset = module.weights.double(), None
        else:
            remedy = "only SNNKLinear, nn.Linear and dropout can be bundled; convert the rest with to_snnk first"
            raise ValueError(f"stack: {type(module).__name__}: {remedy}")
    if matrix is not None:
        stages.append(_linear(matrix, offset, like))
    return nn.Sequential(*stages).train(stack.training)


@torch.no_grad()
def to_snnk(
    stack: nn.Module,
    num_features: int,
    *,
    inputs: Tensor | None = None,
    ridge: float = 1e-4,
    orthogonal: bool = True,
    bundled: bool = True,
    features: Callable[[int, int, bool], ReLUFeatures | URFeatures] | None = None,
) -> nn.Sequential:
    """A feed-forward stack in kernel form: each ``nn.Linear`` with its activation becomes an :class:`SNNKLinear`.

    Args:
        stack: a ``Sequential`` of ``nn.Linear``, activations and dropout (nested or not); it is not changed.
        num_features: m of every layer.
        inputs: examples (\\*, d). With them every layer is fitted in closed form to the activations of ``stack``, given
            its own predecessors; without them the result starts far from ``stack`` and needs training.
        ridge: of the fits.
        orthogonal: random rows orthogonal in blocks.
        bundled: :func:`bundle` the result.
        features: builds the map from (d, m, bias); unset makes ReLU features.

    Raises:
        ValueError: a module that is not a linear layer, an activation or dropout; its name is in the message.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> small = to_snnk(mlp, 32, inputs=torch.randn(200, 64))
        >>> sum(p.numel() for p in mlp.parameters()), sum(p.numel() for p in small.parameters())
        (9610, 330)

    Reference: arXiv 2310.13225.
    """
    check_positive("num_features", num_features)
    layers: list[nn.Module] = []
    modules = [m for m in _flat(stack) if not isinstance(m, PASSED_OVER)]
    truth, own = inputs, inputs
    position = 0
    while position < len(modules):
        linear = modules[position]
        if not isinstance(linear, nn.Linear):
            remedy = "only nn.Linear, each followed by an activation or not, and dropout can be converted"
            raise ValueError(f"stack: {type(linear).__name__}: {remedy}")
        activation = modules[position + 1] if position + 1 < len(modules) else None
        truth = None if truth is None else linear(truth)
        if activation is not None and is_activation(activation):
            truth = None if truth is None else activation(truth)
            width, bias = linear.in_features, linear.bias is not None
            options: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            made = (
                ReLUFeatures(width, num_features, bias, orthogonal=orthogonal, **options)
                if features is None
                else features(width, num_features, bias)
            )
            layer: nn.Module = SNNKLinear.from_linear(linear, made, inputs=own, targets=truth, ridge=ridge)
            position += 2
        else:
            layer = copy.deepcopy(linear)
            position += 1
        own = None if own is None else layer(own)
        layers.append(layer)
    converted = nn.Sequential(*layers).train(stack.training)
    return bundle(converted) if bundled else converted


def convert_official(state: Mapping[str, Tensor], projection_matrix: Tensor) -> dict[str, Tensor]:
    """An official state dict, of a layer or of an adapter, with our names and with the random rows added.

    Args:
        state: the authors' entries; theirs lack the random rows.
        projection_matrix: G (m, d) of the layer.

    Example:
        >>> sorted(convert_official({"weights": torch.zeros(5, 8)}, torch.zeros(8, 3)))
        ['features.projection_matrix', 'weights']
    """
    converted, prefix = {}, ""
    for name, tensor in state.items():
        if name.startswith("adapter_down."):
            if not name.endswith(".weights"):  # the layer norm once more
                continue
            name, prefix = "adapter_down.weights", "adapter_down."
        converted[name] = tensor
    return {**converted, f"{prefix}features.projection_matrix": projection_matrix}
