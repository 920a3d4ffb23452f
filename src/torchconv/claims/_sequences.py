"""Digits read pixel by pixel, for claims about long sequences: data, a small residual network, training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchconv.claims._support import random_batches, train

STEPS, WIDTH, BATCH = 64, 32, 64


def digit_sequences(count: int) -> tuple[Any, ...]:
    """Digits as (N, 1, 64), row by row: ``count`` to train on and all others to test."""
    import torch
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).reshape(-1, 1, STEPS) / 8 - 1
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:count]], y[order[:count]], x[order[count:]], y[order[count:]]


def sequence_network(layer: Callable[[], Any], blocks: int = 2) -> Any:
    """Encoder, pre-normed residual blocks of ``layer()`` on (B, WIDTH, L), mean over time, decoder."""
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(WIDTH), layer()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.layer(self.norm(x.transpose(1, 2)).transpose(1, 2))
            return out

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(-1)

    return nn.Sequential(nn.Conv1d(1, WIDTH, 1), *(Block() for _ in range(blocks)), Mean(), nn.Linear(WIDTH, 10))


def train_on_digits(layer: Callable[[], Any], seed: int, steps: int, count: int = 1300) -> tuple[Any, Any]:
    """Which test sequences a trained network gets right (0 or 1), and the network."""
    import torch
    import torch.nn.functional as F

    x, y, x_test, y_test = digit_sequences(count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = sequence_network(layer)
        draw = random_batches(x, y, BATCH, seed)

        def loss() -> Any:
            inputs, labels = draw()
            return F.cross_entropy(model(inputs), labels)

        train(model, loss, steps=steps, lr=4e-3)
    with torch.no_grad():
        return (model(x_test).argmax(1) == y_test).double(), model


def image_interval(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[float, float, float]:
    """Difference of two accuracies in points with its 95 % interval over test sequences, seeds averaged in each."""
    import torch

    differences = 100 * (torch.stack(list(ours)).mean(0) - torch.stack(list(theirs)).mean(0))
    mean, half = float(differences.mean()), 1.96 * float(differences.std()) / len(differences) ** 0.5
    return mean, mean - half, mean + half
