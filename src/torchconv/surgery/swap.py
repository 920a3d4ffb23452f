"""Other operators in the place of a network's convolutions, with their weights carried over where that can be done.

How well a layer was carried over is measured, not assumed: the new layer and the old one run on the same noise.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check
from torchconv.catalog import Part, load, operator
from torchconv.ops import as_conv
from torchconv.ops._common import CONV, resolve_padding
from torchconv.ops.roles import options_of
from torchconv.surgery._layers import Where, convolutions
from torchconv.surgery._probe import difference, run
from torchconv.surgery.structure import Edit, note, put, verb

EXACT, CLOSE = 1e-4, 0.5


@dataclass(frozen=True)
class SwappedLayer:
    """One layer: ``transfer`` is "exact", "approximate" or "fresh" by ``difference``, the largest relative one."""

    path: str
    old: str
    new: str
    transfer: str
    difference: float


@dataclass(frozen=True)
class SwapReport:
    """What :func:`swap` did.

    Attributes:
        layers: those replaced.
        kept: path → why a layer that was asked for could not be replaced.
        difference: of the network's output on ``example``, relative to the largest value; None without one.
    """

    layers: list[SwappedLayer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    difference: float | None = None

    def __str__(self) -> str:
        count = {t: sum(row.transfer == t for row in self.layers) for t in ("exact", "approximate", "fresh")}
        lines = [f"{len(self.layers)} layers replaced: " + ", ".join(f"{n} {t}" for t, n in count.items())]
        width = max((len(row.path) for row in self.layers), default=0)
        lines += [
            f"  {row.path:<{width}}  {row.transfer:<11} {row.difference:.1e}  {row.old} → {row.new}"
            for row in self.layers
        ]
        lines += [f"  {path}: kept, {why}" for path, why in self.kept.items()]
        if self.difference is not None:
            lines.append(f"output differs by {self.difference:.2e} of its largest value on the example")
        return "\n".join(lines)


def swap(
    model: nn.Module,
    to: str,
    *,
    where: Where = "spatial",
    keep_weights: bool = True,
    example: Tensor | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of ``model`` with an operator in place of its convolutions.

    Args:
        model: any module; it stays as it is. Hooks, device, type, training mode and shared layers are kept.
        to: an operator of the catalogue (``torchconv list --kind operator``).
        where: "all", "spatial" (kernels larger than 1, the stem excepted), "depthwise", "pointwise", "stem" (the first
            convolution), a pattern for names ("stages.2.*"), or a predicate of name and module.
        keep_weights: carry the old weights over where there is a way to; otherwise start afresh.
        example: an input; with it the report has the difference of the outputs.
        options: of the operator's constructor.

    Returns:
        The new network; ``swap_report`` on it is the :class:`SwapReport`.

    Raises:
        ValueError: an unknown operator or option, or nothing to replace (with the reason for each candidate).
    """
    announced = operator(to)
    new = copy.deepcopy(model)
    chosen = convolutions(new, where)
    layers: list[SwappedLayer] = []
    kept: dict[str, str] = {}
    edits: list[Edit] = []
    for path, conv in chosen.items():
        try:
            edit: Edit = {"verb": "swap", "path": path, "to": to, "settings": _settings(announced, conv, options)}
            made = _build(conv, edit).to(conv.weight.device, conv.weight.dtype).train(conv.training)
            if keep_weights:
                _carry_over(to, conv, made)
            layers.append(_judge(path, conv, made, keep_weights))
        except ValueError as error:
            kept[path] = str(error)
            continue
        put(new, path, made)
        edits.append(edit)
    reasons = "; ".join(f"{p}: {why}" for p, why in kept.items()) or f"where={where!r} matches no convolution"
    check(bool(layers), "to", to, f"no layer could be replaced ({reasons})")
    apart = None
    if example is not None:
        before, after = (run(copy.deepcopy(m).eval(), example) for m in (model, new))
        apart = difference(after, before)
    new.swap_report = SwapReport(layers, kept, apart)  # type: ignore[assignment]
    note(new, model, edits)
    return new


@verb("swap")
def _swap_again(model: nn.Module, edit: Edit) -> None:
    conv: Any = model.get_submodule(edit["path"])
    put(model, edit["path"], _build(conv, edit))


