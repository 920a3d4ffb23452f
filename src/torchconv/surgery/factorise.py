"""Dense kernels of a trained network as products of small factors: tensor formats fitted layer by layer.

The forms are those of :mod:`torchconv.ops.apriori`, the fits those of :mod:`torchconv.ops.factorise`. What every layer
lost is measured: on its kernel always, on its output and on the network's output where there is an example.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from torchconv._common import check, check_choice, did_you_mean
from torchconv.ops._common import CONV
from torchconv.ops._factored import EXECUTIONS
from torchconv.ops.apriori import FORMS, APrioriConv, APrioriConv1d, APrioriConv2d, APrioriConv3d
from torchconv.ops.factorise import choose_rank, factorise_kernel
from torchconv.surgery._layers import (
    Where,
    check_own_kernel,
    convolutions,
    distance,
    grouped,
    inputs_of,
    own_copy,
    parameter_count,
    tied,
)
from torchconv.surgery._probe import difference, run
from torchconv.surgery.structure import Edit, note, put, verb

Rank = int | float | tuple[int, int]
_FACTORED: tuple[Any, ...] = (None, APrioriConv1d, APrioriConv2d, APrioriConv3d)


@dataclass(frozen=True)
class FactorisedLayer:
    """One layer.

    Attributes:
        path, form, rank: what it is now.
        energy: share of the squares of the kernel that the factors keep, 1 − kernel_error².
        kernel_error: ‖W − W'‖ / ‖W‖.
        output_error: the same of the layer's output on what it gets in the original network; None without an example.
        parameters: numbers before and after, the bias included.
        macs: multiply-adds before and after, as run on the example; None without one.
    """

    path: str
    form: str
    rank: int | tuple[int, int]
    energy: float
    kernel_error: float
    output_error: float | None
    parameters: tuple[int, int]
    macs: tuple[int, int] | None


@dataclass(frozen=True)
class FactoriseReport:
    """What :func:`factorise` did.

    Attributes:
        layers: those factorised.
        kept: path → why a layer that was asked for stays as it is.
        parameters, macs: of the whole network, before and after; multiply-adds of convolutions and matrix products,
            None without an example.
        difference: of the network's output on the example, relative to the largest value; None without one.
    """

    layers: list[FactorisedLayer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] | None = None
    difference: float | None = None

    def __str__(self) -> str:
        width = max((len(row.path) for row in self.layers), default=0)
        lines = [f"{len(self.layers)} layers factorised, {len(self.kept)} kept; parameters {_change(self.parameters)}"]
        for row in self.layers:
            rank = "×".join(map(str, row.rank)) if isinstance(row.rank, tuple) else str(row.rank)
            line = f"  {row.path:<{width}}  {row.form} rank {rank:<9} energy {row.energy:.4f}"
            line += "" if row.output_error is None else f"  output error {row.output_error:.3f}"
            line += f"  parameters {_change(row.parameters)}"
            line += "" if row.macs is None else f"  MACs {_change(row.macs)}"
            lines.append(line)
        lines += [f"  {path}: kept, {why}" for path, why in self.kept.items()]
        if self.macs is not None:
            lines.append(f"MACs on the example {_change(self.macs)}")
        if self.difference is not None:
            lines.append(f"output differs by {self.difference:.2e} of its largest value on the example")
        return "\n".join(lines)


def _change(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{before:,} → {after:,} ({after / max(before, 1):.0%})"


def factorise(
    model: nn.Module,
    *,
    rank: Rank | Mapping[str, Rank] | None = None,
    energy: float | None = None,
    form: str = "sequential",
    where: Where | None = None,
    example: Any = None,
    force: bool = False,
    execute: str | None = None,
) -> nn.Module:
    """A copy of ``model`` whose convolutions have low-rank kernels, fitted to the dense ones.

    Args:
        model: any module; it stays as it is. Hooks, device, type, training mode and shared layers are kept;
            parametrisations (``torch.nn.utils.parametrize``) end in the kernel that they give now.
        rank: one of

            - an int R, for every layer (at most what its form can use);
            - a float in (0, 1], the share of the kernel's numbers that its factors may hold: the best such rank;
            - a pair, for tucker: of the outputs and of the inputs;
            - a dict from names or patterns of layers to those; only the layers it names are factorised.
        energy: in (0, 1], the share of the squares of each kernel that its factors must hold; the smallest such rank.
            Give rank or energy; "depthwise_1d" has neither.
        form: "sequential" (one-way filters, vertical then horizontal), "tucker", "cp" (needs tensorly, extra
            ``surgery``, and time), "per_pair" or "depthwise_1d", see :mod:`torchconv.ops.apriori`. Groups and depthwise
            layers are taken by all; "sequential" and "per_pair" suit large depthwise kernels.
        where: as in :func:`~torchconv.surgery.swap`; unset: "spatial", or with a dict every layer it names.
        example: an input (a tuple of arguments, a dict of keywords); with it errors of outputs and multiply-adds are
            measured.
        force: also where the factors hold as many numbers as the kernel or more; otherwise such layers are kept.
        execute: "auto", "factored" or "dense", see :func:`~torchconv.ops.apriori.factored_conv`; unset: as passes
            where they need fewer multiply-adds than the dense kernel. On a CPU, passes that save less than half of them
            are mostly slower than the dense kernel, which ``merge`` gives back.

    Returns:
        The new network; ``factorise_report`` on it is the :class:`FactoriseReport`.

    Raises:
        ValueError: an option is out of range, or nothing was factorised (with the reason for each candidate).

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
        >>> small = factorise(net, rank=0.5, example=torch.zeros(1, 3, 16, 16))
        >>> [(row.path, row.rank, row.parameters) for row in small.factorise_report.layers]
        [('2', 16, (4640, 2336))]

    Reference: Boukraichi et al., arXiv 2304.04964 (forms); Kim et al., arXiv 1511.06530 (tucker of trained networks).
    """
    check_choice("form", form, FORMS)
    if execute is not None:
        check_choice("execute", execute, EXECUTIONS)
    given = [n for n, v in (("rank", rank), ("energy", energy)) if v is not None]
    wanted = "neither" if form == "depthwise_1d" else "one"
    check(len(given) == (wanted == "one"), "rank", rank, f"{form} takes {wanted} of rank and energy (={energy!r})")
    check(energy is None or 0 < energy <= 1, "energy", energy, "must be in (0, 1]")
    if where is None:
        where = "all" if isinstance(rank, Mapping) else "spatial"
    new = own_copy(model)
    model = getattr(model, "_orig_mod", model)
    asked = _ranks(convolutions(new, where), rank)
    shared = tied(new)
    kept: dict[str, str] = {}
    made: dict[str, APrioriConv] = {}
    for path, wish in asked.items():
        conv: Any = new.get_submodule(path)
        try:
            _check_plain(conv, shared)
            made[path] = _fit(conv, wish, energy, form, force, execute)
        except ValueError as error:
            kept[path] = str(error)
    inputs = inputs_of(copy.deepcopy(model).eval(), made, example) if example is not None else {}
    if example is not None:
        idle = [path for path in made if path not in inputs]
        kept |= dict.fromkeys(idle, "the example does not pass through it; another module may read its weight")
        made = {path: layer for path, layer in made.items() if path in inputs}
    reasons = grouped(kept) or f"where={where!r} matches no convolution"
    check(bool(made), "form", form, f"no layer was factorised ({reasons})")
    layers = [_judge(path, new.get_submodule(path), layer, inputs.get(path)) for path, layer in made.items()]
    edits: list[Edit] = []
    for path, layer in made.items():
        new = put(new, path, layer)
        edits.append({"verb": "factorise", "path": path, "form": form, "rank": layer.rank, "execute": layer.execute})
    apart, macs = None, None
    if example is not None:
        (before, first), (after, second) = (_counted(copy.deepcopy(m).eval(), example) for m in (model, new))
        apart, macs = difference(after, before), (first, second)
    report = FactoriseReport(layers, kept, (parameter_count(model), parameter_count(new)), macs, apart)
    new.factorise_report = report  # type: ignore[assignment]
    note(new, model, edits)
    return new


@verb("factorise")
def _factorise_again(model: nn.Module, edit: Edit) -> nn.Module:
    conv: Any = model.get_submodule(edit["path"])
    rank = tuple(edit["rank"]) if isinstance(edit["rank"], list) else edit["rank"]
    return put(model, edit["path"], _like(conv, form=edit["form"], rank=rank, execute=edit["execute"]))


def _like(conv: Any, **options: Any) -> APrioriConv:
    """A layer with fresh factors that takes the place of ``conv``."""
    place = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None)
    where = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    layer: APrioriConv = _FACTORED[conv.weight.dim() - 2](
        conv.in_channels, conv.out_channels, *place, **options, **where
    )
    return layer.train(conv.training)


def _ranks(found: Mapping[str, Any], rank: Rank | Mapping[str, Rank] | None) -> dict[str, Rank | None]:
    """The rank that is asked for, by layer."""
    if not isinstance(rank, Mapping):
        _check_rank(rank)
        return dict.fromkeys(found, rank)
    asked: dict[str, Rank | None] = {}
    for pattern, value in rank.items():
        _check_rank(value)
        names = [n for n in found if n == pattern or fnmatch.fnmatch(n, pattern)]
        check(bool(names), "rank", pattern, f"names no convolution; {did_you_mean(pattern, found)}")
        asked.update(dict.fromkeys(names, value))
    return {n: asked[n] for n in found if n in asked}


def _check_rank(rank: Rank | None) -> None:
    if isinstance(rank, float):
        check(0 < rank <= 1, "rank", rank, "a float is a share of the kernel's numbers, in (0, 1]")
        return
    for value in rank if isinstance(rank, tuple) else (rank,):
        ok = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
        check(ok, "rank", rank, "must be a positive int, a share in (0, 1], a pair of ints, or a dict of those")


def _check_plain(conv: Any, shared: set[int]) -> None:
    kind = type(conv).__mro__[1] if parametrize.is_parametrized(conv) else type(conv)
    if kind not in CONV:
        raise ValueError(f"{kind.__name__} computes its kernel or its padding in its own way")
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode={conv.padding_mode!r} is not zeros")
    check_own_kernel(conv, shared)


def _fit(
    conv: Any, rank: Rank | None, energy: float | None, form: str, force: bool, execute: str | None
) -> APrioriConv:
    weight, groups = conv.weight, conv.groups
    if isinstance(rank, float):
        rank = choose_rank(weight, share=rank, form=form, groups=groups)
    elif energy is not None and (form == "tucker" or not force):
        rank = choose_rank(weight, energy=energy, form=form, groups=groups)
    found = factorise_kernel(weight, rank, energy if rank is None else None, form, groups)
    if not force and found.parameters >= found.dense_parameters:
        raise ValueError(
            f"{form} of rank {found.rank} holds {found.parameters:,} numbers, the kernel {found.dense_parameters:,}"
        )
    layer = _like(conv, form=form, rank=found.rank, execute=execute or "dense")
    if execute is None and form != "per_pair":
        layer.execute = _cheaper(conv, layer)
    with torch.no_grad():
        for name, factor in layer.factors().items():
            factor.copy_(found.factors[name])
        if layer.bias is not None:
            layer.bias.copy_(conv.bias)
    layer.factorisation_error = found.error
    return layer


def _cheaper(conv: Any, layer: APrioriConv) -> str:
    """ "factored" where passes need fewer multiply-adds than the dense kernel on a map of some size, else "dense"."""
    sides = [16 * s + d * (k - 1) for s, d, k in zip(conv.stride, conv.dilation, conv.kernel_size, strict=True)]
    x = torch.empty(1, conv.in_channels, *sides, device="meta")
    passes = _like(conv, form=layer.form, rank=layer.rank, execute="factored").to("meta", torch.float32)
    (_, dense), (_, factored) = (_counted(m, x) for m in (_bare(conv).to("meta", torch.float32), passes))
    return "factored" if factored < dense else "dense"


@torch.no_grad()
def _judge(path: str, conv: Any, layer: APrioriConv, inputs: tuple[Tensor, ...] | None) -> FactorisedLayer:
    error = layer.factorisation_error
    assert error is not None
    numbers = conv.weight.numel() + (0 if conv.bias is None else conv.bias.numel())
    sizes = (numbers, parameter_count(layer))
    apart, macs = None, None
    if inputs is not None:
        (theirs, before), (ours, after) = (_counted(m, inputs) for m in (_bare(conv), layer))
        apart, macs = distance(ours, theirs), (before, after)
    return FactorisedLayer(path, layer.form, layer.rank, 1 - error**2, error, apart, sizes, macs)


def _bare(conv: Any) -> nn.Module:
    """``conv`` without its hooks and parametrisations."""
    bare: Any = CONV[conv.weight.dim() - 2](
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        device="meta",
    )
    bare.weight = nn.Parameter(conv.weight.detach())
    if conv.bias is not None:
        bare.bias = nn.Parameter(conv.bias.detach())
    found: nn.Module = bare
    return found


def _counted(model: nn.Module, example: Any) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        out = run(model, example)
    return out, counter.get_total_flops() // 2
