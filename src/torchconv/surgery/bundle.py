"""Feed-forward layers of a network in kernel form: linear – activation – linear as random features and one matrix.

Sehanobish et al. 2023, "Scalable Neural Network Kernels", arXiv 2310.13225, see :mod:`torchconv.ops.snnk`. The wide
activation is never formed: m features of the input times one trained matrix, m·(d + o) multiply-adds instead of
h·(d + o) for d inputs, h hidden units and o outputs. This is an approximation by random features; how good it is, is
measured on inputs that the fit did not see, beside the best affine map, which is what a layer must beat to be worth it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchconv._common import check, check_positive
from torchconv.ops.snnk import PASSED_OVER, fit_closed_form, is_activation, to_snnk
from torchconv.surgery._layers import Where, chosen, distance, exchange, parameter_count
from torchconv.surgery._probe import difference, make_up, run
from torchconv.surgery.structure import Edit, has_hooks, note, put, verb

SAME, ROWS, HELD_OUT = 1e-5, 10_000, 0.2


@dataclass(frozen=True)
class BundledStack:
    """One feed-forward stack.

    Attributes:
        path: where the kernel form is; the other modules' places hold identities.
        modules: paths of what it stands for.
        widths: inputs, hidden units, outputs of its linear layers.
        num_features: m.
        error: ‖ours − original‖ / ‖original‖ on inputs of the original network that the fit did not see.
        affine: the same error of the best affine map, fitted likewise; None without an example.
        parameters: trainable ones before and after.
        fixed: random numbers that are stored beside them.
    """

    path: str
    modules: tuple[str, ...]
    widths: tuple[int, ...]
    num_features: int
    error: float
    affine: float | None
    parameters: tuple[int, int]
    fixed: int


@dataclass(frozen=True)
class BundleReport:
    """What :func:`bundle` did.

    Attributes:
        stacks: those in kernel form.
        kept: path of a stack's first layer → why it was left as it is.
        fitted: whether there was an example to fit on.
        difference: of the network's output on the example (or on noise), relative to the largest value.
    """

    stacks: list[BundledStack] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    fitted: bool = False
    difference: float = 0.0

    def __str__(self) -> str:
        how = "fitted to the example" if self.fitted else "not fitted: train it, or give an example"
        lines = [f"{len(self.stacks)} stacks in kernel form, {how}"]
        width = max((len(row.path) for row in self.stacks), default=0)
        for row in self.stacks:
            before, after = row.parameters
            line = f"  {row.path:<{width}}  {'–'.join(map(str, row.widths))}  {row.num_features} features"
            line += f"  error {row.error:.3f}"
            line += "" if row.affine is None else f" (affine {row.affine:.3f})"
            lines.append(f"{line}  parameters {before:,} → {after:,} and {row.fixed:,} fixed")
        lines += [f"  {path}: kept, {why}" for path, why in self.kept.items()]
        lines.append(f"output differs by {self.difference:.2e} of its largest value")
        return "\n".join(lines)


def bundle(
    model: nn.Module,
    num_features: int | float,
    *,
    example: Any = None,
    where: Where = "*",
    ridge: float = 1e-4,
    orthogonal: bool = True,
    seed: int = 0,
) -> nn.Module:
    """A copy of ``model`` whose feed-forward stacks are random features and one matrix.

    Stacks are found by running the network: linear layers and activations (modules; dropout between them is left out)
    of which each reads just what the one before gives, with a linear layer at both ends: the MLPs of transformers and
    of ConvNeXt, and fully connected networks.

    Args:
        model: any module; it stays as it is. Device, type and training mode are kept.
        num_features: m of every stack, or a float, its share of the first hidden width and so of the multiply-adds.
        example: inputs, the more the better (a tensor of many items; a tuple of arguments, a dict of keywords): the
            matrices are fitted in closed form to what the stacks make of them, four fifths of the vectors, the error is
            taken on the rest. Unset: the matrices are the features of the weights, far from the original.
        where: a pattern for the name of a stack's first linear layer, or a predicate of name and module.
        ridge: of the fits.
        orthogonal: random rows orthogonal in blocks.
        seed: of the random rows. The error varies with it, and falls with the number of features.

    Returns:
        The new network; ``bundle_report`` on it is the :class:`BundleReport`.

    Raises:
        ValueError: an option is out of range, or no stack was found (with the reason for each that came close).

    Example:
        >>> net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
        >>> small = bundle(net, 32, example=torch.randn(500, 16))
        >>> [(row.widths, row.parameters, row.fixed) for row in small.bundle_report.stacks]
        [((16, 64, 8), (1608, 264), 544)]

    Reference: Sehanobish et al., arXiv 2310.13225, the section on bundling.
    """
    if isinstance(num_features, float):
        check(0 < num_features <= 1, "num_features", num_features, "a float is a share of the hidden width, in (0, 1]")
    else:
        check_positive("num_features", num_features)
    new = copy.deepcopy(model)
    modes = {module: module.training for module in new.modules()}
    new.eval()
    seen = make_up(new) if example is None else example
    expected, calls = _watch(new, seen)
    kept: dict[str, str] = {}
    found: list[list[_Call]] = []
    for chain in _chains(calls):
        path = chain[0].path
        if chosen(where, path, new.get_submodule(path)):
            try:
                _check(new, chain, calls, seen, expected)
                found.append(chain)
            except ValueError as error:
                kept[path] = str(error)
    stacks: list[BundledStack] = []
    edits: list[Edit] = []
    cuda = {p.device.index or 0 for p in new.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(cuda)):
        torch.manual_seed(seed)
        for chain in found:
            head = chain[0]
            linear: Any = new.get_submodule(head.path)
            count = num_features
            if isinstance(count, float):
                count = max(1, round(count * linear.out_features))
            paths = [call.path for call in chain]
            edits.append({"verb": "bundle", "paths": paths, "num_features": count, "orthogonal": orthogonal})
            made, row = _fit(new, edits[-1], head.value, example is not None, ridge)
            stacks.append(row)
            _replace(new, paths, made.train(modes[linear]))
    reasons = "; ".join(f"{p}: {why}" for p, why in kept.items())
    reasons = reasons or f"it takes linear – activation – linear as modules, with where={where!r}"
    check(bool(stacks), "model", type(model).__name__, f"no feed-forward stack was found ({reasons})")
    apart = difference(run(new, seen), expected)
    for module, mode in modes.items():
        module.training = mode
    for edit in edits:
        for path in edit["paths"][1:]:
            new.get_submodule(path).training = model.get_submodule(path).training
    new.bundle_report = BundleReport(stacks, kept, example is not None, apart)  # type: ignore[assignment]
    note(new, model, edits)
    return new


@verb("bundle")
def _bundle_again(model: nn.Module, edit: Edit) -> None:
    _replace(model, edit["paths"], _kernel_form(model, edit))


def _stack(model: nn.Module, paths: list[str]) -> nn.Sequential:
    return nn.Sequential(*(model.get_submodule(path) for path in paths))


def _kernel_form(model: nn.Module, edit: Edit, inputs: Tensor | None = None, ridge: float = 1e-4) -> nn.Sequential:
    options = {"inputs": inputs, "ridge": ridge, "orthogonal": edit["orthogonal"]}
    return to_snnk(_stack(model, edit["paths"]), edit["num_features"], **options)


def _replace(model: nn.Module, paths: list[str], made: nn.Module) -> None:
    """``made`` in the place of the first layer, nothing in the others'."""
    for path in paths[1:]:
        put(model, path, nn.Identity())
    put(model, paths[0], made)


