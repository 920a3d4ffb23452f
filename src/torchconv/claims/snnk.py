"""SNNK's claim: feed-forward layers in kernel form keep the accuracy with several times fewer trainable parameters."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, random_batches, test_accuracy, train

_MARGIN, _WIDTH, _FEATURES = 2.0, 128, (32, 64, 128)


@claim(
    key="snnk",
    says="Feed-forward layers replaced by scalable neural network kernels stay competitive in accuracy with up to five "
    "times fewer trainable parameters.",
    source="arXiv 2310.13225, abstract and section 4",
    experiment="Digits, a trained 64-128-10 network with ReLU. Its first layer becomes ReLU-SNNK with m features, "
    "fitted in closed form to the layer, bundled with the second and trained further. Effect: accuracy at m = 128 "
    "(1,290 trainable parameters of 9,610) less the network's, over seeds; competitive means within two points.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train the network, its kernel forms and a network as small as the largest of these, on the same batches."""
    seeds = 5 if budget == "quick" else 15
    names = ["mlp", "narrow mlp", *(f"snnk m={m}" for m in _FEATURES)]
    accuracy: dict[str, list[float]] = {name: [] for name in (*names, f"untrained m={_FEATURES[-1]}")}
    parameters: dict[str, int] = {}
    for seed in range(seeds):
        found, parameters = _one(seed)
        for name, value in found.items():
            accuracy[name].append(100 * value)
        line = ", ".join(f"{name} {values[-1]:.1f}" for name, values in accuracy.items())
        progress(f"seed {seed}: {line}")
    largest = f"snnk m={_FEATURES[-1]}"
    effect, low, high = paired_interval(accuracy[largest], accuracy["mlp"])
    narrow = paired_interval(accuracy[largest], accuracy["narrow mlp"])
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="percentage points",
        meaning="accuracy of the bundled kernel form less the network's; above −2 counts as competitive",
        threshold=-_MARGIN,
        measurements={
            "accuracy": {name: sum(values) / len(values) for name, values in accuracy.items()},
            "trainable_parameters": parameters,
            "against_narrow_mlp": {"effect": narrow[0], "low": narrow[1], "high": narrow[2]},
            "seeds": seeds,
        },
        notes=[
            "Fixed random rows (64 numbers a feature) are stored but not trained: fewer trainable parameters, not a "
            "smaller file.",
            "The narrow network has 17 hidden units and as many trainable parameters as the largest kernel form.",
        ],
    )


def _one(seed: int) -> tuple[dict[str, float], dict[str, int]]:
    """Accuracies and trainable parameters of one seed."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits
    from torch import nn

    from torchconv.ops.snnk import to_snnk

    raw = load_digits()
    x, y = torch.tensor(raw.data, dtype=torch.float32) / 16, torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fit, held = order[:1197], order[1197:]

    def trained(model: Any, lr: float, steps: int) -> Any:
        batch = random_batches(x[fit], y[fit], 64, seed)

        def loss() -> Any:
            inputs, labels = batch()
            return F.cross_entropy(model(inputs), labels)

        return train(model, loss, steps=steps, lr=lr)

    accuracy: dict[str, float] = {}
    parameters: dict[str, int] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models: dict[str, Any] = {}
        for name, width in (("mlp", _WIDTH), ("narrow mlp", 17)):
            models[name] = trained(nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)), 3e-3, 1500)
        for m in _FEATURES:
            small = to_snnk(models["mlp"], m, inputs=x[fit])
            if m == _FEATURES[-1]:
                accuracy[f"untrained m={m}"] = test_accuracy(small, x[held], y[held])
            models[f"snnk m={m}"] = trained(small, 1e-2, 1500)
    for name, model in models.items():
        accuracy[name] = test_accuracy(model, x[held], y[held])
        parameters[name] = sum(p.numel() for p in model.parameters())
    return accuracy, parameters
