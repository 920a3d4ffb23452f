"""Inference forms: every part's ``merge()`` where it does not cost more, batch norms folded, all of it checked.

A network changed so gives what it gave, which is asked and not believed: every part on the input that it gets in the
network, and the whole on the example and on noise. What does not agree is put back.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from torchconv._common import check
from torchconv.surgery._dataflow import watch
from torchconv.surgery._folding import foldable, is_norm, parametrized
from torchconv.surgery._layers import by_reason, own_copy, parameter_count, some
from torchconv.surgery._probe import another, difference, make_up, run
from torchconv.surgery.structure import Edit, apply_edits, has_hooks, note, put, verb

TOLERANCE = 1e-4
# torchconv's protocol, and those of timm's re-parameterised blocks: a new module is returned, or the block changes.
_METHODS = ("merge", "fuse", "reparameterize", "switch_to_deploy")


@dataclass(frozen=True)
class MergedPart:
    """A part in its inference form; ``difference`` is of its output on the input that it gets, None if not run."""

    path: str
    old: str
    new: str
    difference: float | None


@dataclass(frozen=True)
class FoldedNorm:
    """A batch norm folded into the layer ``into``, which stands "after" or "before" … as ``order`` says of the norm."""

    path: str
    into: str
    order: str


@dataclass(frozen=True)
class Speed:
    """Old time over new: the median of rounds in which both ran in turn, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        unclear = ": no clear difference" if self.low <= 1 <= self.high else ""
        return f"{self.median:.2f}× as fast ({self.low:.2f} to {self.high:.2f}, paired runs){unclear}"


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge` did.

    Attributes:
        merged: parts in their inference form.
        folded: batch norms folded away.
        kept: path → why a mergeable part or a batch norm stays.
        difference: of the network's output on the example and on noise, relative to the largest value; None on the
            meta device.
        parameters: before and after.
        speed: where it was asked for.
    """

    merged: list[MergedPart] = field(default_factory=list)
    folded: list[FoldedNorm] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    parameters: tuple[int, int] = (0, 0)
    speed: Speed | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.merged)} parts merged, {len(self.folded)} batch norms folded, {len(self.kept)} kept"]
        alike: dict[str, list[MergedPart]] = {}
        for row in self.merged:
            alike.setdefault(f"{row.old} → {row.new}", []).append(row)
        for what, rows in alike.items():
            apart = max((row.difference for row in rows if row.difference is not None), default=None)
            within = "" if apart is None else f", within {apart:.1e}"
            lines.append(f"  {len(rows)} × {what}{within}: {some([row.path for row in rows])}")
        lines += [f"  kept, {why}: {some(paths)}" for why, paths in by_reason(self.kept).items()]
        before, after = self.parameters
        lines.append(f"parameters: {before:,} → {after:,}")
        if self.difference is not None:
            lines.append(f"output differs by {self.difference:.2e} of its largest value")
        if self.speed is not None:
            lines.append(f"speed: {self.speed}")
        return "\n".join(lines)


def merge(
    model: nn.Module,
    example: Any = None,
    *,
    fold: bool = True,
    tolerance: float = TOLERANCE,
    timed: bool = False,
) -> nn.Module:
    """A copy of ``model`` in eval mode in its inference form: parts merged, batch norms folded.

    A part is any module with ``merge()``, or with the methods of timm's re-parameterised blocks (``fuse``,
    ``reparameterize``, ``switch_to_deploy``); the outermost that can be merged is. Batch norms are folded into the
    convolution or linear layer directly before them, or behind them where it pads nothing; what may be folded is read
    off a run of the network, so that nothing need be traceable. Computed parameters (``torch.nn.utils.parametrize``)
    become plain ones. Whatever changes the output by more than ``tolerance`` is put back.

    Args:
        model: any module; it stays as it is. Hooks, device, type and shared modules are kept; what a hook looks at is
            not merged away. Half precision is merged and checked in float32.
        example: an input (a tensor, a tuple of arguments or a dictionary of keyword arguments), by default noise. With
            it, a part keeps its own form where the merged one needs more multiply-adds (an Inception depthwise or a
            separable convolution as one dense kernel).
        fold: also fold batch norms and make computed parameters plain.
        tolerance: largest difference of the output, relative to its largest value.
        timed: also measure how much faster it is.

    Returns:
        The new network; ``merge_report`` on it is the :class:`MergeReport`. It is saved and loaded by
        :mod:`torchconv.weights` where the old one is.

    Raises:
        ValueError: no example was given and none could be made up, or the output is not the same from run to run.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fast = merge(net)
        >>> [type(m).__name__ for m in fast], len(fast.merge_report.folded)
        (['Conv2d', 'Identity', 'ReLU'], 1)
    """
    check(tolerance > 0, "tolerance", tolerance, "must be positive")
    base = own_copy(model).eval()
    model = getattr(model, "_orig_mod", model)
    asked = example is not None
    if not asked:
        example = make_up(base)
    narrow = _narrow(base)
    wide = example
    if narrow is not None:
        base = base.float()
        wide = tree_map(lambda t: t.float() if isinstance(t, Tensor) and t.dtype == narrow else t, example)
    work = _Work(base, wide, tolerance, asked)
    if fold:
        work.carry_out(parametrized(work.model))
    work.merge_parts()
    if fold and not work.unreal:
        work.fold_norms()
    result = work.checked()
    if narrow is not None:
        result = result.to(narrow)
    report = MergeReport(
        [row for row in work.merged if row.path in {e["path"] for e in work.edits if e["verb"] == "merge"}],
        [FoldedNorm(e["norm"], e["into"], e["order"]) for e in work.edits if e["verb"] == "fold"],
        work.kept,
        work.difference,
        (parameter_count(model), parameter_count(result)),
        _speed(model, result, example) if timed else None,
    )
    result.merge_report = report  # type: ignore[assignment]
    note(result, model, work.edits)
    return result


@verb("merge")
def _merge(model: nn.Module, edit: Edit) -> nn.Module:
    module = model.get_submodule(edit["path"]).eval()
    check(bool(_methods(module)), "path", edit["path"], f"{type(module).__name__} has no inference form")
    return put(model, edit["path"], _form(module))


class _Work:
    """A network on its way to its inference form, and the edits that led there."""

    def __init__(self, base: nn.Module, example: Any, tolerance: float, cheaper_only: bool) -> None:
        self.base, self.example, self.tolerance, self.cheaper_only = base, example, tolerance, cheaper_only
        self.model = copy.deepcopy(base)
        self.unreal = any(t.is_meta for t in (*base.parameters(), *base.buffers()))
        self.probes = [] if self.unreal else [example, another(example)]
        self.before = [run(base, x) for x in self.probes]
        self.edits: list[Edit] = []
        self.merged: list[MergedPart] = []
        self.kept: dict[str, str] = {}
        self.difference: float | None = None
        self.alive: list[nn.Module] = []
        self._worth: dict[Any, bool] = {}

    def carry_out(self, edits: list[Edit]) -> None:
        self.model = apply_edits(self.model, edits)
        self.edits += edits

    def merge_parts(self) -> None:
        """Merge the outermost parts that can be; go inside where one cannot, and where its form has parts again."""
        todo, done = [""], set()
        while todo:
            calls, known, later = self._calls(), {id(m) for m in self.alive}, list[str]()
            while todo:
                path = todo.pop()
                module = self.model.get_submodule(path)
                if id(module) in done:
                    continue  # shared
                if _methods(module):
                    if id(module) not in known:
                        later.append(path)  # it came with the form of an outer part
                        continue
                    self._try(path, module, *calls.get(id(module), (None, None)))
                    done.add(id(module))
                    module = self.model.get_submodule(path)
                done.add(id(module))
                todo += reversed([f"{path}.{name}" if path else name for name, _ in module.named_children()])
            todo = [] if self.unreal else later
        self.alive.clear()

    def _calls(self) -> dict[int, tuple[Callable[[nn.Module], Any], Any]]:
        """What every mergeable part is called with first, by the part's id: how to call its like, and the shapes."""
        found: dict[int, Any] = {}

        def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
            def call(other: nn.Module) -> Any:
                return run(other, args, kwargs)

            found.setdefault(id(module), (call, _shapes(args, kwargs)))

        parts = [m for m in self.model.modules() if _methods(m)]
        handles = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in parts]
        self.alive += parts  # an id means something only as long as its module lives
        try:
            if parts:
                run(self.model, self.example)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _try(self, path: str, module: nn.Module, call: Callable[[nn.Module], Any] | None, shapes: Any) -> None:
        """Put the inference form of ``module`` in its place if it gives the same and is worth it."""
        if any(has_hooks(m, before) for m in module.modules() if m is not module for before in (True, False)):
            self.kept[path] = "a hook looks at what is inside"
            return
        if call is None:
            self.kept[path] = "it does not run on the example"
            return
        key = (_kind(module), shapes)
        if self.unreal and not self._worth.get(key, True):
            return
        try:
            made = _form(module)
            if _same_structure(module, made):
                return
            if self.cheaper_only and key not in self._worth:
                self._worth[key] = _flops(made, call) <= _flops(module, call)
            apart = None if self.unreal else difference(call(made), call(module))
        except Exception as error:  # the method of somebody else's class may say anything
            self.kept[path] = f"its {_methods(module)[0]}() fails: {type(error).__name__}: {error}"
            return
        if not self._worth.get(key, True):
            self.kept[path] = "merged it needs more multiply-adds"
        elif apart is not None and apart > self.tolerance:
            self.kept[path] = f"merged its output differs by {apart:.1e}"
        else:
            self.merged.append(MergedPart(path, type(module).__name__, type(made).__name__, apart))
            self.edits.append({"verb": "merge", "path": path})
            self.model = put(self.model, path, made)

    def fold_norms(self) -> None:
        """Fold batch norms until there are none left to fold: one behind another shows when the first is gone."""
        more = True
        while more:
            _, flow = watch(self.model, self.example, is_norm)
            edits, why = foldable(self.model, flow)
            more = bool(edits and why)
            self.carry_out(edits)
        self.kept.update(why)

    def checked(self) -> nn.Module:
        """The network if its output is the old one's; otherwise without the edits that are to blame."""
        if self.unreal:
            return self.model
        self.difference = self._apart(self.model)
        if self.difference <= self.tolerance:
            return self.model
        again = self._apart(self.base)
        if again > self.tolerance:
            raise ValueError(f"model: its own output differs by {again:.1e} from run to run, so nothing can be checked")
        good: list[Edit] = []
        rest, self.edits = self.edits, good
        while rest:
            # The longest run of edits that changes nothing; what follows it is to blame.
            fits, fails = 0, len(rest) + 1
            while fails - fits > 1:
                middle = (fits + fails) // 2
                if self._fits([*good, *rest[:middle]]):
                    fits = middle
                else:
                    fails = middle
            good += rest[:fits]
            for edit in rest[fits : fits + 1]:
                self.kept[edit["norm" if edit["verb"] == "fold" else "path"]] = "the network's output would differ"
            rest = rest[fits + 1 :]
        result = apply_edits(copy.deepcopy(self.base), good)
        self.difference = self._apart(result)
        return result

    def _fits(self, edits: list[Edit]) -> bool:
        try:
            return self._apart(apply_edits(copy.deepcopy(self.base), edits)) <= self.tolerance
        except Exception:  # an edit needs one that was left out
            return False

    def _apart(self, model: nn.Module) -> float:
        asked = zip(self.probes, self.before, strict=True)
        return max(difference(run(model, x), before) for x, before in asked)


def _methods(module: nn.Module) -> list[str]:
    """Names of the methods that give an inference form and need no arguments."""
    found = []
    for name in _METHODS:
        method = getattr(module, name, None)
        if inspect.ismethod(method):
            needed = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
            if all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in needed):
                found.append(name)
    return found


def _form(module: nn.Module) -> nn.Module:
    """The inference form of a mergeable module, on its device and of its type; the module stays as it is."""
    twin = copy.deepcopy(module)
    made: Any = getattr(twin, _methods(twin)[0])()
    form: nn.Module = made if isinstance(made, nn.Module) else twin  # timm's change in place
    like = next((t for t in module.parameters() if t.is_floating_point()), None)
    return form.eval() if like is None else form.eval().to(like.device, like.dtype)


def _same_structure(a: nn.Module, b: nn.Module) -> bool:
    """Whether merging changed nothing."""
    shapes = ({n: t.shape for n, t in m.state_dict().items()} for m in (a, b))
    return type(a) is type(b) and repr(a) == repr(b) and next(shapes) == next(shapes)


def _shapes(*arguments: Any) -> tuple[Any, ...]:
    return tuple(tuple(t.shape) for t in tree_leaves(arguments) if isinstance(t, Tensor))


def _flops(module: nn.Module, call: Callable[[nn.Module], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call(module)
    return int(counter.get_total_flops())


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules of the same make, whose costs are then equal too."""
    return repr(module), *(tuple(p.shape) for p in module.parameters())


def _narrow(model: nn.Module) -> torch.dtype | None:
    """The type of a network in half precision throughout."""
    types = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return types.pop() if len(types) == 1 and types <= {torch.float16, torch.bfloat16} else None


def _speed(before: nn.Module, after: nn.Module, example: Any) -> Speed:
    from torchconv.analysis.latency import paired_latency

    models: dict[str, Any] = {"before": before, "after": after}
    if isinstance(example, dict):
        models = {name: partial(run, model, example) for name, model in models.items()}
    ratio = paired_latency(models, None if isinstance(example, dict) else example).ratios["after"]
    return Speed(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)


def stored_parameters(model: nn.Module) -> int:
    """Numbers that must be stored to use ``model``: the smaller of a mergeable part's two forms, and all the rest.

    Buffers of batch norms count neither way, as usual for published parameter counts.
    """
    saved: dict[Any, int] = {}
    done: set[str] = set()
    total = parameter_count(model)
    for name, module in model.named_modules():
        if hasattr(module, "merge") and not any(name.startswith(f"{outer}.") or outer == "" for outer in done):
            done.add(name)
            key = _kind(module)
            if key not in saved:
                fold: Any = module.merge
                own, folded = (parameter_count(m) for m in (module, fold()))
                saved[key] = max(0, own - folded)
            total -= saved[key]
    return total
