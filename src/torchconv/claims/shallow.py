"""Deep against shallow: residual layers in a row and side by side, equal parameters and starts, on digits."""

from __future__ import annotations

import math
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, random_batches, test_accuracy, train

WIDTH, MARGIN = 8, 30.0
LAYOUTS = ("sequential", "parallel")


@claim(
    key="shallow",
    says="A stack of residual layers cut to its first-order expansion, one wide parallel layer with the same "
    "parameters, reaches nearly the same loss as the deep stack.",
    source="arXiv 2309.08414, abstract and summary table",
    experiment="Digits at 8 × 8, 1 × 1 embedding to 8 channels, K = 4, 8, 16 residual 3 × 3 layers with ReLU, head on "
    "the flattened map; both layouts from equal starts and batches, paired seeds. Effect: by how much the parallel "
    "layout's validation loss lies below the deep one's (geometric mean); nearly the same means at most 30 % above.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train both layouts for every depth and seed and compare their validation losses."""
    depths, seeds, steps = ((4, 8, 16), 8, 150) if budget == "quick" else ((4, 8, 16, 32), 10, 600)
    found: dict[str, dict[str, Any]] = {}
    logs: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    trains: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for depth in depths:
        results: dict[str, list[Any]] = {layout: [] for layout in LAYOUTS}
        for seed in range(seeds):
            nets = _pair(depth, seed)
            for layout, net in nets.items():
                results[layout].append(_score(net, seed, steps))
        parameters = {layout: sum(p.numel() for p in net.parameters()) for layout, net in nets.items()}
        assert len(set(parameters.values())) == 1
        for layout, scores in results.items():
            logs[layout] += [math.log(s[1]) for s in scores]
            trains[layout] += [math.log(s[0]) for s in scores]
        found[str(depth)] = {
            "parameters": parameters["parallel"],
            "determination_ratio": 1197 * 10 / parameters["parallel"],
            **{
                layout: {name: sum(s[i] for s in scores) / seeds for i, name in enumerate(_MEASURES)}
                for layout, scores in results.items()
            },
        }
        means = {layout: found[str(depth)][layout]["validation_loss"] for layout in LAYOUTS}
        progress(f"K = {depth}: validation loss " + ", ".join(f"{k} {v:.4f}" for k, v in means.items()))
    change = [100 * (1 - math.exp(v)) for v in paired_interval(logs["parallel"], logs["sequential"])]
    train_ratio = math.exp(paired_interval(trains["parallel"], trains["sequential"])[0])
    return Evidence(
        effect=change[0],
        low=change[2],
        high=change[1],
        unit="% of the validation loss",
        meaning="positive: the parallel layout validates better than the deep stack",
        threshold=-MARGIN,
        measurements={"by_depth": found, "training_loss_ratio": train_ratio, "seeds": seeds, "steps": steps},
        notes=[
            f"The verdict asks whether the parallel validation loss is at most {MARGIN:.0f} % above the sequential "
            "one; the interval is over depths and seeds.",
            f"On the training set the parallel loss is {train_ratio:.1f} times the sequential one (geometric mean): "
            "the deep stack fits better, as published.",
            "Each network is trained for itself: a trained deep stack does not keep its accuracy side by side.",
        ],
    )


_MEASURES = ("training_loss", "validation_loss", "validation_accuracy")


def _pair(depth: int, seed: int) -> dict[str, Any]:
    """Both layouts with the same parameters."""
    import torch

    from torchconv.models.classify.shallow import ResidualClassifier

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deep = ResidualClassifier(10, 1, WIDTH, depth, img_size=8)
    return {"sequential": deep, "parallel": deep.with_layout("parallel")}


def _score(net: Any, seed: int, steps: int) -> tuple[float, float, float]:
    """Training loss, validation loss and accuracy after training."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    batch = random_batches(x[:1197], y[:1197], 64, seed)

    def loss() -> Any:
        images, labels = batch()
        return F.cross_entropy(net(images), labels)

    train(net, loss, steps=steps, lr=3e-3, one_cycle=True)
    with torch.no_grad():
        losses = [float(F.cross_entropy(net(x[part]), y[part])) for part in (slice(0, 1197), slice(1197, None))]
    return losses[0], losses[1], test_accuracy(net, x[1197:], y[1197:])
