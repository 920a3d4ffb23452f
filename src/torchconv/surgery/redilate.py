"""A network that works at a higher resolution than it was trained at: its convolutions re-dilated, by the step.

Y. He, S. Yang et al. 2023, "ScaleCrafter: Tuning-free Higher-Resolution Visual Generation with Diffusion Models",
arXiv 2310.07702.

The chosen convolutions see φ times as far during the first, noisiest τ of N steps of sampling, where the layout of a
picture is decided, and are themselves afterwards. Layers keep their parameters, parametrisations, hooks and names; a
hook on the network reads the time step that it is called with and sets the factors.
"""

from __future__ import annotations

import copy
import fnmatch
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops._common import CONV
from torchconv.ops.scalecrafter import check_factor, check_same_conv, redilate_conv, step_factor
from torchconv.ops.scalecrafter_dispersed import disperse_kernel, dispersion_matrix
from torchconv.surgery.structure import Edit, note, verb

if TYPE_CHECKING:  # the networks bring timm along, which takes longer to import than the rest
    from torchconv.models.generate.steps import Argument, Steps

Patterns = str | Sequence[str]
Layers = Patterns | Mapping[str, float] | Callable[[str, nn.Module], bool]
T = TypeVar("T")
_DISPERSION = ("large", "size", "scale", "eta", "preserve_sum")


@dataclass(frozen=True)
class RedilateReport:
    """What :func:`redilate` did.

    Attributes:
        layers: path → φ.
        dispersed: paths of the layers that get a larger kernel.
        kept: path → why a layer that was asked for stays as it is.
    """

    layers: dict[str, float] = field(default_factory=dict)
    dispersed: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers re-dilated, {len(self.dispersed)} dispersed"]
        lines += [f"  {path}: {factor:g}" for path, factor in self.layers.items()]
        lines += [f"  {path}: dispersed" for path in self.dispersed]
        lines += [f"  {path}: kept, {why}" for path, why in self.kept.items()]
        return "\n".join(lines)


class _Scheduled:
    """A convolution with a factor and a kernel that change with the step.

    Attributes:
        scale: φ, or None where the layer is not re-dilated.
        matrix: R for the dispersed kernel, or None; follows from the arguments, hence no buffer.
        factor, dispersed: as they are now.
    """

    scale: float | None
    matrix: Tensor | None
    factor: float | None
    dispersed: bool

    def at(self, step: int, tau: int, progressive: bool, disperse_tau: int) -> None:
        """Become what the layer is at a step."""
        self.dispersed = self.matrix is not None and step < disperse_tau
        scale = self.scale
        self.factor = None if scale is None else step_factor(scale, step, tau, progressive, self.dispersed)

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self
        if self.factor is None and not self.dispersed:
            y: Tensor = conv._conv_forward(x, conv.weight, conv.bias)
            return y
        weight = (
            disperse_kernel(conv.weight, self.matrix) if self.dispersed and self.matrix is not None else conv.weight
        )
        batch = x if x.dim() == weight.dim() else x.unsqueeze(0)
        y = redilate_conv(batch, weight, conv.bias, self.factor or 1, conv.stride, conv.dilation, conv.groups)
        return y if batch is x else y.squeeze(0)

    def extra_repr(self) -> str:
        base: Any = super()
        return f"{base.extra_repr()}, scale={self.scale}{', dispersed' if self.matrix is not None else ''}"


class ScheduledConv1d(_Scheduled, nn.Conv1d):
    """``nn.Conv1d``, re-dilated by the step."""


class ScheduledConv2d(_Scheduled, nn.Conv2d):
    """``nn.Conv2d``, re-dilated by the step."""


class ScheduledConv3d(_Scheduled, nn.Conv3d):
    """``nn.Conv3d``, re-dilated by the step."""


_SCHEDULED: tuple[Any, ...] = (nn.Module, ScheduledConv1d, ScheduledConv2d, ScheduledConv3d)


