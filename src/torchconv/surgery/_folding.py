"""Batch norms folded into the convolution or linear layer beside them, by the running statistics.

After a layer: s·(W x + b − μ) + β = (s·W) x + s·(b − μ) + β with s = γ/√(σ² + ε), always exact. Before one:
W (s·x + t) + b = (W·s) x + W t + b with t = β − s·μ, exact where the layer pads nothing. Computed in float64 and
rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchconv.surgery._dataflow import Dataflow, Use
from torchconv.surgery.structure import Edit, has_hooks, put, verb

# Norms by running statistics, by full name, so that neither timm nor torchvision is imported. An activation follows
# those of the second kind.
_PLAIN = {
    "torch.nn.modules.batchnorm": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
    "timm.layers.norm_act": ("FrozenBatchNorm2d",),
    "torchvision.ops.misc": ("FrozenBatchNorm2d",),
}
_ACTIVE = {"timm.layers.norm_act": ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")}
_LAYERS: tuple[Any, ...] = (nn.modules.conv._ConvNd, nn.Linear)
Owners = Mapping[int, list[tuple[str, nn.Module, str]]]


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm whose computation is known."""
    return _is(module, _PLAIN) or _is(module, _ACTIVE)


def _is(module: nn.Module, kinds: Mapping[str, tuple[str, ...]]) -> bool:
    return type(module).__name__ in kinds.get(type(module).__module__, ())


def foldable(model: nn.Module, flow: Dataflow) -> tuple[list[Edit], dict[str, str]]:
    """The folds that a run allows, and for every other batch norm that ran why it stays."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((path, module, name))
    edits: list[Edit] = []
    kept: dict[str, str] = {}
    for path, calls in flow.norms.items():
        norm: Any = model.get_submodule(path)
        order = "after"
        if norm.running_mean is None or norm.running_var is None:
            layer, why = None, "it normalises by the batch's own statistics"
        elif len(calls) > 1:
            layer, why = None, f"it runs {len(calls)} times"
        elif has_hooks(norm, before=True) or has_hooks(norm):
            layer, why = None, "it has hooks"
        else:
            made = next((u for u in flow.uses if id(u.made) == calls[0].read), None)
            layer, why = _layer_before(path, made, flow, owners)
            readers = [u for u in flow.uses if u.read == id(calls[0].made)]
            if layer is None and readers and _is(norm, _PLAIN):
                order = "before"
                layer, why = _layer_behind(calls[0].made, readers, flow, owners)
        if layer is None:
            kept[path] = why
        else:
            edits.append({"verb": "fold", "norm": path, "into": layer, "order": order})
    return edits, kept


def _layer_before(path: str, use: Use | None, flow: Dataflow, owners: Owners) -> tuple[str | None, str]:
    """The layer that makes what the norm ``path`` reads, or why the norm cannot be folded into it."""
    if use is None:
        return None, "what it reads comes from no convolution or linear layer directly"
    layer, why = _owner(use, flow, owners)
    if layer is not None and (set(flow.readers(use.made)) != {path} or id(use.made) in flow.seen_outside):
        return None, f"the output of {layer} is used elsewhere too"
    return layer, why


def _layer_behind(made: Tensor, uses: list[Use], flow: Dataflow, owners: Owners) -> tuple[str | None, str]:
    """The layer that reads what a norm makes, or why the norm cannot be folded into it."""
    layer, why = _owner(uses[0], flow, owners)
    if layer is not None:
        if id(made) in flow.seen_outside or len(uses) > 1 or not _reads_alone(uses[0], flow.readers(made)):
            return None, f"its output is used by more than {layer}"
        if uses[0].padded or uses[0].transposed:
            return None, f"{layer}, which reads it, pads with zeros"
    return layer, why


def _owner(use: Use, flow: Dataflow, owners: Owners) -> tuple[str | None, str]:
    """The layer whose own parameters a convolution ran with, and nobody else."""
    found = owners.get(id(use.weight), [])
    if len(found) != 1:
        return None, "the layer beside it computes its weight" if not found else f"{found[0][0]}.weight is shared"
    path, module, name = found[0]
    if not isinstance(module, _LAYERS) or name != "weight" or use.bias is not module.bias:
        return None, f"{path or 'the network'} uses its parameters in its own way"
    if sum(u.weight is use.weight for u in flow.uses) > 1:
        return None, f"{path} runs more than once"
    if not _reads_alone(use, flow.readers(use.weight)):
        return None, f"{path}.weight is used elsewhere too"
    if module.bias is not None and len(owners.get(id(module.bias), [])) > 1:
        return None, f"{path}.bias is shared"
    if has_hooks(module):
        return None, f"{path} has hooks"
    return path, ""


def _reads_alone(use: Use, readers: list[str]) -> bool:
    """Whether all that reads a tensor is this one run: a linear layer's call, or a convolution's one operation."""
    return set(readers) == {use.path} and (bool(use.path) or len(readers) == 1)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm, in float64 where the device has it."""
    wide = torch.float32 if norm.running_var.device.type == "mps" else torch.float64
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    shift = -norm.running_mean.to(wide) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.to(wide)


