"""Poset pooling's claim: better than max and average pooling, without parameters."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, random_batches, test_accuracy, train

_POOLINGS = ("relu, max", "relu, average", "poset 7", "poset 12", "relu, poset 7")
_TRAINING = 400


@claim(
    key="posetfilters",
    says="Pooling with a poset filter trains a network better than max or average pooling, without parameters.",
    source="arXiv 2412.06097, abstract and the table of CIFAR-10 results (best: the poset numbered 7)",
    experiment=f"Digits, {_TRAINING} for training: two 3 × 3 convolutions with batch norm (16 and 32 channels), each "
    "followed by a pooling of 2 × 2 blocks, and a linear layer; paired seeds. Pooling: ReLU and max, ReLU and average, "
    "poset filters 7 and 12 on the signed map, poset filter 7 after a ReLU. Effect: test accuracy of poset 7 less that "
    "of ReLU and max.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train every pooling from the same start on the same batches."""
    seeds, steps = (8, 150) if budget == "quick" else (30, 400)
    scores: dict[str, list[float]] = {name: [] for name in _POOLINGS}
    for seed in range(seeds):
        for name in _POOLINGS:
            scores[name].append(_accuracy(name, seed, steps))
        progress(f"seed {seed}: " + ", ".join(f"{name} {found[-1]:.4f}" for name, found in scores.items()))
    effect, low, high = paired_interval(scores["poset 7"], scores["relu, max"], 100)
    average = paired_interval(scores["poset 7"], scores["relu, average"], 100)
    degenerate = paired_interval(scores["relu, poset 7"], scores["relu, average"], 100)
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="percentage points of test accuracy",
        meaning="positive: the poset filter is more accurate than ReLU and max pooling",
        measurements={
            "accuracy": scores,
            "poset_7_less_average_points": list(average),
            "after_relu_less_average_points": list(degenerate),
            "seeds": seeds,
            "steps": steps,
        },
        notes=[
            "Against ReLU and average pooling: {:+.2f} points ({:+.2f} to {:+.2f}).".format(*average),
            "After a ReLU the filter is four times average pooling whatever the poset, and so it trains: "
            "{:+.2f} points ({:+.2f} to {:+.2f}) against average pooling.".format(*degenerate),
            "The paper's differences on CIFAR-10 are a few tenths of a point, at deviations of half a point over runs.",
        ],
    )


def _network(pooling: str) -> Any:
    from torch import nn

    from torchconv.ops.posetfilters import PosetPool

    def stage(before: int, after: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        if "relu" in pooling:
            layers.append(nn.ReLU())
        if "poset" in pooling:
            return [*layers, PosetPool(int(pooling.split()[-1]))]
        return [*layers, nn.MaxPool2d(2) if "max" in pooling else nn.AvgPool2d(2)]

    return nn.Sequential(*stage(1, 16), *stage(16, 32), nn.Flatten(), nn.BatchNorm1d(128), nn.Linear(128, 10))


def _accuracy(pooling: str, seed: int, steps: int) -> float:
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    known, unseen = order[:_TRAINING], order[_TRAINING:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _network(pooling)
    batch = random_batches(x[known], y[known], 64, seed)

    def loss() -> Any:
        images, labels = batch()
        return F.cross_entropy(net(images), labels)

    train(net, loss, steps=steps, lr=1e-2, one_cycle=True)
    return test_accuracy(net, x[unseen], y[unseen])
