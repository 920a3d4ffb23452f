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
from torch import nn

from torchconv._common import check, check_choice
from torchconv.catalog import Part, load, operator
from torchconv.ops import as_conv
from torchconv.ops._common import CONV, resolve_padding
from torchconv.ops.roles import options_of
from torchconv.surgery._budget import FREE, TOLERANCE, left_out, nearest
from torchconv.surgery._layers import (
    Where,
    check_own_kernel,
    convolutions,
    grouped,
    inputs_of,
    own_copy,
    parameter_count,
    tied,
)
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
        parameters: of the network, before and after.
    """

    layers: list[SwappedLayer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    parameters: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        count = {t: sum(row.transfer == t for row in self.layers) for t in ("exact", "approximate", "fresh")}
        lines = [f"{len(self.layers)} layers replaced: " + ", ".join(f"{n} {t}" for t, n in count.items())]
        width = max((len(row.path) for row in self.layers), default=0)
        lines += [
            f"  {row.path:<{width}}  {row.transfer:<11} {row.difference:.1e}  {row.old} → {row.new}"
            for row in self.layers
        ]
        lines += [f"  {path}: kept, {why}" for path, why in self.kept.items()]
        before, after = self.parameters
        lines.append(f"parameters: {before:,} → {after:,} ({after / max(before, 1) - 1:+.1%})")
        if self.difference is not None:
            lines.append(f"output differs by {self.difference:.2e} of its largest value on the example")
        return "\n".join(lines)


def swap(
    model: nn.Module,
    to: str,
    *,
    where: Where = "spatial",
    keep_weights: bool = True,
    match: str | None = None,
    example: Any = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of ``model`` with an operator in place of its convolutions.

    Args:
        model: any module; it stays as it is. Hooks, device, type, training mode and shared layers are kept.
        to: an operator of the catalogue (``torchconv list --kind operator``).
        where: "all", "spatial" (kernels larger than 1, the stem excepted), "depthwise", "pointwise", "stem" (the first
            convolution), a pattern for names ("stages.2.*", which means 1 × 1 convolutions of such names too), or a
            predicate of name and module.
        keep_weights: carry the old weights over where there is a way to; otherwise start afresh.
        match: "params" keeps the network's number of parameters within 2 %. Where the operator has a capacity that is
            free to choose (``kernel_count`` of dcls, ``rank`` of apriori, ``width`` of adknet, ``n_layers`` of shallow,
            ``num_features`` of snnk, ``hidden`` of terminator) and that ``options`` leaves open, every layer gets the
            one at which it is as large as the convolution was. What then is still beyond the budget stays a
            convolution, the layers that change most first.
        example: an input; with it the report has the difference of the outputs.
        progress: called with what is being done, layer by layer.
        options: of the operator's constructor.

    Returns:
        The new network; ``swap_report`` on it is the :class:`SwapReport`.

    Raises:
        ValueError: an unknown operator or option, nothing to replace (with the reason for each candidate), or a budget
            that no layer can be replaced within (with what was reachable).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        >>> new = swap(net, "dcls", kernel_size=7, match="params")
        >>> new[2].weight.shape, new.swap_report.parameters
        (torch.Size([8, 8, 3]), (808, 808))
    """
    announced = operator(to)
    if match is not None:
        check_choice("match", match, ("params",))
    new = own_copy(model)
    model = getattr(model, "_orig_mod", model)
    chosen = convolutions(new, where)
    swapped: dict[str, tuple[SwappedLayer, nn.Module, Edit]] = {}
    changes: dict[str, int] = {}
    kept: dict[str, str] = {}
    shared = tied(new)
    # For a budget the largest first, so that smaller ones make up for what larger ones miss.
    order = sorted(chosen, key=lambda path: -parameter_count(chosen[path])) if match else list(chosen)
    say = progress or (lambda line: None)
    for done, path in enumerate(order):
        say(f"layer {done + 1} of {len(order)}: {path}")
        conv = chosen[path]
        try:
            check_own_kernel(conv, shared)
            edit: Edit = {"verb": "swap", "path": path, "to": to, "settings": _settings(announced, conv, options)}
            if match and to in FREE and FREE[to] not in options:
                _fit(conv, edit, FREE[to], parameter_count(conv) - sum(changes.values()))
            made = _build(conv, edit).to(conv.weight.device, conv.weight.dtype).train(conv.training)
            if keep_weights:
                _carry_over(to, conv, made)
            swapped[path] = _judge(path, conv, made, keep_weights), made, edit
            changes[path] = parameter_count(made) - parameter_count(conv)
        except ValueError as error:
            kept[path] = str(error)
    reasons = grouped(kept) or f"where={where!r} matches no convolution"
    check(bool(swapped), "to", to, f"no layer could be replaced ({reasons})")
    if match:
        for path in left_out(changes, TOLERANCE * parameter_count(model)):
            del swapped[path]
            kept[path] = f"its {changes[path]:+,} parameters would leave the budget"
        if not swapped:
            raise ValueError(_unreachable(to, changes, parameter_count(model)))
    for path in chosen:
        if path in swapped:
            put(new, path, swapped[path][1])
    apart = None
    if example is not None:
        say("comparing the outputs")
        before = run(copy.deepcopy(model).eval(), example)
        try:
            after = run(copy.deepcopy(new).eval(), example)
        except Exception as error:  # a network that reads a layer's weight itself fails in its own way
            idle = [path for path in swapped if path not in inputs_of(copy.deepcopy(model).eval(), swapped, example)]
            remedy = f"leave {', '.join(idle[:3])} out" if idle else "leave out the layer that it reads by itself"
            raise ValueError(f"where={where!r}: the network does not run with {to}: {error}; {remedy}") from error
        apart = difference(after, before)
    rows = [swapped[path] for path in chosen if path in swapped]
    report = SwapReport([row for row, _, _ in rows], kept, apart, (parameter_count(model), parameter_count(new)))
    new.swap_report = report  # type: ignore[assignment]
    note(new, model, [edit for _, _, edit in rows])
    return new