@verb("fold")
@torch.no_grad()
def fold(model: nn.Module, edit: Edit) -> None:
    """Fold the batch norm ``edit["norm"]`` into the layer ``edit["into"]``; its activation stays in its place."""
    norm: Any = model.get_submodule(edit["norm"])
    layer: Any = model.get_submodule(edit["into"])
    if not is_norm(norm) or not isinstance(layer, _LAYERS):
        raise ValueError(f"edit={edit}: is not a batch norm beside a convolution or linear layer")
    scale, shift = _affine(norm)
    weight = layer.weight.to(scale.dtype)
    bias = 0 if layer.bias is None else layer.bias.to(scale.dtype)
    if edit["order"] == "after":
        if getattr(layer, "transposed", False):  # (in, out / groups, …)
            shares = weight.unflatten(0, (layer.groups, -1)) * scale.view(
                layer.groups, 1, -1, *[1] * (weight.dim() - 2)
            )
            weight = shares.flatten(0, 1)
        else:
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        bias = bias * scale + shift
    else:
        groups = getattr(layer, "groups", 1)
        taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        bias = bias + (taps.unflatten(0, (groups, -1)) * shift.view(groups, 1, -1)).sum(2).flatten()
        wide = weight.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = wide.flatten(0, 1)
    layer.weight.copy_(weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.empty_like(norm.running_mean, dtype=layer.weight.dtype))
        layer.bias.requires_grad_(layer.weight.requires_grad)
    layer.bias.copy_(bias)
    put(model, edit["norm"], _rest(norm))


def _rest(norm: Any) -> nn.Module:
    """What a norm does after normalising."""
    if not _is(norm, _ACTIVE):
        return nn.Identity()
    steps = [m for m in (norm.drop, norm.act) if type(m) is not nn.Identity]
    rest: nn.Module = steps[0] if len(steps) == 1 else nn.Sequential(*steps) if steps else nn.Identity()
    return rest


@verb("unparametrize")
def unparametrize(model: nn.Module, edit: Edit) -> None:
    """Make the computed parameters of a layer plain ones, where they are computed."""
    layer: Any = model.get_submodule(edit["path"])
    if parametrize.is_parametrized(layer):
        # A copy shares the class that PyTorch made for the original, and removing takes the parameter off that class.
        cls = type(layer)
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type(cls.__name__, cls.__bases__, own)
        for name in list(layer.parametrizations):
            learned = any(p.requires_grad for p in layer.parametrizations[name].parameters())
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
            if name in layer._buffers:  # of several tensors PyTorch makes a buffer where gradients are off
                value = layer._buffers.pop(name)
                layer.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=learned))


def parametrized(model: nn.Module) -> list[Edit]:
    """The edits that make all computed parameters plain."""
    found = [path for path, m in model.named_modules() if parametrize.is_parametrized(m)]
    return [{"verb": "unparametrize", "path": path} for path in found]
