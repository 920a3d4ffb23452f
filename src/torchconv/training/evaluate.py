"""Predictions and scores of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive, require
from torchconv.data import Dataset, Split
from torchconv.training.device import resolve_device
from torchconv.training.inputs import Inputs, inputs_for, resident

Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and accuracy (0 to 1) over ``items`` items."""

    loss: float
    accuracy: float
    items: int


def check_logits(logits: object, items: int, classes: int, model: nn.Module) -> Tensor:
    """``logits`` when it is a tensor (items, classes)."""
    if isinstance(logits, Tensor) and logits.shape == (items, classes):
        return logits
    got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    raise ValueError(f"model={type(model).__name__}: returned {got}; expected logits of shape ({items}, {classes})")


@contextmanager
def evaluating(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Eval mode without gradients on ``device`` (where the model is, for ``None``); modes and place are put back."""
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    home = torch.device("cpu") if first is None else first.device
    place = home if device is None else resolve_device(device)
    training = [module for module in model.modules() if module.training]
    model.eval().to(place)
    try:
        with torch.no_grad():
            yield place
    finally:
        model.to(home)
        for module in training:
            module.training = True


def batch_logits(
    model: nn.Module, x: Tensor, classes: int, batch_size: int, inputs: Inputs, context: Context = nullcontext
) -> Iterator[Tensor]:
    """Float32 logits of raw ``x``, batch by batch, on the device of ``inputs``."""
    for piece in x.split(batch_size):
        with context():
            logits = model(inputs(piece.to(inputs.device, non_blocking=True)))
        yield check_logits(logits, len(piece), classes, model).float()


def predict(
    model: nn.Module, x: Tensor, data: Dataset, *, batch_size: int = 256, device: torch.device | str | None = None
) -> Tensor:
    """Logits of ``model`` for raw items.

    Args:
        model: maps normalised (N, C, \\*spatial) to logits.
        x: items as ``data`` holds them (uint8 or float32), not normalised.
        data: supplies mean, standard deviation and the number of classes.
        batch_size: items a forward pass, >= 1; changes no number beyond round-off.
        device: where to compute; by default where the model is.

    Shape:
        (N, classes), float32 on the CPU.

    Raises:
        ValueError: when ``x`` does not fit the data or the model returns something else than logits.
    """
    check_positive("batch_size", batch_size)
    shape = tuple(data.train.x.shape[1:])
    check(x.shape[1:2] == shape[:1] and x.dim() == len(shape) + 1, "x", tuple(x.shape), f"expected (N, *{shape})")
    with evaluating(model, device) as place:
        inputs = inputs_for(model, data, place)
        pieces = list(batch_logits(model, x, data.num_classes, batch_size, inputs)) if len(x) else []
        return torch.cat(pieces).cpu() if pieces else torch.empty(0, data.num_classes)


def evaluate(
    model: nn.Module,
    split: Split,
    data: Dataset,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Cross-entropy and accuracy of ``model`` on ``split``; arguments as for :func:`predict`."""
    check_positive("batch_size", batch_size)
    check(len(split.y) > 0, "split", f"{len(split.y)} items", "has nothing to evaluate")
    with evaluating(model, device) as place:
        x, y = resident(split.x, place), split.y.to(place)
        loss, accuracy = score(model, x, y, data.num_classes, batch_size, inputs_for(model, data, place))
    return Evaluation(loss / len(y), exact(accuracy, len(y)), len(y))


def exact(accuracy: float, items: int) -> float:
    """The fraction of ``items`` behind a float32 accuracy."""
    return round(accuracy * items) / items


def score(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    classes: int,
    batch_size: int,
    inputs: Inputs,
    context: Context = nullcontext,
    sync: bool = False,
) -> tuple[float, float]:
    """Summed cross-entropy of these items, and the accuracy (over all processes with ``sync``)."""
    classification = require("torchmetrics.classification", "compare")
    metric = classification.MulticlassAccuracy(
        num_classes=classes, average="micro", validate_args=False, sync_on_compute=sync
    ).to(inputs.device)
    total = torch.zeros((), device=inputs.device)
    outputs = batch_logits(model, x, classes, batch_size, inputs, context)
    for logits, labels in zip(outputs, y.split(batch_size), strict=True):
        total += F.cross_entropy(logits, labels, reduction="sum")
        metric.update(logits, labels)
    return total.item(), metric.compute().item()