def _fit(conv: Any, edit: Edit, option: str, target: int) -> None:
    """Set the free option so that the operator has nearly ``target`` parameters."""

    def count(size: int) -> int:
        with torch.device("meta"):
            return parameter_count(_build(conv, {**edit, "settings": {**edit["settings"], option: size}}))

    size = nearest(count, target, conv.groups if edit["to"] == "apriori" else 1)
    if size is not None:
        edit["settings"][option] = size


def _unreachable(to: str, changes: dict[str, int], before: int) -> str:
    total, closest = before + sum(changes.values()), min(changes, key=lambda path: abs(changes[path]))
    one = before + changes[closest]
    return (
        f"match='params': {to} cannot take a layer's place within {TOLERANCE:.0%} of {before:,} parameters; all layers "
        f"give {total:,} ({total / before - 1:+.1%}), {closest} alone {one:,} ({one / before - 1:+.1%}). "
        "Leave match out, or choose other options or another where"
    )


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
    if to == "dcls" and "kernel_size" not in options:  # room for every tap of a larger kernel
        settings["kernel_size"] = [max(k, settings["kernel_size"]) for k in conv.kernel_size]
    if to == "dcls" and "kernel_count" not in settings:
        settings["kernel_count"] = torch.Size(conv.kernel_size).numel()
        settings.setdefault("version", "v1")
    return {k: v for k, v in settings.items() if k in known or k in options}


def _build(conv: Any, edit: Edit) -> nn.Module:
    announced, ndim, stride = operator(edit["to"]), conv.weight.dim() - 2, tuple(conv.stride)
    size = tuple(conv.kernel_size)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in edit["settings"].items()}
    channels, bias = (conv.in_channels, conv.out_channels), conv.bias is not None
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    if announced.mixes == "space" and depthwise and (set(stride) == {1} or "stride" in announced.supports):
        # Channels stay apart in both, so that nothing need be added.
        module: nn.Module = load(announced, ndim)(
            *channels, stride=stride, padding="same", bias=bias, **{"kernel_size": size, **settings}
        )
        return module
    return as_conv(edit["to"], *channels, size, stride, ndim, bias, **settings)


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
    """A weight on the place of every tap, the rest without weight; with fewer weights, on the largest taps."""
    sizes, dilations = conv.kernel_size, conv.dilation
    if any(s < d * (k - 1) + 1 for s, k, d in zip(made.size, sizes, dilations, strict=True)):
        return
    taps = torch.Size(sizes).numel()
    count = min(taps, made.weight.shape[-1])
    weight = conv.weight.flatten(2)
    chosen = weight.abs().topk(count).indices.sort().values if count < taps else torch.arange(taps).expand_as(weight)
    made.weight.zero_()
    made.weight[..., :count] = weight.gather(-1, chosen.to(weight.device))
    places = torch.tensor(list(itertools.product(*(range(k) for k in sizes))), device=weight.device)
    for axis, (k, d, s) in enumerate(zip(sizes, dilations, made.size, strict=True)):
        # "same" padding aligns the kernels' middles (k − 1) // 2; positions count from ⌊S / 2⌋.
        centre = d * (k - 1) // 2 - (s - 1) // 2 + s // 2
        made.P[axis, ..., :count] = (d * places[:, axis] - centre)[chosen.to(weight.device)].to(made.P.dtype)
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
    theirs = conv._conv_forward(noise, conv.weight, conv.bias)  # without its hooks, which stay in its place
    ours = copy.deepcopy(made).eval()(noise)
    if ours.shape != theirs.shape:
        raise ValueError(f"the operator gives {tuple(ours.shape)}, the convolution {tuple(theirs.shape)}")
    apart = difference(ours, theirs)
    transfer = "fresh" if not keep_weights or apart > CLOSE else "exact" if apart <= EXACT else "approximate"
    return SwappedLayer(path, _name(conv), _name(made), transfer, apart)


def _name(module: nn.Module) -> str:
    parts = [type(m).__name__ for m in module] if isinstance(module, nn.Sequential) else [type(module).__name__]
    return " + ".join(parts)
