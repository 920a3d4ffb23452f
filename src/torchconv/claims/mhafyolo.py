"""MHAF-YOLO's claim: large depthwise kernels learn better with smaller ones beside them, at no cost after training."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, random_batches, test_accuracy, train

WIDTH, KERNEL, TRAIN = 16, 9, 250


@claim(
    key="mhafyolo",
    says="Depthwise kernels that grow with depth are trained better with all smaller odd kernels in parallel; after "
    "training the branches fold into the one large kernel, so that accuracy rises at no cost.",
    source="arXiv 2502.04656, section 3 (heterogeneous large kernels) and its ablations",
    experiment="Digits enlarged to 32 × 32, 250 for training: a strided convolution to 16 channels and three residual "
    "bottlenecks 1 × 1, depthwise 9 × 9, 1 × 1, with the branches 7, 5, 3 or without, paired seeds, same steps. "
    "Effect: test accuracy of the merged network with branches less that without. Besides, the largest change of a "
    "logit by merging and the parameters before and after.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train both forms from the same seeds and compare them after merging."""
    import torch

    from torchconv.surgery.merging import merge

    seeds, steps = (5, 250) if budget == "quick" else (12, 1000)
    data = _digits()
    scores: dict[str, list[float]] = {"branches": [], "alone": []}
    counts: dict[str, dict[str, int]] = {}
    change = 0.0
    for seed in range(seeds):
        for name, found in scores.items():
            net = _train(name, data, seed, steps)
            merged = merge(net)
            with torch.no_grad():
                change = max(change, float((net(data[2]) - merged(data[2])).abs().max()))
            found.append(test_accuracy(merged, data[2], data[3]))
            counts[name] = {"training": _count(net), "merged": _count(merged)}
        progress(f"seed {seed}: accuracy {scores['branches'][-1]:.4f} with branches, {scores['alone'][-1]:.4f} alone")
    mean, low, high = paired_interval(scores["branches"], scores["alone"], 100)
    same = counts["branches"]["merged"] == counts["alone"]["merged"]
    return Evidence(
        effect=mean,
        low=low,
        high=high,
        unit="percentage points of test accuracy",
        meaning="positive: the network trained with branches is more accurate, after merging",
        verdict=None if same and change < 1e-3 else "not supported",
        measurements={
            "accuracy": scores,
            "parameters": counts,
            "largest change of a logit by merging": change,
            "seeds": seeds,
            "steps": steps,
        },
        notes=[
            f"Merged, both have {counts['alone']['merged']} parameters; merging changed no logit by more than "
            f"{change:.1e}.",
            "Detection is not tested here: the paper's gains are on COCO, after 500 epochs.",
        ],
    )


def _count(net: Any) -> int:
    return sum(p.numel() for p in net.parameters())


def _digits() -> tuple[Any, ...]:
    """Digits enlarged four times: 250 for training, the others for testing."""
    import torch
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    x = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:TRAIN]], y[order[:TRAIN]], x[order[TRAIN:]], y[order[TRAIN:]]


def _train(name: str, data: tuple[Any, ...], seed: int, steps: int) -> Any:
    import torch
    import torch.nn.functional as F

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _network(name)
    net = net.to(memory_format=torch.channels_last)
    batch = random_batches(data[0], data[1], 32, seed)

    def loss() -> Any:
        images, labels = batch()
        return F.cross_entropy(net(images.to(memory_format=torch.channels_last)), labels)

    return train(net, loss, steps=steps, lr=4e-3, weight_decay=0.05, one_cycle=True)


def _network(name: str) -> Any:
    from torch import nn

    from torchconv.ops.mhafyolo import ConvBN, MultiKernelReparamConv2d

    class Residual(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return x + super().forward(x)

    def depthwise() -> Any:
        if name == "branches":
            return MultiKernelReparamConv2d(WIDTH, kernel_size=KERNEL)
        return ConvBN(WIDTH, WIDTH, KERNEL, groups=WIDTH, act=False)

    blocks = [Residual(ConvBN(WIDTH, WIDTH), depthwise(), nn.SiLU(), ConvBN(WIDTH, WIDTH)) for _ in range(3)]
    return nn.Sequential(ConvBN(1, WIDTH, 3, 2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))
