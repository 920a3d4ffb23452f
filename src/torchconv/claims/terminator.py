"""Terminator's claim: kernels that activations scale (Z·W) mix the whole image better than kernels alone (W)."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, random_batches, test_accuracy, train

_KINDS = ("Z·Z·W", "W·Z", "Z·Z")
_WIDTH = 16


@claim(
    key="terminator",
    says="Image-sized kernels of a coordinate network give context interaction without residuals, and become better "
    "when the activations scale them element by element before they act.",
    source="arXiv 2401.17948, abstract and section 3",
    experiment="Digits, a network of two global mixers with 16 channels, no residuals, batch norm and GELU between. "
    "Mixers: (x ⊙ K)·f as proposed, the hyper-kernel alone K·f with as many parameters, the activations alone x·f; f "
    "is the standardised 1 × 1 convolution of x. Effect: test accuracy of the first less the better of the others.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train the three mixers on the same batches, seed by seed."""
    seeds = 5 if budget == "quick" else 15
    steps = 250 if budget == "quick" else 1000
    accuracy: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    counts: dict[str, int] = {}
    for seed in range(seeds):
        for kind in _KINDS:
            value, counts[kind] = _one(kind, seed, steps)
            accuracy[kind].append(100 * value)
            progress(f"seed {seed}: {kind} accuracy {accuracy[kind][-1]:.2f} %")
    means = {kind: sum(values) / seeds for kind, values in accuracy.items()}
    best = max(_KINDS[1:], key=lambda kind: means[kind])
    effect, low, high = paired_interval(accuracy[_KINDS[0]], accuracy[best])
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="percentage points",
        meaning="positive: kernels scaled by the activations classify better than the best ablation",
        measurements={
            "accuracy": means,
            "per_seed": accuracy,
            "best_ablation": best,
            "parameters": counts,
            "seeds": seeds,
            "steps": steps,
        },
        notes=["The slow net's parameters are counted for x·f too, where they are not used."],
    )


def _one(kind: str, seed: int, steps: int) -> tuple[float, int]:
    """Test accuracy and parameters of one network."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    raw = load_digits()
    x, y = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3, torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, held = order[:1197], order[1197:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _network(kind)
    batch = random_batches(x[fit], y[fit], 64, seed)

    def loss() -> Any:
        images, labels = batch()
        return F.cross_entropy(net(images), labels)

    train(net, loss, steps=steps, lr=1e-2, one_cycle=True)
    return test_accuracy(net, x[held], y[held]), sum(p.numel() for p in net.parameters())


def _network(kind: str) -> Any:
    import torch
    from torch import Tensor, nn

    from torchconv.ops.terminator import HyperZZWGlobal2d, hyperzzw_global
    from torchconv.ops.terminator_units import standardise

    class Mixer(HyperZZWGlobal2d):
        """The global operator, or with one of its two factors on the left alone."""

        def forward(self, x: Tensor) -> Tensor:
            kernel, features = self.slow_net(x.shape[2:]), standardise(self.channel_mixer(x))
            if kind == "Z·Z":
                kernel = torch.ones_like(kernel)
            return hyperzzw_global(torch.ones_like(x) if kind == "W·Z" else x, kernel, features)

    layers: list[nn.Module] = [nn.Conv2d(1, _WIDTH, 1), nn.BatchNorm2d(_WIDTH)]
    for _ in range(2):
        layers += [Mixer(_WIDTH, kernel_size=8, hidden=16), nn.BatchNorm2d(_WIDTH), nn.GELU()]
        layers += [nn.Conv2d(_WIDTH, _WIDTH, 1), nn.BatchNorm2d(_WIDTH), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDTH, 10))
