"""PuYun's claim at desk size: large kernels let a convolutional network forecast transport on a globe step by step."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, train

ROWS, COLUMNS, WIDTH = 12, 24, 16
SCORED, LEAD, CAP = 4, 8, 1e6
KERNELS = {"large kernel": (21, 3), "local kernel": (3, 1)}


@claim(
    key="puyun",
    says="A fully convolutional network with large kernel attention forecasts global fields step by step, its large "
    "kernels carrying what small ones cannot reach.",
    source="arXiv 2409.02123, abstract and method (the operator; not the global weather data)",
    experiment="A tracer carried eastwards by a wind of 0 to 5 cells a step that differs by latitude, on a 12 × 24 "
    "globe; two past states in, the next one out, two blocks of 16 channels, circular in longitude, trained on one "
    "step. Attention with K = 21 (5 × 5 and dilated 7 × 7) against K = 3, paired seeds. Effect: by how much the root "
    "mean squared error at lead 4, rolled out, is smaller, in percent.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train both networks on one step, roll out, and compare the errors at a later lead."""
    import torch

    seeds, steps = (5, 250) if budget == "quick" else (8, 2000)
    test = _trajectories(64, LEAD + 2, torch.Generator().manual_seed(999))
    errors: dict[str, list[list[float]]] = {name: [] for name in KERNELS}
    counts = {}
    for seed in range(seeds):
        for name, (kernel, decomposition) in KERNELS.items():
            net = _network(kernel, decomposition, seed)
            counts[name] = sum(p.numel() for p in net.parameters())
            errors[name].append(_roll_out(_train(net, seed, steps), test))
            first, later = errors[name][-1][0], errors[name][-1][SCORED - 1]
            progress(f"seed {seed}: {name}, lead 1 {first:.3f}, lead {SCORED} {later:.3f}")
    persistence = [float((test[:, 1 + t, 0] - test[:, 1, 0]).square().mean().sqrt()) for t in range(1, LEAD + 1)]

    def gain(lead: int) -> tuple[float, float, float]:
        large, local = ([e[lead - 1] for e in errors[name]] for name in KERNELS)
        return paired_interval([-a / b for a, b in zip(large, local, strict=True)], [-1.0] * seeds, 100)

    worst = {name: max(e[-1] for e in found) for name, found in errors.items()}
    effect, low, high = gain(SCORED)
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="% of the error",
        meaning="positive: the large kernel's error is smaller",
        measurements={
            "rmse_by_lead_and_seed": errors,
            "persistence_by_lead": persistence,
            "parameters": counts,
            "seeds": seeds,
            "steps": steps,
        },
        notes=[
            f"Persistence has {persistence[0]:.2f} at lead 1 and {persistence[SCORED - 1]:.2f} at lead {SCORED}.",
            "At lead 1 the difference is {:.0f} % ({:.0f} to {:.0f}).".format(*gain(1)),
            f"Rolled out to lead {LEAD}, the worst errors are {worst['large kernel']:.3g} (large) and "
            f"{worst['local kernel']:.3g} (local). Gates multiply, and networks trained on one step may diverge: the "
            "paper fine-tunes on roll-outs.",
            "The local network's four 3 × 3 kernels reach four cells; the fastest winds bring the tracer from six.",
            "Nothing is said about real weather, about the cascade of models, or about other architectures.",
        ],
    )


def _trajectories(count: int, length: int, generator: Any) -> Any:
    """(count, length, 2, ROWS, COLUMNS): tracer and wind; the tracer moves by the wind, interpolated linearly."""
    import torch
    import torch.nn.functional as F

    noise = torch.randn(count, 1, ROWS, COLUMNS, generator=generator)
    smooth = F.avg_pool2d(F.pad(noise, (1, 1, 0, 0), mode="circular"), (1, 3), 1)
    q = smooth[:, 0] / smooth.std()
    wind = 5 * torch.rand(count, ROWS, 1, generator=generator)
    whole = wind.floor()
    source = torch.arange(COLUMNS).expand(count, ROWS, COLUMNS) - whole.long()
    states = []
    for _ in range(length):
        states.append(torch.stack((q, (wind / 2.5 - 1).expand_as(q)), 1))
        near, far = q.gather(2, source % COLUMNS), q.gather(2, (source - 1) % COLUMNS)
        q = near + (wind - whole) * (far - near)
    return torch.stack(states, 1)


def _network(kernel: int, decomposition: int, seed: int) -> Any:
    import torch
    from torch import nn

    from torchconv.models.forecast.van import VANBlock

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"kernel_size": kernel, "decomposition": decomposition, "padding_mode": "longitude"}
        blocks = [VANBlock(WIDTH, 2.0, layer_scale=0.5, **options) for _ in range(2)]
        return nn.Sequential(nn.Conv2d(4, WIDTH, 1), *blocks, nn.Conv2d(WIDTH, 1, 1))


def _step(net: Any, before: Any, now: Any) -> Any:
    """The next state: the network's change of the tracer, the wind kept."""
    import torch

    q = now[:, :1] + net(torch.cat((before, now), 1))
    return torch.cat((q, now[:, 1:]), 1)


def _train(net: Any, seed: int, steps: int) -> Any:
    """One-step errors on fresh trajectories."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def loss() -> Any:
        states = _trajectories(16, 3, generator)
        return (_step(net, states[:, 0], states[:, 1]) - states[:, 2]).square().mean()

    return train(net, loss, steps=steps, lr=3e-3, one_cycle=True)


def _roll_out(net: Any, test: Any) -> list[float]:
    """Root mean squared error of the tracer at each lead, at most ``CAP``."""
    import torch

    before, now, errors = test[:, 0], test[:, 1], []
    with torch.no_grad():
        for lead in range(LEAD):
            before, now = now, _step(net, before, now)
            error = (now - test[:, 2 + lead])[:, 0].square().mean().sqrt()
            errors.append(float(error.nan_to_num(CAP, CAP).clamp_max(CAP)))
    return errors
