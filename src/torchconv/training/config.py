"""What to train with, and what comes back: ``FitConfig``, ``EpochRecord``, ``FitResult``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchconv._common import check, check_choice, check_positive

OPTIMIZERS = ("adamw", "sgd", "kar")
AMP = ("no", "bf16", "fp16")
AUGMENTS = ("none", "shift", "flip")
_POLICIES = ("rand", "augmix", "original", "v0", "3a")


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides the numbers of a run.

    Args:
        epochs: passes over the training split, >= 1.
        batch_size: items a forward pass, over all processes together, >= 1.
        lr: peak learning rate, > 0.
        weight_decay: decoupled (adamw) or L2 (sgd), >= 0; :func:`torchconv.param_groups` says what is exempt.
        optimizer: "adamw", "sgd" (Nesterov) or "kar" (signs, no weight decay; :class:`torchconv.training.kar.Kar`).
        momentum: of sgd, 0 to below 1.
        warmup_epochs: linear warm-up, fractions allowed, >= 0.
        min_lr: where the cosine ends, 0 to ``lr``.
        label_smoothing: 0 to below 1.
        mixup: alpha of the Beta distribution of mixup, 0 is off.
        cutmix: alpha of the Beta distribution of cutmix, 0 is off; with mixup on too, each batch takes one of the two.
        augment: "none", "shift" (random crop after padding by an eighth), "flip" (shift and left-right mirror) or a
            timm policy such as "rand-m9-mstd0.5-inc1", which adds to "flip". Flip and policies need images.
        ema: decay of the averaged weights, 0 is off, below 1; the averaged weights are then the ones evaluated.
        amp: "no", "bf16" or "fp16" (not on a CPU).
        grad_accum: batches an optimiser step, >= 1.
        clip_grad: largest gradient norm, 0 is off.
        early_stop: epochs without a better validation accuracy before stopping, 0 is off.
        seed: of data order, augmentation and dropout, >= 0.
        device: "auto" (cuda, then mps, then cpu), "cpu", "cuda", "cuda:1", "mps".

    Example:
        >>> FitConfig(epochs=5, augment="shift").validate()
        >>> FitConfig(epochs=0).validate()
        Traceback (most recent call last):
        ValueError: epochs=0: must be an integer >= 1
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.05
    optimizer: str = "adamw"
    momentum: float = 0.9
    warmup_epochs: float = 1.0
    min_lr: float = 1e-6
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: str = "none"
    ema: float = 0.0
    amp: str = "no"
    grad_accum: int = 1
    clip_grad: float = 0.0
    early_stop: int = 0
    seed: int = 0
    device: str = "auto"

    @property
    def policy(self) -> str | None:
        """The timm auto-augment policy, if ``augment`` is one."""
        return None if self.augment in AUGMENTS else self.augment

    def validate(self) -> None:
        """Raise ``ValueError`` naming the first argument that is out of range."""
        for name in ("epochs", "batch_size", "grad_accum"):
            check_positive(name, getattr(self, name))
        for name in ("early_stop", "seed"):
            check_positive(name, getattr(self, name), zero=True)
        for name in ("weight_decay", "warmup_epochs", "min_lr", "mixup", "cutmix", "clip_grad"):
            check(_number(getattr(self, name)) >= 0, name, getattr(self, name), "must be a number >= 0")
        for name in ("momentum", "label_smoothing", "ema"):
            value = getattr(self, name)
            check(0 <= _number(value) < 1, name, value, "must be a number from 0 to below 1")
        check(_number(self.lr) > 0, "lr", self.lr, "must be a number > 0")
        check(self.min_lr <= self.lr, "min_lr", self.min_lr, f"must not exceed lr={self.lr}")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("amp", self.amp, AMP)
        if not self.augment.startswith(_POLICIES):
            check_choice("augment", self.augment, (*AUGMENTS, "rand-m9-mstd0.5-inc1"))
        check(isinstance(self.device, str), "device", self.device, "must be text such as 'auto', 'cpu' or 'cuda:0'")


def _number(value: Any) -> float:
    """``value`` as a float; NaN, which fails every comparison, for what is not a finite number."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if ok else math.nan


@dataclass(frozen=True)
class EpochRecord:
    """One line of the history.

    Args:
        epoch: counts from 1.
        train_loss: mean over the epoch of what was minimised (label smoothing, mixing and auxiliary losses included).
        val_loss: cross-entropy on the validation split.
        val_accuracy: 0 to 1, of the averaged weights when ``ema`` is on.
        lr: of the epoch's last step, before the multipliers of parameter groups.
        seconds: training and validation.
        images_per_second: training items over training time.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    lr: float
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class FitResult:
    """A finished run; ``model`` holds the weights of ``best_epoch`` and is in eval mode."""

    history: list[EpochRecord]
    model: nn.Module
    seconds: float
    epochs_run: int
    stopped_early: bool
    best_epoch: int


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another run."""