def _settings(announced: Part, conv: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Constructor options of the operator that stands for ``conv``, or a ``ValueError`` that says why it cannot."""
    if type(conv) not in CONV:
        raise ValueError(f"{type(conv).__name__} computes its kernel in its own way")
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode={conv.padding_mode!r} is not zeros")
    to = announced.name
    known = options_of(announced, conv.weight.dim() - 2)
    settings = {**announced.conv, **options}
    if "groups" not in settings and conv.groups > 1:
        whole = conv.groups == conv.in_channels
        if announced.mixes != "space" or not whole:
            if "groups" not in announced.supports:
                raise ValueError(f"groups={conv.groups}: {to} has none")
            settings["groups"] = conv.groups
    if max(conv.dilation) > 1:
        if "dilation" not in announced.supports:
            raise ValueError(f"dilation={tuple(conv.dilation)}: {to} has none")
        settings["dilation"] = list(conv.dilation)
    same = resolve_padding("same", conv.kernel_size, conv.dilation)
    pads = same if conv.padding == "same" else resolve_padding(conv.padding, conv.kernel_size, conv.dilation)
    if pads != same:
        raise ValueError(f"padding={conv.padding!r} is not the kernel's half")
    if to == "dcls" and "kernel_count" not in settings:
        settings["kernel_count"] = torch.Size(conv.kernel_size).numel()
        settings.setdefault("version", "v1")
    return {k: v for k, v in settings.items() if k in known or k in options}


def _build(conv: Any, edit: Edit) -> nn.Module:
    announced, ndim, stride = operator(edit["to"]), conv.weight.dim() - 2, tuple(conv.stride)
    settings = {"kernel_size": tuple(conv.kernel_size), **edit["settings"]}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    channels, bias = (conv.in_channels, conv.out_channels), conv.bias is not None
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    if announced.mixes == "space" and depthwise and (set(stride) == {1} or "stride" in announced.supports):
        # Channels stay apart in both, so that nothing need be added.
        module: nn.Module = load(announced, ndim)(*channels, stride=stride, padding="same", bias=bias, **settings)
        return module
    return as_conv(edit["to"], *channels, settings.pop("kernel_size"), stride, ndim, bias, **settings)


@torch.no_grad()
def _carry_over(to: str, conv: Any, made: Any) -> None:
    """Carry the weights over where there is a way to; otherwise ``made`` stays as it starts."""
    carry = _CARRY.get(to)
    if carry is not None and not isinstance(made, nn.Sequential):
        carry(conv, made)


def _copy(conv: Any, made: Any) -> None:
    if made.weight.shape == conv.weight.shape:
        made.weight.copy_(conv.weight)
        _copy_bias(conv, made)


def _copy_bias(conv: Any, made: Any) -> None:
    if conv.bias is not None and made.bias is not None:
        made.bias.copy_(conv.bias)


def _weighted(conv: Any, made: Any) -> None:
    if made.weight.shape == conv.weight.shape and bool((made.Phi != 0).all()):
        made.weight.copy_(conv.weight / made.Phi)
        _copy_bias(conv, made)


def _positions(conv: Any, made: Any) -> None:
    """A weight on the place of every tap, the rest without weight."""
    sizes, dilations = conv.kernel_size, conv.dilation
    taps = torch.Size(sizes).numel()
    if made.weight.shape[-1] < taps or any(
        s < d * (k - 1) + 1 for s, k, d in zip(made.size, sizes, dilations, strict=True)
    ):
        return
    made.weight.zero_()
    made.weight[..., :taps] = conv.weight.flatten(2)
    places = itertools.product(*(range(k) for k in sizes))
    for number, place in enumerate(places):
        for axis, (t, k, d, s) in enumerate(zip(place, sizes, dilations, made.size, strict=True)):
            # "same" padding aligns the kernels' middles (k − 1) // 2; positions count from ⌊S / 2⌋.
            made.P[axis, ..., number] = d * t - d * (k - 1) // 2 + (s - 1) // 2 - s // 2
    _copy_bias(conv, made)


def _branches(conv: Any, made: Any) -> None:
    """The kernel in the middle of the large one, batch norms neutral, the small branches silent."""
    large = made.lk_origin
    if any(k > s or (s - k) % 2 for k, s in zip(conv.kernel_size, large.kernel_size, strict=True)):
        return
    (_, norm), *sides = made.pairs()
    inside: Any = tuple(
        slice((s - k) // 2, (s + k) // 2) for k, s in zip(conv.kernel_size, large.kernel_size, strict=True)
    )
    large.weight.zero_()
    large.weight[(slice(None), slice(None), *inside)] = conv.weight
    norm.reset_parameters()
    norm.weight.fill_((1 + norm.eps) ** 0.5)
    if conv.bias is not None:
        norm.bias.copy_(conv.bias)
    for _, side in sides:
        side.weight.zero_()
        side.bias.zero_()


def _from_conv(conv: Any, made: Any) -> None:
    keys = {"form", "rank"} if hasattr(made, "form") else {"num_params", "expand_params", "mode"}
    twin = type(made).from_conv(conv, **{k: getattr(made, k) for k in keys if hasattr(made, k)})
    if all(t.shape == made.state_dict()[n].shape for n, t in twin.state_dict().items()):
        made.load_state_dict(twin.state_dict())


_CARRY: dict[str, Callable[[Any, Any], None]] = {
    "conv": _copy,
    "depthwise": _copy,
    "dilated": _copy,
    "weightedconv": _weighted,
    "dcls": _positions,
    "unireplknet": _branches,
    "tunable": _from_conv,
    "apriori": _from_conv,
}


@torch.no_grad()
def _judge(path: str, conv: Any, made: nn.Module, keep_weights: bool) -> SwappedLayer:
    """Run both on noise and say how far they are apart."""
    reach = [2 * (d * (k - 1) + 1) + s for k, d, s in zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)]
    noise = torch.randn(2, conv.in_channels, *reach, generator=torch.Generator().manual_seed(0))
    noise = noise.to(conv.weight.device, conv.weight.dtype)
    ours, theirs = (copy.deepcopy(m).eval()(noise) for m in (made, conv))
    if ours.shape != theirs.shape:
        raise ValueError(f"the operator gives {tuple(ours.shape)}, the convolution {tuple(theirs.shape)}")
    apart = difference(ours, theirs)
    transfer = "fresh" if not keep_weights or apart > CLOSE else "exact" if apart <= EXACT else "approximate"
    return SwappedLayer(path, _name(conv), _name(made), transfer, apart)


def _name(module: nn.Module) -> str:
    parts = [type(m).__name__ for m in module] if isinstance(module, nn.Sequential) else [type(module).__name__]
    return " + ".join(parts)
