"""Beta-rank: on small, imbalanced sets it says better than weights or feature maps alone which filters to keep."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, random_batches, train

_WIDTHS = (16, 32, 32)
_COMMON, _RARE = 100, 8  # training images of each of the digits 0 to 4, and of 5 to 9
_STEPS, _TUNING = 300, 150
_OURS, _PAPER = "beta, out/in as released", "beta, in/out as in the paper"
_CRITERIA: dict[str, dict[str, Any]] = {
    _OURS: {},
    _PAPER: {"ratio": "in_over_out"},
    "L1": {"criterion": "l1"},
    "HRank": {"criterion": "hrank", "after": {"0": "2", "3": "5", "6": "8"}},
}


def _network() -> Any:
    from torch import nn

    layers: list[nn.Module] = []
    for before, after in zip((1, *_WIDTHS), _WIDTHS, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDTHS[-1], 10))


def _digits(seed: int) -> tuple[Any, ...]:
    """Training images, many of five digits and few of the others, and the images left for the test."""
    import torch
    from sklearn.datasets import load_digits

    raw = load_digits()
    x, y = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3, torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    chosen = torch.zeros(len(y), dtype=torch.bool)
    for digit in range(10):
        chosen[(y == digit).nonzero().flatten()[: _COMMON if digit < 5 else _RARE]] = True
    return x[chosen], y[chosen], x[~chosen], y[~chosen]


def _fit(net: Any, data: tuple[Any, ...], seed: int, steps: int, lr: float) -> Any:
    import torch.nn.functional as F

    batch = random_batches(data[0], data[1], 64, seed)
    net.train()

    def loss() -> Any:
        images, labels = batch()
        return F.cross_entropy(net(images), labels)

    return train(net, loss, steps=steps, lr=lr)


def _recall(net: Any, data: tuple[Any, ...]) -> float:
    """Recall, averaged over the classes."""
    import torch

    *_, x, y = data
    with torch.no_grad():
        right = net(x).argmax(1) == y
    return float(torch.stack([right[y == digit].float().mean() for digit in range(10)]).mean())


def _ranks(net: Any, images: Any, seed: int) -> dict[str, dict[str, Any]]:
    """Criterion → layer → ranks, all of the same images."""
    import torch

    from torchconv.compress.betarank import BetaRank

    found = {name: BetaRank(net, **options).collect([images]) for name, options in _CRITERIA.items()}
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.rand(len(r), generator=generator) for n, r in found[_OURS].items()}
    return {**found, "random": drawn}


def _agreement(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """Spearman's correlation of the ranks of two runs, and the share of filters that either keeps, a quarter each."""
    from scipy import stats

    from torchconv.compress.betarank import select, union_fraction

    kept = [select(ranks, 0.75) for ranks in (first, second)]
    correlation = [float(stats.spearmanr(first[n], second[n]).statistic) for n in first]
    union = [union_fraction([run[n] for run in kept], len(first[n])) for n in first]
    return sum(correlation) / len(correlation), sum(union) / len(union)


@claim(
    key="betarank",
    says="Filters ranked by weights and by what they do to the data are the better ones to keep when data are few and "
    "imbalanced: pruned networks classify better than with filters ranked by L1 norm or by the rank of their maps, and "
    "the selection is more stable.",
    source="arXiv 2304.07461, abstract and the tables of ISIC and IDRiD",
    experiment="Digits with 100 training images of each of 0 to 4 and 8 of each of 5 to 9; three convolutions of 16, "
    "32, 32 filters with batch norms. Half of the filters of every layer removed, by each criterion from the same "
    "images, the rest kept with its weights and statistics and fine-tuned with AdamW. Effect: balanced recall on the "
    "remaining images with beta-rank as released, less the mean of L1 and HRank. The full budget also removes a "
    "quarter. Interval: Student's over seeds of split, network and fine-tuning. Control: filters at random. Besides: "
    "how far rankings from two disjoint halves of the training images agree.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Prune small networks by five criteria."""
    import copy

    import torch

    from torchconv.compress.betarank import filter_masks
    from torchconv.surgery.prune import channel_groups, prune

    seeds = range(8 if budget == "quick" else 40)
    rates = (0.5,) if budget == "quick" else (0.25, 0.5)
    dense: list[float] = []
    names = (*_CRITERIA, "random")
    recall: dict[float, dict[str, list[float]]] = {rate: {n: [] for n in names} for rate in rates}
    straight: dict[float, dict[str, list[float]]] = copy.deepcopy(recall)
    agreement: dict[str, list[tuple[float, float]]] = {n: [] for n in names}
    for seed in seeds:
        data = _digits(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = _network()
        net = _fit(net, data, seed, _STEPS, 1e-2)
        dense.append(_recall(net, data))
        groups = channel_groups(net, data[0][:2])
        ranks = _ranks(net, data[0], seed)
        halves = [_ranks(net, data[0][half::2], seed + 1000 * half) for half in range(2)]
        for name in names:
            agreement[name].append(_agreement(halves[0][name], halves[1][name]))
            for rate in rates:
                small = prune(net, filter_masks(ranks[name], rate, groups), groups=groups)
                straight[rate][name].append(_recall(small, data))
                recall[rate][name].append(_recall(_fit(small, data, seed, _TUNING, 3e-3), data))
        progress(f"seed {seed}: dense {dense[-1]:.3f}, " + ", ".join(f"{n} {recall[0.5][n][-1]:.3f}" for n in names))

    half = recall[0.5]
    rivals = [(a + b) / 2 for a, b in zip(half["L1"], half["HRank"], strict=True)]
    effect, low, high = paired_interval(half[_OURS], rivals, 100)

    def mean(values: list[float]) -> float:
        return round(sum(values) / len(values), 4)

    against = {n: [round(v, 2) for v in paired_interval(half[_OURS], half[n], 100)] for n in names if n != _OURS}
    against_paper = {
        n: [round(v, 2) for v in paired_interval(half[_PAPER], half[n], 100)] for n in ("L1", "HRank", "random")
    }
    after, control = mean(half[_OURS]), mean(half["random"])
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="points of balanced recall",
        meaning="positive: networks pruned by beta-rank recall more than those pruned by L1 and HRank",
        measurements={
            "seeds": len(seeds),
            "dense": mean(dense),
            "balanced recall after fine-tuning": {
                f"{r:.0%} removed": {n: mean(v) for n, v in recall[r].items()} for r in rates
            },
            "balanced recall before fine-tuning": {
                f"{r:.0%} removed": {n: mean(v) for n, v in straight[r].items()} for r in rates
            },
            "beta as released less (mean, low, high), half removed": against,
            "beta as in the paper less (mean, low, high), half removed": against_paper,
            "rank correlation of two halves of the data": {n: mean([a for a, _ in v]) for n, v in agreement.items()},
            "share of filters kept by either half, a quarter each": {
                n: mean([b for _, b in v]) for n, v in agreement.items()
            },
        },
        notes=[
            f"Filters drawn at random recall {control:.3f} on average, those ranked by beta-rank {after:.3f}, all of "
            f"them {mean(dense):.3f}: at this size no criterion is seen to choose better than chance does."
        ],
    )
