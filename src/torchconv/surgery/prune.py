"""Channels removed from a trained network, for good: smaller dense layers, faster everywhere, no sparse kernels.

Which channels go is decided elsewhere (:mod:`torchconv.compress`); here a mask over the channels of a batch norm, True
where a channel stays, takes its rows out of the layers before and its columns out of the layers behind. Channels that
an addition or a depthwise convolution ties together go together. For what the authors of MaskSparsity do by a table of
names (arXiv 2201.06776), the ties are read off one run of the network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, did_you_mean
from torchconv.analysis.count import count
from torchconv.catalog import part
from torchconv.surgery._channels import ChannelGroup, trace
from torchconv.surgery._layers import grouped, inputs_of, own_copy, parameter_count
from torchconv.surgery._probe import make_up
from torchconv.surgery.structure import Edit, note, verb

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune` did.

    Attributes:
        channels: batch norm → channels before and after, of those that lost some.
        parameters, macs: of the whole network, before and after; multiply-adds are None without an example.
    """

    channels: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.channels)} batch norms pruned; parameters {_change(self.parameters)}"]
        lines += [f"  {path}: {_change(sizes)}" for path, sizes in self.channels.items()]
        if self.macs is not None:
            lines.append(f"MACs on the example {_change(self.macs)}")
        return "\n".join(lines)


def _change(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{before:,} → {after:,} ({after / max(before, 1):.0%})"


def channel_groups(model: nn.Module, example: Any = None) -> list[ChannelGroup]:
    """Which batch norms share their channels, and the layers that make and read these.

    Args:
        model: any module; it runs once, in eval mode, and stays as it is.
        example: an input (a tuple of arguments, a dict of keywords); unset, one is made up.

    Returns:
        The groups, each with the reason why its channels cannot be removed where that is so: a concatenation, a grouped
        convolution, a reshape, a product with other tensors, or that the network returns them.

    Raises:
        ValueError: no input could be made up.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> [group] = channel_groups(net, torch.randn(1, 3, 8, 8))
        >>> group.norms, group.producers, group.consumers
        (('1',), ('0',), ('3',))
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        return trace(model, make_up(model) if example is None else example)
    finally:
        for module in training:
            module.training = True


@part(
    "prune",
    paper="masksparsity",
    kind="surgery",
    dims=(1, 2, 3),
    keywords="channel pruning structured remove channels dependency graph groups smaller faster compress",
)
def prune(
    model: nn.Module,
    masks: Masks,
    example: Any = None,
    *,
    groups: Iterable[ChannelGroup] | None = None,
    absorb: bool = False,
) -> nn.Module:
    """A copy of ``model`` without the channels whose mask is False.

    It computes what ``model`` computes when the removed channels' γ and β are zero (and their activation makes zero of
    it). A channel whose γ alone is zero still feeds the constant act(β) to the layers behind. That is lost, and a short
    fine-tuning makes up for it, or ``absorb`` keeps it. What layers without a norm add to these channels is lost too.

    Args:
        model: any module; it stays as it is.
        masks: batch norm → which of its channels stay, (channels,) of bool. Norms without an entry keep all. Norms of
            one group have one mask, see :func:`torchconv.compress.masksparsity.channel_masks`.
        example: an input (a tuple of arguments, a dict of keywords) to find the groups with and to count on; unset, one
            is made up where groups have to be found. Given, the new network is seen to run on it.
        groups: given instead of found.
        absorb: add what the removed channels feed to the layers behind, when their γ is zero, to the biases of these.
            Exact but for borders that a convolution pads with zeros. Needs ``example``; transposed convolutions are
            left out.

    Returns:
        The new network; ``prune_report`` on it is the :class:`PruneReport`. It is saved and loaded by
        :mod:`torchconv.weights` as the network that it came from is.

    Raises:
        ValueError: a mask names no batch norm, has another size or removes all channels, norms that share channels have
            different masks, or the channels cannot be removed (with the reason).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> small = prune(net, {"1": torch.arange(8) < 5}, torch.randn(1, 3, 8, 8))
        >>> small[0].out_channels, small[3].in_channels, small.prune_report.parameters
        (5, 5, (276, 174))

    Reference: Jiang et al., arXiv 2201.06776, section 3.3; Liu et al., arXiv 1708.06519.
    """
    new = own_copy(model)
    model = getattr(model, "_orig_mod", model)
    found = list(groups) if groups is not None else channel_groups(new, example)
    chosen = _chosen(found, masks)
    check(example is not None or not absorb, "absorb", absorb, "needs example, to see what removed channels feed")
    shifts = _shifts(new, chosen, example) if absorb else {}
    channels: dict[str, tuple[int, int]] = {}
    layers: dict[str, dict[str, list[int]]] = {}
    for group, keep in chosen:
        index = keep.nonzero().flatten()
        for role, paths in (("out", group.norms + group.producers), ("in", group.consumers), ("both", group.through)):
            for path in paths:
                layer: Any = new.get_submodule(path)
                _narrow(layer, role, index, len(keep))
                layers.setdefault(path, {})[role] = [len(index), len(keep)]
        channels |= dict.fromkeys(group.norms, (len(keep), len(index)))
    for path, shift in shifts.items():
        layer = new.get_submodule(path)
        stay = next((keep for group, keep in chosen if path in group.producers), None)
        _give_bias(layer)
        with torch.no_grad():
            layer.bias += shift if stay is None else shift[stay.to(shift.device)]
    macs = None
    if example is not None:
        before = _macs(model, example)
        try:
            macs = (before, _macs(new, example))
        except RuntimeError as error:
            why = " ".join(str(error).split())[:120]
            raise ValueError(
                f"masks={sorted(channels)[:3]}: code of the network fixes their channels ({why})"
            ) from None
    report = PruneReport(channels, (parameter_count(model), parameter_count(new)), macs)
    new.prune_report = report  # type: ignore[assignment]
    edits: list[Edit] = [
        {"verb": "prune", "path": p, "sides": sides, "bias": p in shifts} for p, sides in layers.items()
    ]
    note(new, model, edits)
    return new


@verb("prune")
def _prune_again(model: nn.Module, edit: Edit) -> None:
    layer: Any = model.get_submodule(edit["path"])
    for role, (kept, size) in edit["sides"].items():
        _narrow(layer, role, torch.arange(kept), size)
    if edit["bias"]:
        _give_bias(layer)


def _macs(model: nn.Module, example: Any) -> int:
    args = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    return count(model, *args, **(example if isinstance(example, dict) else {})).macs


def _chosen(groups: Sequence[ChannelGroup], masks: Masks) -> list[tuple[ChannelGroup, Tensor]]:
    """The groups that lose channels, with their masks."""
    known = {path: group for group in groups for path in group.norms}
    blocked: dict[str, str] = {}
    for path, mask in masks.items():
        check(path in known, "masks", path, f"is no batch norm that was found; {did_you_mean(path, known)}")
        size = known[path].size or mask.numel()
        ok = mask.dtype == torch.bool and mask.shape == (size,)
        check(ok, f"masks[{path!r}]", f"{mask.dtype} {tuple(mask.shape)}", f"expected bool of shape ({size},)")
        if known[path].reason and not bool(mask.all()):
            blocked[path] = known[path].reason
    check(not blocked, "masks", list(blocked)[:3], f"channels cannot be removed ({grouped(blocked)}); leave them out")
    chosen = []
    for group in groups:
        given = [masks[path] for path in group.norms if path in masks]
        if not given or all(bool(mask.all()) for mask in given):
            continue
        same = len(given) == len(group.norms) and all(torch.equal(mask, given[0]) for mask in given)
        remedy = "share channels and need one mask: give the groups to channel_masks, or take vote() of their masks"
        check(same, "masks", ", ".join(group.norms), remedy)
        check(bool(given[0].any()), "masks", ", ".join(group.norms), "would lose all channels; keep one at least")
        chosen.append((group, given[0]))
    return chosen


@torch.no_grad()
def _narrow(layer: Any, role: str, index: Tensor, size: int) -> None:
    """Keep the channels ``index`` of ``size`` on one side of a layer."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(layer, name, 0, index)
        layer.num_features = len(index)
        return
    linear = isinstance(layer, nn.Linear)
    transposed = bool(getattr(layer, "transposed", False))
    if role == "both":
        _select(layer, "weight", 0, index)
        _select(layer, "bias", 0, index)
        layer.in_channels = layer.out_channels = layer.groups = len(index)
    elif role == "out":
        _select(layer, "weight", 1 if transposed else 0, index)
        _select(layer, "bias", 0, index)
        setattr(layer, "out_features" if linear else "out_channels", len(index))
    else:
        axis = 0 if transposed else 1
        width = layer.weight.shape[axis] // size  # of a flattened map, so many columns a channel
        columns = (index[:, None] * width + torch.arange(width, device=index.device)).flatten()
        _select(layer, "weight", axis, columns)
        setattr(layer, "in_features" if linear else "in_channels", len(columns))


