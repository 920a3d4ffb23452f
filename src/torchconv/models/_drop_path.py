"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382), for the residual blocks of the networks."""

from __future__ import annotations

from torch import Tensor, nn

from torchconv._common import check


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero ``x`` for whole samples with probability ``rate`` in training, the others scaled up by 1 / (1 − rate)."""
    if not training or rate == 0:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - rate)
    return x * (keep / (1 - rate))


class DropPath(nn.Module):
    """Drop a residual branch for whole samples with probability ``rate``, in [0, 1), in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        check(0 <= rate < 1, "drop_path", rate, "must be at least 0 and below 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of ``x``."""
        return drop_path(x, self.rate, self.training)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"rate={self.rate}"