@dataclass(frozen=True)
class _SetStep:
    """The hook before a network's ``forward``; knows nothing of the network, so that it is copied along with it."""

    steps: Steps
    argument: Argument
    progressive: bool
    disperse_tau: int

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self.steps.index(self.argument.read(args, kwargs))
        for module in network.modules():
            if isinstance(module, _Scheduled):
                module.at(step, self.steps.active, self.progressive, self.disperse_tau)


@part(
    "redilate",
    paper="scalecrafter",
    kind="surgery",
    dims=(1, 2, 3),
    keywords="ScaleCrafter higher resolution sampling diffusion U-Net diffusers Stable Diffusion re-dilation dispersed",
)
def redilate(
    model: T,
    scale: float | None = None,
    *,
    layers: Layers | None = None,
    steps: int | Sequence[int] | None = None,
    timesteps: Any = 1000,
    progressive: bool = False,
    disperse: Patterns | None = None,
    disperse_steps: int | None = None,
    dispersion: Mapping[str, Any] | None = None,
    example: Any = None,
    argument: str | None = None,
    share: bool = False,
) -> T:
    """A copy of ``model`` whose convolutions see ``scale`` times as far.

    Args:
        model: any module, or a diffusers pipeline, whose ``unet`` is then meant (all else is shared). It stays as it
            is. Hooks, device, type, training mode, shared layers and parametrisations are kept. Of a compiled network
            the one inside is changed.
        scale: φ ≥ 1, the ratio of the resolutions; fractions are fine.
        layers: a pattern for names ("mid_block.*") or several, a predicate of name and module, or factors by pattern
            ({"mid_block.*": 4, "*.conv2": 2}, the first that fits) instead of ``scale``. Unset is the inner layers,
            from the first halved resolution inwards: by name in networks of diffusers, else measured on ``example``.
        steps: (τ, N): only during the first, noisiest τ of N steps, told by the time step that the network is called
            with; or τ where ``timesteps`` lists all. Unset is always.
        timesteps: the number of time steps in training, a multiple of N, or the sampler's own, noisiest first
            (``scheduler.timesteps``).
        progressive: the factor falls with the steps, max(⌈φ·(τ − i)/τ⌉, 2); published for four times the width.
        disperse: patterns of layers whose kernels are also enlarged by :func:`dispersion_matrix`, k to k + 2, which
            halves their φ.
        disperse_steps: only during so many steps. Unset is τ.
        dispersion: ``large``, ``size``, ``scale``, ``eta`` and ``preserve_sum`` of :func:`dispersion_matrix`.
        example: an input (or a tuple, or a dictionary of arguments) to measure resolutions on.
        argument: of ``model.forward``, the one with the time step; unset is found by its name.
        share: use the parameters and buffers of ``model`` instead of copies.

    Returns:
        The new network; ``redilate_report`` on it is the :class:`RedilateReport`.

    Raises:
        ValueError: an argument is out of range, a pattern matches nothing, or no layer can be re-dilated.

    Example:
        >>> from torchconv.models.generate.unet import SmallUNet
        >>> net = SmallUNet(4, (8, 16), context=6)
        >>> wide = redilate(net, 2.5, steps=(30, 50))
        >>> len(wide.redilate_report.layers)
        7
        >>> x, context = torch.randn(1, 4, 20, 20), torch.randn(1, 6)
        >>> [torch.equal(wide(x, t, context), net(x, t, context)) for t in (981, 401, 381, 1)]
        [False, False, True, True]

    Reference: arXiv 2310.07702, sections 3.2 and 3.3.
    """
    base: Any = model if isinstance(model, nn.Module) else getattr(model, "unet", None)
    ok = isinstance(base, nn.Module)
    check(ok, "model", type(model).__name__, "expected a module, or a pipeline that has one as unet")
    base = getattr(base, "_orig_mod", base)  # of a compiled network the one inside, to be compiled again
    again = any(isinstance(m, _Scheduled) for m in base.modules())
    check(not again, "model", type(base).__name__, "is re-dilated already: start from the network that it came from")
    for name in dispersion or {}:
        check_choice("dispersion", name, _DISPERSION)
    new: Any = _copied(base, share)
    factors = _factors(new, scale, layers, example)
    enlarged = [] if disperse is None else _named(new, disperse, "disperse")
    kept: dict[str, str] = {}
    for path in dict.fromkeys([*factors, *enlarged]):
        module = new.get_submodule(path)
        why = _refusal(module, factors.get(path), path in enlarged, progressive)
        if why:
            kept[path] = why
    edit: Edit = {
        "verb": "redilate",
        "layers": {p: f for p, f in factors.items() if p not in kept},
        "progressive": progressive,
        "disperse": [p for p in enlarged if p not in kept],
        "disperse_steps": disperse_steps,
        "dispersion": dict(dispersion or {}),
        "steps": None,
    }
    reasons = "; ".join(f"{p}: {why}" for p, why in kept.items())
    check(bool(edit["layers"] or edit["disperse"]), "layers", layers, f"no layer can be re-dilated ({reasons})")
    if steps is None:
        check(not progressive, "progressive", progressive, "the factor falls with the steps: give steps=(τ, N)")
        check(disperse_steps is None, "disperse_steps", disperse_steps, "give steps=(τ, N) too")
    else:
        from torchconv.models.generate.steps import Argument, as_steps

        schedule = as_steps(steps, timesteps)
        edit["steps"], edit["timesteps"] = [schedule.active, schedule.total], schedule.timesteps
        edit["argument"] = Argument.timestep(new, argument).name
    _carry_out(new, edit)
    new.redilate_report = RedilateReport(edit["layers"], edit["disperse"], kept)
    note(new, base, [edit])
    if isinstance(model, nn.Module):
        return new
    pipeline: Any = copy.copy(model)
    pipeline.unet = new
    return pipeline