def _select(layer: nn.Module, name: str, axis: int, index: Tensor) -> None:
    tensor = getattr(layer, name, None)
    if tensor is None:
        return
    taken = tensor.index_select(axis, index.to(tensor.device))
    for layout, dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):  # index_select forgets it
        if tensor.dim() == dims and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
            taken = taken.contiguous(memory_format=layout)
    if isinstance(tensor, nn.Parameter):
        taken = nn.Parameter(taken, tensor.requires_grad)
    setattr(layer, name, taken)


@torch.no_grad()
def _shifts(model: nn.Module, chosen: Sequence[tuple[ChannelGroup, Tensor]], example: Any) -> dict[str, Tensor]:
    """What each layer behind removed channels makes of the constants that these feed when their γ is zero."""
    readers: dict[str, Tensor] = {}
    still = copy.deepcopy(model).eval()
    for group, keep in chosen:
        for path in group.norms:
            norm: Any = still.get_submodule(path)
            if norm.weight is not None:
                norm.weight[~keep.to(norm.weight.device)] = 0
        readers |= dict.fromkeys(group.consumers, ~keep)
    seen = inputs_of(still, readers, example)
    shifts = {}
    for path, gone in readers.items():
        layer: Any = model.get_submodule(path)
        if path not in seen or getattr(layer, "transposed", False):
            continue
        x = seen[path][0]
        gone = gone.to(x.device).repeat_interleave(x.shape[1] // len(gone))
        constants = x.transpose(0, 1).flatten(1).median(1).values * gone
        shifts[path] = (
            layer.weight.flatten(2).sum(2) @ constants if layer.weight.dim() > 2 else layer.weight @ constants
        )
    return shifts


def _give_bias(layer: Any) -> None:
    if layer.bias is None:
        weight = layer.weight
        layer.bias = nn.Parameter(weight.new_zeros(len(weight)), weight.requires_grad)
