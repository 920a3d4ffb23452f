"""Residual blocks side by side instead of in a row: a stack's expansion, cut after products of one or two blocks.

Bermeitinger, Hrycej, Handschuh 2023, "Make Deep Networks Shallow Again", arXiv 2309.08414. With F_i(x) = B_i(x) − x,
blocks B_1 … B_K in a row are the maps x + F_i(x) one after the other, which expand at the stack's input x to

    order 1     x + Σ_i F_i(x)                        every block reads x; nothing waits for anything
    order 2     … + Σ_{i<j} J_j F_i(x)                J_j: derivative of F_j at x, in the direction of the blocks before

For blocks y = x + f(x), F_i is f_i. A block that ends in a ReLU after the sum, y = relu(x + f(x)), has F_i(x) =
max(f_i(x), −x) for x ≥ 0: it is used as it is, and the ReLU is applied once more to the truncated sum, which moves it
no further from the stack's output (that is non-negative, and ReLU is the projection on what is).

Exact: one block; order 2 of two linear blocks; any order where the F_i vanish. Everything else is an approximation: for
residuals of size ε of error O(ε²) at order 1 and O(ε³) at order 2 where blocks are smooth; with a ReLU after the sum of
error O(ε) at either, because x is zero, on the kink, in many places. In trained networks residuals are not small at
all. So the error is measured, and reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchconv._common import check, check_choice, check_positive
from torchconv.ops.shallow import ParallelResidual, residual_stack
from torchconv.surgery._layers import Where, chosen, distance, exchange, own_copy
from torchconv.surgery._probe import difference, make_up, run
from torchconv.surgery._residual import ResidualCall, find_runs, watch
from torchconv.surgery.structure import Edit, note, put, verb

ORDERS = (1, 2)
SAME = 1e-5
SILENT = 1e-5  # gain under which a block adds nothing


class ParallelBlocks(nn.Module):
    """Blocks that keep the shape, side by side.

    Args:
        blocks: B_1 … B_K, modules of one tensor that give one of its shape; they must not change it in place.
        order: 1 or 2, see above; None runs them in a row.
        relu: the blocks end in a ReLU; apply it to the sum as well.

    Shape:
        As the blocks.

    Raises:
        ValueError: another order, or no blocks.

    Example:
        >>> blocks = [nn.Sequential(nn.Identity()) for _ in range(3)]
        >>> ParallelBlocks(blocks)(torch.ones(2))  # no residual: the identity
        tensor([1., 1.])

    Order 2 asks each block for its derivative (forward mode), about twice the work. It can't be exported or compiled,
    nor trained through operations whose derivative PyTorch cannot differentiate (attention, hard-sigmoid).
    Reference: arXiv 2309.08414.
    """

    def __init__(self, blocks: Sequence[nn.Module], order: int | None = 1, relu: bool = False) -> None:
        super().__init__()
        check(len(blocks) > 0, "blocks", blocks, "give one block at least")
        if order is not None:
            check_choice("order", order, ORDERS)
        self.blocks = nn.ModuleList(blocks)
        self.order, self.relu = order, relu

    def forward(self, x: Tensor) -> Tensor:
        """The truncated stack at ``x``."""
        if self.order is None:
            for block in self.blocks:
                x = block(x)
            return x
        if self.order == 1:
            values = [block(x) for block in self.blocks]
            y = sum(values[1:], values[0]) - (len(values) - 1) * x
        else:
            y = self._second(x)
        return torch.relu(y) if self.relu else y

    def _second(self, x: Tensor) -> Tensor:
        """x + Σ_j (F_j(x) + J_j Σ_{i<j} F_i(x)), an evaluation with a derivative for each block but the first."""
        before = self.blocks[0](x) - x
        y = x + before
        for block in list(self.blocks)[1:]:
            # Not torch.func.jvp, under which batch norms could not keep their statistics. Attention has this derivative
            # in one of the ways to compute it only.
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                value, slope = forward_ad.unpack_dual(block(forward_ad.make_dual(x, before)))
            if slope is None:  # the block's output does not depend on x
                slope = torch.zeros_like(value)
            y = y + (value - x) + (slope - before)
            before = before + (value - x)
        return y

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"order={self.order}, relu={self.relu}"


@dataclass(frozen=True)
class ParallelStack:
    """One stack.

    Attributes:
        path: where the parallel form is; the other blocks' places hold identities.
        blocks: the blocks' paths in the original network.
        relu: they end in a ReLU after the sum.
        gains: ‖F_i(x)‖ / ‖x‖ of each, at the stack's input.
        error: ‖parallel − sequential‖ / ‖sequential‖ of the stack's output, on its input in the original network.
        lost: the same error, if the stack were left out: what a truncation at order 0 loses.
    """

    path: str
    blocks: tuple[str, ...]
    relu: bool
    gains: tuple[float, ...]
    error: float
    lost: float


@dataclass(frozen=True)
class ParalleliseReport:
    """What :func:`parallelise` did.

    Attributes:
        order: of the truncation.
        stacks: those in parallel form.
        kept: path → why a block or stack was left as it is.
        difference: of the network's output on the example, relative to the largest value.
    """

    order: int
    stacks: list[ParallelStack] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0

    def __str__(self) -> str:
        lines = [f"{len(self.stacks)} stacks in parallel form, truncated at order {self.order}"]
        width = max((len(row.path) for row in self.stacks), default=0)
        for row in self.stacks:
            gains = " ".join(f"{g:.2f}" for g in row.gains)
            ends = ", ReLU after the sum" if row.relu else ""
            lines.append(
                f"  {row.path:<{width}}  {len(row.blocks)} blocks{ends}  error {row.error:.3f} "
                f"(without the stack {row.lost:.3f})  gains {gains}"
            )
        silent = sum(max(row.gains) < SILENT for row in self.stacks)
        if silent:
            lines.append(
                f"  {silent} of {len(self.stacks)} stacks add nothing (gains below {SILENT:g}), so that errors say "
                "nothing of them: residual branches that start at zero, as in fresh networks of timm, need training"
            )
        lines += [f"  {path}: kept, {why}" for path, why in self.kept.items()]
        lines.append(f"output differs by {self.difference:.2e} of its largest value on the example")
        return "\n".join(lines)


def parallelise(
    model: nn.Module, *, order: int = 1, example: Any = None, where: Where = "*", size: int | None = None
) -> nn.Module:
    """A copy of ``model`` whose stacks of residual blocks are side by side.

    Blocks are found by running the network on the example: modules that add their input, unchanged, to something of the
    same shape, with nothing but a ReLU after it; a stack is a run of them within one parent, each reading just what the
    one before gives. Networks whose blocks are read from elsewhere as well (skip connections) are left alone there.

    A trained network does not keep its accuracy: train it again, or take short stacks (``size=2``) of late blocks.

    Args:
        model: any module; it stays as it is. Hooks, device, type and training mode are kept.
        order: 1, the parallel form; 2, with the products of two blocks.
        example: an input (a tuple of arguments, a dict of keywords) to find the blocks and measure on; unset: noise of
            a size found from the first layer.
        where: a pattern for the names of blocks ("layer3.*"), or a predicate of name and module.
        size: at most this many blocks in a stack; longer runs are cut.

    Returns:
        The new network; ``parallelise_report`` on it is the :class:`ParalleliseReport`.

    Raises:
        ValueError: an option is out of range, or there is no stack (with the reason for each block that came close).

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv = nn.Conv2d(4, 4, 3, padding=1)
        ...     def forward(self, x):
        ...         return x + self.conv(x).relu()
        >>> net = parallelise(nn.Sequential(nn.Conv2d(3, 4, 1), Block(), Block(), Block()))
        >>> [(row.path, row.blocks) for row in net.parallelise_report.stacks]
        [('1', ('1', '2', '3'))]

    Reference: Bermeitinger et al., arXiv 2309.08414.
    """
    check_choice("order", order, ORDERS)
    if size is not None:
        check_positive("size", size)
        check(size > 1, "size", size, "a stack has two blocks at least")
    new = own_copy(model)
    model = getattr(model, "_orig_mod", model)
    modes = {module: module.training for module in new.modules()}
    new.eval()
    if example is None:
        example = make_up(new)
    expected, calls = watch(new, example)
    kept: dict[str, str] = {}
    runs = find_runs(new, calls, where, kept)
    stacks: list[ParallelStack] = []
    edits: list[Edit] = []
    for path, module in list(new.named_modules()):
        ours = isinstance(module, ParallelResidual) and module.order is None and module.n_layers > 1
        if ours and path in calls and chosen(where, path, module):
            stacks.append(_measure_own(module, order, calls[path]))
            edits.append({"verb": "parallelise", "paths": [path], "order": order, "relu": False})
            runs = [r for r in runs if all(c.path != path for c in r)]
    for blocks in _cut(runs, size):
        edit: Edit = {"verb": "parallelise", "paths": [c.path for c in blocks], "order": order, "relu": blocks[0].relu}
        try:
            stacks.append(_try(new, edit, blocks, example, expected))
            edits.append(edit)
        except (ValueError, RuntimeError) as error:
            kept[blocks[0].path] = " ".join(str(error).split())[:200]
    reasons = "; ".join(f"{p}: {why}" for p, why in kept.items())
    reasons = reasons or f"it takes two blocks in a row that keep the shape, with where={where!r}"
    check(bool(stacks), "model", type(model).__name__, f"no stack of residual blocks was found ({reasons})")
    for edit in edits:
        if len(edit["paths"]) == 1:
            _stack(new, edit)
        else:
            new.get_submodule(edit["paths"][0]).order = order  # type: ignore[assignment]
    apart = difference(run(new, example), expected)
    for module, mode in modes.items():
        module.training = mode
    for edit in edits:
        for path in edit["paths"]:
            place: Any = new.get_submodule(path)
            place.training = model.get_submodule(path).training
            if isinstance(place, ParallelBlocks):
                place.blocks.training = place.training
    new.parallelise_report = ParalleliseReport(order, stacks, kept, apart)  # type: ignore[assignment]
    note(new, model, edits)
    return new


@verb("parallelise")
def _stack(model: nn.Module, edit: Edit) -> None:
    """Put the blocks side by side in the first one's place, and nothing in the others'; one is a stack of ours."""
    if len(edit["paths"]) == 1:
        stack: Any = model.get_submodule(edit["paths"][0])
        put(model, edit["paths"][0], stack.with_order(edit["order"]))
        return
    blocks = [model.get_submodule(path) for path in edit["paths"]]
    made = ParallelBlocks(blocks, edit["order"], edit["relu"]).train(blocks[0].training)
    for block in blocks[1:]:
        exchange(model, block, nn.Identity().train(block.training))
    exchange(model, blocks[0], made)


def _cut(runs: list[list[ResidualCall]], size: int | None) -> list[list[ResidualCall]]:
    """Stacks of at most ``size`` blocks; a single one that is left over stays alone."""
    stacks = [r[i : i + (size or len(r))] for r in runs for i in range(0, len(r), size or len(r))]
    return [stack for stack in stacks if len(stack) > 1]


def _try(model: nn.Module, edit: Edit, blocks: list[ResidualCall], example: Any, expected: Any) -> ParallelStack:
    """Put the stack in place, still in a row, and see that nothing changed; measure what the truncation will."""
    modules = [model.get_submodule(call.path) for call in blocks]
    x, last = blocks[0].x, blocks[-1].y
    assert last is not None
    with torch.no_grad():
        truncated = ParallelBlocks(modules, edit["order"], edit["relu"])(x)
        gains = tuple(distance(block(x), x) for block in modules)
    _stack(model, {**edit, "order": None})
    try:
        same = difference(run(model, example), expected) <= SAME
    except Exception as error:
        _undo(model, blocks, modules)
        raise ValueError(f"the network does not run without its blocks in their places: {error}") from None
    if not same:
        _undo(model, blocks, modules)
        raise ValueError("what is between its blocks is read from elsewhere as well")
    paths = tuple(call.path for call in blocks)
    return ParallelStack(paths[0], paths, edit["relu"], gains, distance(truncated, last), distance(x, last))


@torch.no_grad()
def _measure_own(stack: Any, order: int, call: ResidualCall) -> ParallelStack:
    """What a truncation of the library's own stack of layers loses."""
    x, last = call.x, call.y
    assert last is not None
    gains = []
    for layer in stack.layers:
        conv: Any = layer
        alone = residual_stack(x, [conv.weight], [conv.bias], 1, stack.activation, stack.dilation, stack.groups)
        gains.append(distance(alone, x))
    paths = tuple(f"{call.path}.layers.{i}" for i in range(stack.n_layers))
    error = distance(stack.with_order(order)(x), last)
    return ParallelStack(call.path, paths, False, tuple(gains), error, distance(x, last))


def _undo(model: nn.Module, blocks: list[ResidualCall], modules: list[nn.Module]) -> None:
    places = [model.get_submodule(call.path) for call in blocks]
    for place, module in zip(places, modules, strict=True):
        exchange(model, place, module)