@verb("redilate")
def _carry_out(model: nn.Module, edit: Edit) -> None:
    steps, progressive, disperse_tau = edit["steps"], edit["progressive"], edit["disperse_steps"]
    tau = 1 if steps is None else steps[0]  # without steps, layers stay as they are at the first of one
    if disperse_tau is None:
        disperse_tau = tau
    check_positive("disperse_steps", disperse_tau, zero=True)
    for path in dict.fromkeys([*edit["layers"], *edit["disperse"]]):
        conv: Any = model.get_submodule(path)
        matrix = None
        if path in edit["disperse"]:
            options = {"large": conv.kernel_size[0] + 2, **edit["dispersion"]}
            matrix = dispersion_matrix(conv.kernel_size[0], ndim=len(conv.kernel_size), **options)
        _become_scheduled(conv)
        conv.scale, conv.matrix = edit["layers"].get(path), matrix
        conv.at(0, tau, progressive, disperse_tau)
    if steps is not None:
        from torchconv.models.generate.steps import Argument, as_steps

        argument = Argument.timestep(model, edit["argument"])
        hook = _SetStep(as_steps(steps, edit["timesteps"]), argument, progressive, disperse_tau)
        model.register_forward_pre_hook(hook, with_kwargs=True)


def _become_scheduled(conv: Any) -> None:
    """Give a convolution another class, by which it stays the same object with all that hangs on it."""
    scheduled = _SCHEDULED[len(conv.kernel_size)]
    if parametrize.is_parametrized(conv):
        # As PyTorch makes it: the properties that compute the tensors, in a class of this one module.
        inside = {k: v for k, v in vars(type(conv)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        scheduled = type(f"Parametrized{scheduled.__name__}", (scheduled,), inside)
    conv.__class__ = scheduled


def _refusal(module: Any, factor: float | None, enlarged: bool, progressive: bool) -> str:
    """Why a convolution cannot be re-dilated or dispersed; empty when it can."""
    made = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
    if made not in CONV[1:]:
        return f"{made.__name__} computes in its own way"
    try:
        check_same_conv(module)
        if enlarged:
            equal = len(set(module.kernel_size)) == 1
            check(equal, "kernel_size", tuple(module.kernel_size), "dispersion needs the same size on every axis")
            halves = factor is None or factor >= 2 or progressive
            check(halves, "scale", factor, "dispersion halves it, and 1 is the least: give at least 2")
    except ValueError as error:
        return str(error)
    return ""


def _copied(model: nn.Module, share: bool) -> nn.Module:
    memo: dict[int, Any] = {}
    if share:
        memo = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def _convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions wider than 1 under all their names: there is nothing to spread in others."""
    named = model.named_modules(remove_duplicate=False)
    return {n: m for n, m in named if isinstance(m, CONV[1:]) and max(m.kernel_size) > 1}


def _once(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those names under which a module comes for the first time."""
    seen = {id(model.get_submodule(name)): name for name in reversed(names)}
    return [name for name in names if seen[id(model.get_submodule(name))] == name]


def _named(model: nn.Module, patterns: Patterns, what: str) -> list[str]:
    found = _convolutions(model)
    names: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fits = fnmatch.filter(found, pattern)
        check(bool(fits), what, pattern, "matches no convolution that is wider than 1")
        names.update(dict.fromkeys(fits))
    return _once(model, list(names))


def _factors(model: nn.Module, scale: float | None, layers: Layers | None, example: Any) -> dict[str, float]:
    """φ of every layer that is asked for."""
    if isinstance(layers, Mapping):
        check(scale is None, "scale", scale, "give it or the factors in layers, not both")
        factors: dict[str, float] = {}
        for pattern, factor in layers.items():
            check_factor(factor)
            for name in _named(model, pattern, "layers"):
                factors.setdefault(name, factor)
        return {name: factors[name] for name in _once(model, list(factors))}
    check(scale is not None, "scale", scale, "give the ratio of the resolutions, or factors in layers")
    assert scale is not None
    check_factor(scale)
    if layers is None:
        names = _inner(model, example)
    elif callable(layers):
        names = [name for name, conv in _convolutions(model).items() if layers(name, conv)]
    else:
        names = _named(model, layers, "layers")
    check(bool(names), "layers", layers, "matches no convolution that is wider than 1")
    return dict.fromkeys(_once(model, names), scale)


_BLOCK = re.compile(r"(?:^|\.)(?:(down|up)_blocks\.(\d+)|mid_block)\.")


def _inner(model: nn.Module, example: Any) -> list[str]:
    """Layers from the first halved resolution inwards."""
    found = _convolutions(model)
    if example is not None:
        return _measured(model, list(found), example)
    blocks = {name: match for name in found if (match := _BLOCK.search(name))}
    remedy = "give patterns, or an example on which the inner layers are found"
    check(bool(blocks), "layers", None, f"{type(model).__name__} has no down_blocks, mid_block and up_blocks; {remedy}")
    last = max((int(m[2]) for m in blocks.values() if m[1] == "up"), default=0)
    outer = {"down": 0, "up": last}
    return [name for name, m in blocks.items() if m[1] is None or int(m[2]) != outer[m[1]]]


def _measured(model: nn.Module, names: Sequence[str], example: Any) -> list[str]:
    """Layers that give maps at most half as wide as the widest one."""
    widths: dict[str, int] = {}
    probe = _copied(model, share=True).eval()  # takes the hooks with it
    for name in names:

        def remember(_: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            widths[name] = max(widths.get(name, 0), output.shape[-1])
            widths[""] = max(widths.get("", 0), output.shape[-1], inputs[0].shape[-1])

        probe.get_submodule(name).register_forward_hook(remember)
    with torch.no_grad():
        if isinstance(example, Mapping):
            probe(**example)
        else:
            probe(*example) if isinstance(example, tuple) else probe(example)
    return [name for name in names if name in widths and 2 * widths[name] <= widths[""]]
