"""Parameter groups, the optimiser, the learning-rate schedule and what modules ask of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check
from torchconv.training.config import FitConfig
from torchconv.training.kar import Kar

_OPTIONS = ("lr_mult", "weight_decay")


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups that honour what the modules of ``model`` ask for.

    A module's ``param_options()`` maps names of its parameters to ``{"lr_mult": ..., "weight_decay": ...}`` (either
    may be missing). Otherwise the multiplier is 1, and biases, one-dimensional parameters (norms, scales) and those
    named by timm's ``no_weight_decay()`` are not decayed. Frozen parameters are left out, shared ones appear once.

    Args:
        model: any module.
        lr: base learning rate; a group's ``lr`` is this times its ``lr_mult``.
        weight_decay: for what is decayed.

    Returns:
        Dictionaries with ``params``, ``lr``, ``lr_mult`` and ``weight_decay``, for any ``torch.optim`` optimiser.

    Raises:
        ValueError: when a module names a parameter it does not have, or an option that does not exist.

    Example:
        >>> groups = param_groups(nn.Linear(2, 3), lr=0.1, weight_decay=0.05)
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups]
        [(1, 0.1, 0.05), (1, 0.1, 0.0)]
    """
    options: dict[int, dict[str, float]] = {}
    for path, module in model.named_modules():
        for name, wanted in _asked(module).items():
            label = f"{path or type(model).__name__}.{name}"
            try:
                parameter = module.get_parameter(name)
            except AttributeError:
                raise ValueError(f"param_options of {label}: {type(module).__name__} has no such parameter") from None
            unknown = sorted(set(wanted) - set(_OPTIONS))
            check(not unknown, f"param_options of {label}", unknown, f"the options are {' and '.join(_OPTIONS)}")
            options.setdefault(id(parameter), {}).update(wanted)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = options.get(id(parameter), {})
        exempt = parameter.dim() <= 1 or name.rpartition(".")[2] == "bias"
        decay = float(own.get("weight_decay", 0.0 if exempt else weight_decay))
        mult = float(own.get("lr_mult", 1.0))
        group = {"params": [], "lr": lr * mult, "lr_mult": mult, "weight_decay": decay}
        groups.setdefault((mult, decay), group)["params"].append(parameter)
    return list(groups.values())


def _asked(module: nn.Module) -> dict[str, dict[str, float]]:
    """What one module asks for, by the names of its parameters; torchconv's protocol over timm's."""
    undecayed = getattr(module, "no_weight_decay", None)
    own = {name for name, _ in module.named_parameters()} if callable(undecayed) else set()
    names = set(undecayed()) & own if callable(undecayed) else set()
    asked: dict[str, dict[str, float]] = {name: {"weight_decay": 0.0} for name in names}
    wanted = getattr(module, "param_options", None)
    for name, options in (wanted() if callable(wanted) else {}).items():
        asked[name] = {**asked.get(name, {}), **options}
    return asked


def make_optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """AdamW, SGD with Nesterov momentum, or Kar over :func:`param_groups`."""
    groups = param_groups(model, config.lr, config.weight_decay)
    if not groups:
        raise ValueError(f"model={type(model).__name__}: has no trainable parameters; set requires_grad on some")
    tensors = [p for g in groups for p in g["params"]]
    # The fused step is one kernel and keeps fp16's overflow flag on the device; complex parameters lack it.
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in tensors)
    if config.optimizer == "kar":
        return Kar(groups, lr=config.lr)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    nesterov = config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


def learning_rate(step: int, steps_per_epoch: int, config: FitConfig) -> float:
    """The rate of optimiser step ``step`` (from 0): linear warm-up over W steps, then half a cosine to the end T.

    lr·(t+1)/W for t < W, min_lr + (lr − min_lr)·(1 + cos(π·(t−W)/(T−W)))/2 after. A closed form, so that a resumed run
    needs no state of a scheduler.

    Example:
        >>> c = FitConfig(epochs=2, lr=1.0, min_lr=0.0, warmup_epochs=0.5)
        >>> [round(learning_rate(t, 4, c), 3) for t in range(8)]
        [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
    """
    total = config.epochs * steps_per_epoch
    warm = min(round(config.warmup_epochs * steps_per_epoch), total)
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class Hooks:
    """The ``after_step()`` and ``auxiliary_loss(modules, epoch)`` of a model's modules, found once."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[Callable[[], None]] = []
        classes: dict[type[nn.Module], list[nn.Module]] = {}
        for module in model.modules():
            if callable(step := getattr(module, "after_step", None)):
                self.steps.append(step)
            if callable(getattr(type(module), "auxiliary_loss", None)):
                classes.setdefault(type(module), []).append(module)
        self.losses: list[tuple[Any, list[nn.Module]]] = list(classes.items())

    def after_step(self) -> None:
        """Let the modules correct their parameters (clamping, projection) after an optimiser step."""
        for step in self.steps:
            step()

    def auxiliary_loss(self, loss: Tensor, epoch: int) -> Tensor:
        """``loss`` plus what each class adds; ``epoch`` counts from 0."""
        for cls, modules in self.losses:
            extra = cls.auxiliary_loss(modules, epoch)
            if extra is not None:
                loss = loss + extra
        return loss
