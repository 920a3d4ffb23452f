"""How well a map of classes agrees with the ground, in the words of remote sensing.

Shi, Han et al. 2023, arXiv 2306.17207, report overall accuracy, kappa, and user's and producer's accuracy by class.
"""

from __future__ import annotations

from torch import Tensor

from torchconv._common import check, require


def map_accuracy(prediction: Tensor, label: Tensor, num_classes: int | None = None) -> dict[str, Tensor]:
    """Overall accuracy, Cohen's kappa, and the accuracies of each class that its user and its producer see.

    Args:
        prediction: scores, whose largest decides, or class numbers.
        label: class numbers.
        num_classes: K; needed where ``prediction`` holds class numbers.

    Shape:
        (N, K) or (N,), (N,) → numbers, (K,) for each class and (K, K) for the table.

    Returns:
        "accuracy" and "kappa"; "users": of what the map calls a class, the share that is it; "producers": of what is a
        class, the share that the map calls so (both NaN where there is nothing to share); "confusion": counts, rows
        true, columns predicted.

    Raises:
        ValueError: shapes that do not fit, no items, or class numbers out of range.
        ImportError: torchmetrics is not installed (``pip install 'torchconv[compare]'``).

    Example:
        >>> import torch
        >>> found = map_accuracy(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), num_classes=2)
        >>> found["users"].tolist(), found["kappa"]
        ([0.5, 1.0], tensor(0.5000))

    Reference: arXiv 2306.17207; Congalton 1991, "A review of assessing the accuracy of classifications of remotely
    sensed data".
    """
    if prediction.dim() == 2:
        num_classes = prediction.shape[1] if num_classes is None else num_classes
        check(num_classes == prediction.shape[1], "num_classes", num_classes, "is not that of the scores; leave it out")
        prediction = prediction.argmax(1)
    if num_classes is None or num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: must be 2 or more, and given with class numbers")
    fits = prediction.shape == label.shape and label.dim() == 1 and len(label) > 0
    check(
        fits, "label", tuple(label.shape), f"expected {len(prediction)} class numbers, one an item, and an item or more"
    )
    for name, numbers in (("prediction", prediction), ("label", label)):
        ok = not numbers.is_floating_point() and int(numbers.min()) >= 0 and int(numbers.max()) < num_classes
        check(ok, name, tuple(numbers.shape), f"must be class numbers from 0 to {num_classes - 1}")
    metrics = require("torchmetrics.functional.classification", "compare")
    confusion = metrics.multiclass_confusion_matrix(prediction, label, num_classes)
    right = confusion.diagonal()
    return {
        "accuracy": right.sum() / confusion.sum(),
        "kappa": metrics.multiclass_cohen_kappa(prediction, label, num_classes),
        "users": right / confusion.sum(0),
        "producers": right / confusion.sum(1),
        "confusion": confusion,
    }
