"""A-priori compression's claim: a wave simulator built of one-way filters is as good as one of dense kernels."""

from __future__ import annotations

import itertools
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import random_batches, train

_NODES, _AHEAD, _WIDTH, _MARGIN = 24, 4, 16, 0.3
_FORMS: dict[str, tuple[str, int] | None] = {
    "dense": None,
    "per_pair, rank 1": ("per_pair", 1),
    "sequential, rank 8": ("sequential", 8),
}
_MAIN = "sequential, rank 8"


@claim(
    key="apriori",
    says="A wave simulator whose convolutions are in a compressed tensor format before training performs as well as "
    "one with classical layers, with fewer parameters.",
    source="arXiv 2304.04964, abstract",
    experiment=f"Pulses on {_NODES} × {_NODES} nodes: from two successive fields predict the one {_AHEAD} leap-frog "
    f"steps on, with four 3 × 3 layers of {_WIDTH} channels; trajectories of the test are new. Dense layers against "
    "per_pair rank 1 (the literal reading) and sequential rank 8. Effect: share by which the error of "
    "sequential rank 8 (under half of the parameters) is smaller than that of the dense network.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train every form on the same batches; relative error of the predicted fields of unseen trajectories."""
    import torch

    seeds, steps = (2, 1200) if budget == "quick" else (4, 6000)
    x, y, x_test, y_test = _data()
    errors: dict[str, list[Any]] = {name: [] for name in _FORMS}
    parameters = {}
    for seed in range(seeds):
        for name, form in _FORMS.items():
            net = _train(form, x, y, seed, steps)
            parameters[name] = sum(p.numel() for p in net.parameters())
            with torch.no_grad():
                wrong = (net(x_test) - y_test).square().sum((1, 2, 3)).reshape(_TEST, -1).sum(1)
            right = y_test.square().sum((1, 2, 3)).reshape(_TEST, -1).sum(1)
            errors[name].append((wrong / right).sqrt())
        progress(f"seed {seed}: " + ", ".join(f"{n} {float(e[-1].mean()):.4f}" for n, e in errors.items()))
    by_trajectory = {name: torch.stack(values).mean(0) for name, values in errors.items()}
    ratios = {name: float(e.mean() / by_trajectory["dense"].mean()) for name, e in by_trajectory.items()}
    gains = 1 - by_trajectory[_MAIN] / by_trajectory["dense"]
    half_width = 1.96 * float(gains.std()) / gains.numel() ** 0.5
    effect = float(gains.mean())
    others = ", ".join(f"{name} {ratios[name]:.2f} ({parameters[name]})" for name in _FORMS)
    return Evidence(
        effect=effect,
        low=effect - half_width,
        high=effect + half_width,
        unit="share of the dense error",
        meaning="positive: the compressed network's error is smaller than the dense one's",
        threshold=-_MARGIN,
        measurements={
            "relative_error": {name: [float(e.mean()) for e in values] for name, values in errors.items()},
            "ratio_to_dense": ratios,
            "parameters": parameters,
            "seeds": seeds,
            "steps": steps,
            "test_trajectories": _TEST,
        },
        notes=[
            f"As well means an error within {_MARGIN:.0%}. Ratios of errors (parameters): {others}.",
            f"All networks are trained for {steps} steps at one learning rate, far from a simulator's limit.",
            "The interval is over test trajectories; seeds are averaged within one.",
        ],
    )


_TRAIN, _TEST, _FRAMES = 60, 24, 40


def _data() -> tuple[Any, ...]:
    """Pairs of successive fields and the field ahead, split by trajectory, in units of the deviation of training."""
    from torchconv.data.waves import wave_trajectories

    fields = wave_trajectories(_TRAIN + _TEST, _NODES, _FRAMES, every=1, seed=7)
    fields = fields / fields[:_TRAIN].std()
    starts = range(1, _FRAMES - _AHEAD, 2)

    def pairs(part: Any) -> tuple[Any, Any]:
        import torch

        x = torch.stack([part[:, n - 1 : n + 1] for n in starts], 1).flatten(0, 1)
        y = torch.stack([part[:, n + _AHEAD : n + _AHEAD + 1] for n in starts], 1).flatten(0, 1)
        return x, y

    return *pairs(fields[:_TRAIN]), *pairs(fields[_TRAIN:])


def _train(form: tuple[str, int] | None, x: Any, y: Any, seed: int, steps: int) -> Any:
    """Adam's decoupled form without decay, a cosine to zero."""
    import torch
    from torch import nn

    from torchconv.ops.apriori import APrioriConv2d

    def layer(before: int, after: int) -> nn.Module:
        if form is None:
            return nn.Conv2d(before, after, 3, padding=1)
        return APrioriConv2d(before, after, 3, form=form[0], rank=form[1])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((2, _WIDTH, _WIDTH, _WIDTH, 1)):
            layers += [layer(before, after), nn.GELU()]
        net = nn.Sequential(*layers[:-1])
    batch = random_batches(x, y, 16, seed)

    def loss() -> Any:
        fields, ahead = batch()
        return (net(fields) - ahead).square().mean()

    return train(net, loss, steps=steps, lr=4e-3, weight_decay=0.0)
