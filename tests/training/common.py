"""A data set and a model small enough to train in a test."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchconv.data import Dataset, Split
from torchconv.training import EpochRecord


def make_data(size: tuple[int, ...] = (6, 6), channels: int = 1, train: int = 41, seed: int = 0) -> Dataset:
    """Three classes told apart by where the bright stripe lies along the last axis; uint8."""
    generator = torch.Generator().manual_seed(seed)

    def split(items: int) -> Split:
        y = torch.randint(3, (items,), generator=generator)
        x = torch.randint(0, 120, (items, channels, *size), generator=generator, dtype=torch.uint8)
        columns = torch.arange(size[-1]) * 3 // size[-1]
        lit = columns == y[:, None]
        return Split(x + 100 * lit.view(items, 1, *[1] * (len(size) - 1), -1).to(torch.uint8), y)

    return Dataset.from_splits("stripes", split(train), split(23), split(19), ["a", "b", "c"])


class Net(nn.Module):
    """Convolution, batch norm, dropout, pooling to three columns, linear: everything that has state."""

    def __init__(self, channels: int = 1, norm: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.conv(x)).relu())
        return self.head(nn.functional.adaptive_avg_pool2d(x, (1, 3)).flatten(1))


def make_net(**options: object) -> Net:
    torch.manual_seed(0)
    return Net(**options)  # type: ignore[arg-type]


def numbers(history: list[EpochRecord]) -> list[tuple[float, ...]]:
    """A history without the times, which differ between runs."""
    return [(r.epoch, r.train_loss, r.val_loss, r.val_accuracy, r.lr) for r in history]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit the same weights and buffers."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