@dataclass
class _Call:
    """One call of a linear layer, of an activation or of what is passed over."""

    path: str
    kind: str
    x: Tensor
    y: Tensor
    value: Tensor  # of x, which may be changed in place later


def _watch(model: nn.Module, example: Any) -> tuple[Any, list[_Call]]:
    calls: list[_Call] = []
    handles = []

    def leave(path: str, kind: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            value = args[0].clone() if kind == "linear" else args[0]
            calls.append(_Call(path, kind, args[0], out, value))

        return hook

    for path, module in model.named_modules():
        kind = _kind(module)
        if kind and path:
            handles.append(module.register_forward_hook(leave(path, kind), prepend=True))
    try:
        return run(model, example), calls
    finally:
        for handle in handles:
            handle.remove()


def _kind(module: nn.Module) -> str:
    plain = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
    if plain is nn.Linear:
        return "linear"
    if is_activation(module):
        return "activation"
    return "passed over" if isinstance(module, PASSED_OVER) else ""


def _chains(calls: list[_Call]) -> list[list[_Call]]:
    """Longest runs linear, (activation, linear)+, each reading what the one before gives."""
    chains: list[list[_Call]] = []
    used: set[int] = set()
    for number, start in enumerate(calls):
        if start.kind != "linear" or number in used:
            continue
        chain, complete = [start], [start]
        for later in range(number + 1, len(calls)):
            call = calls[later]
            if call.x is not chain[-1].y:
                continue
            wanted = "activation" if [c.kind for c in chain if c.kind != "passed over"][-1] == "linear" else "linear"
            if call.kind not in (wanted, "passed over"):
                break
            chain = [*chain, call]
            if call.kind == "linear":
                complete = chain
                used.add(later)
        if len(complete) > 1:
            chains.append(complete)
    return chains


def _check(model: nn.Module, chain: list[_Call], calls: list[_Call], example: Any, expected: Any) -> None:
    """Refuse a chain that cannot be put into one module."""
    modules = [model.get_submodule(call.path) for call in chain]
    for call, module in zip(chain, modules, strict=True):
        if sum(other.path == call.path for other in calls) > 1:
            raise ValueError(f"{call.path} is called more than once")
        first, last = module is modules[0], module is modules[-1]
        if (not last and has_hooks(module)) or (not first and has_hooks(module, before=True)):
            raise ValueError(f"a hook of {call.path} watches what will not be computed any more")
    if not all(bool(t.isfinite().all()) for t in (chain[0].value, chain[-1].y)):
        raise ValueError("what it gets or gives on the example is not finite")
    whole = nn.Sequential(*modules)
    places = [whole, *(nn.Identity() for _ in modules[1:])]
    for module, place in reversed(list(zip(modules, places, strict=True))):
        exchange(model, module, place)
    try:
        same = difference(run(model, example), expected) <= SAME
    except Exception as error:
        raise ValueError(f"the network does not run without its layers in their places: {error}") from None
    finally:
        for module, place in zip(modules, places, strict=True):
            exchange(model, place, module)
    if not same:
        raise ValueError("what is between its layers is read from elsewhere as well")


@torch.no_grad()
def _fit(
    model: nn.Module, edit: Edit, inputs: Tensor, fitted: bool, ridge: float
) -> tuple[nn.Sequential, BundledStack]:
    original = _stack(model, edit["paths"])
    linears: list[Any] = [m for m in original if _kind(m) == "linear"]
    rows = inputs.flatten(0, -2)
    rows = rows[torch.randperm(len(rows))[:ROWS].to(rows.device)]
    held = max(1, round(HELD_OUT * len(rows)))
    unseen, known = rows[:held], rows[held:]
    check(not fitted or len(known) > 0, "example", tuple(inputs.shape), "too few vectors to fit on; give more inputs")
    made = _kernel_form(model, edit, known if fitted else None, ridge)
    wanted, affine = original(unseen), None
    if fitted:
        ones = [torch.cat([r, torch.ones_like(r[:, :1])], 1) for r in (known, unseen)]
        affine = distance(ones[1] @ fit_closed_form(ones[0], original(known), ridge).T, wanted)
    before, after = (parameter_count(m) for m in (original, made))
    fixed = sum(b.numel() for b in made.buffers())
    widths = (linears[0].in_features, *(m.out_features for m in linears))
    error = distance(made(unseen), wanted)
    paths = tuple(edit["paths"])
    return made, BundledStack(paths[0], paths, widths, edit["num_features"], error, affine, (before, after), fixed)
