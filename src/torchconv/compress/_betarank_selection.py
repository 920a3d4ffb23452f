"""Ranks to filters that stay, layer by layer, and to masks over the batch norms behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchconv._common import check, check_positive, did_you_mean

if TYPE_CHECKING:
    from torchconv.surgery._channels import ChannelGroup

Rates = float | Sequence[float] | Mapping[str, float]


def normalise_ranks(scores: Tensor) -> Tensor:
    """Scores of one layer scaled to [0, 1]; 0 for all where they are equal.

    Example:
        >>> normalise_ranks(torch.tensor([2.0, 4.0, 3.0]))
        tensor([0.0000, 1.0000, 0.5000])
    """
    low, high = scores.aminmax()
    return (scores - low) / torch.where(high > low, high - low, 1)


def keep_largest(ranks: Tensor, count: int) -> Tensor:
    """Sorted indices of the ``count`` filters of the largest ranks; among equal ones, of the later filter.

    Example:
        >>> keep_largest(torch.tensor([0.2, 1.0, 0.0, 0.5]), 2)
        tensor([1, 3])
    """
    check_positive("count", count)
    check(count <= len(ranks), "count", count, f"the layer has {len(ranks)} filters")
    return ranks.argsort(stable=True)[len(ranks) - count :].sort().values


def select(ranks: Mapping[str, Tensor], rates: Rates) -> dict[str, Tensor]:
    """Which filters of every layer stay: ``int(O · (1 − rate))`` of the largest ranks, at least one.

    Args:
        ranks: layer → (O,), as from :meth:`BetaRank.collect`.
        rates: the share of filters to remove, in [0, 1): one for all layers, one for each in the order of ``ranks``, or
            a dict; layers that a dict does not name stay whole and are left out of the result.

    Returns:
        Layer → sorted indices of the filters to keep.

    Raises:
        ValueError: rates out of range, of the wrong number, or for unknown layers.

    Example:
        >>> select({"a": torch.tensor([3.0, 1.0, 2.0, 0.0]), "b": torch.rand(8)}, {"a": 0.5})
        {'a': tensor([0, 2])}
    """
    wanted = _rates(ranks, rates)
    return {name: keep_largest(ranks[name], kept_count(len(ranks[name]), rate)) for name, rate in wanted.items()}


def kept_count(filters: int, rate: float) -> int:
    """``int(filters · (1 − rate))``, at least one; rounded as the released code rounds it."""
    return max(1, int(filters * (1 - rate)))


def _rates(ranks: Mapping[str, Tensor], rates: Rates) -> dict[str, float]:
    if isinstance(rates, Mapping):
        for name in rates:
            check(name in ranks, "rates", name, did_you_mean(name, ranks) if ranks else "no layer was ranked")
        wanted = dict(rates)
    elif isinstance(rates, Sequence):
        check(len(rates) == len(ranks), "rates", list(rates), f"give one for each of the {len(ranks)} layers")
        wanted = dict(zip(ranks, rates, strict=True))
    else:
        wanted = dict.fromkeys(ranks, rates)
    for name, rate in wanted.items():
        check(0 <= rate < 1, "rates", rate, f"the share of filters of {name} to remove, from 0 to below 1")
    return wanted


def filter_masks(ranks: Mapping[str, Tensor], rates: Rates, groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """Masks over batch norms that keep the filters of the largest ranks, for :func:`torchconv.surgery.prune`.

    Convolutions whose outputs are added share one mask: their ranks, scaled within each layer, are averaged, and the
    smallest of their rates holds. Channels that cannot be removed, that nothing normalises, or that layers without a
    rank make as well stay whole.

    Args:
        ranks: layer → ranks, as from :meth:`BetaRank.collect`.
        rates: as in :func:`select`.
        groups: what :func:`torchconv.surgery.channel_groups` returns for the network.

    Returns:
        Batch norm → (channels,) of bool, True where a channel stays; norms that lose nothing have no entry.

    Raises:
        ValueError: as :func:`select`.

    Example:
        >>> from torchconv.surgery.prune import ChannelGroup
        >>> filter_masks({"conv": torch.tensor([0.0, 1.0, 0.4])}, 0.3, [ChannelGroup(("norm",), ("conv",), ())])
        {'norm': tensor([False,  True,  True])}
    """
    wanted = _rates(ranks, rates)
    masks: dict[str, Tensor] = {}
    for group in groups:
        if group.reason or not group.producers or any(name not in wanted for name in group.producers):
            continue
        together = torch.stack([normalise_ranks(ranks[name]) for name in group.producers]).mean(0)
        keep = keep_largest(together, kept_count(len(together), min(wanted[name] for name in group.producers)))
        if len(keep) < len(together):
            mask = torch.zeros(len(together), dtype=torch.bool, device=keep.device).index_fill(0, keep, True)
            masks |= dict.fromkeys(group.norms, mask)
    return masks


def union_fraction(runs: Sequence[Tensor], available: int) -> float:
    """How stable a selection is: filters kept in any run, as a share of those available; small is stable.

    Runs that agree give the share that each keeps, the best value there is.

    Example:
        >>> union_fraction([torch.tensor([0, 1]), torch.tensor([1, 2])], 8)
        0.375
    """
    check(len(runs) > 0, "runs", 0, "give the kept filters of at least one run")
    check_positive("available", available)
    kept = torch.cat([r.flatten() for r in runs]).unique()
    check(bool(kept.min() >= 0) and bool(kept.max() < available), "available", available, "a run keeps filters beyond")
    return len(kept) / available
