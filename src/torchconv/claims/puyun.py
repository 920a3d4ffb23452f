"""PuYun's claim at desk size: large kernels let a convolutional network forecast transport on a globe step by step."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, train

ROWS, COLUMNS, WIDTH = 12, 24, 16
SCORED, LEAD = 4, 8
KERNELS = {"large kernel": (21, 3), "local kernel": (3, 1)}
TRAINED_HOURS, WEATHER = 576, "era5_uk_t2m_2019-03.npz"


@claim(
    key="puyun",
    says="A fully convolutional network with large kernel attention forecasts global fields step by step, its large "
    "kernels carrying what small ones cannot reach.",
    source="arXiv 2409.02123, abstract and method (not the global weather data, and not the cascade)",
    experiment="A tracer carried eastwards by a wind of 0 to 5 cells a step that differs by latitude, on a 12 × 24 "
    "globe; two past states in, the next one out; the network with two blocks of 16 channels, patches of one cell, "
    "circular in longitude, trained on one step and then on roll-outs of four. Attention with K = 21 (5 × 5 and "
    "dilated 7 × 7) against K = 3, paired seeds. Effect: by how much the root mean squared error at lead 4 is smaller, "
    "in percent. Beside it, where the data are at hand, temperature over the British Isles six hours ahead.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train both networks on one step and on roll-outs, and compare the errors at a later lead."""
    import torch

    seeds, steps, tuned = (5, 250, 50) if budget == "quick" else (8, 1000, 300)
    test = _trajectories(64, LEAD + 2, torch.Generator().manual_seed(999))
    errors: dict[str, list[list[float]]] = {name: [] for name in KERNELS}
    untuned: dict[str, list[list[float]]] = {name: [] for name in KERNELS}
    counts = {}
    for seed in range(seeds):
        for name, (kernel, decomposition) in KERNELS.items():
            net = _network(kernel, decomposition, seed)
            counts[name] = sum(p.numel() for p in net.parameters())
            generator = torch.Generator().manual_seed(seed)
            untuned[name].append(_roll_out(_train(net, generator, steps, 1, 3e-3), test))
            errors[name].append(_roll_out(_train(net.train(), generator, tuned, 4, 1e-3), test))
            first, later = errors[name][-1][0], errors[name][-1][SCORED - 1]
            progress(f"seed {seed}: {name}, lead 1 {first:.3f}, lead {SCORED} {later:.3f}")
    persistence = [float((test[:, 1 + t, 0] - test[:, 1, 0]).square().mean().sqrt()) for t in range(1, LEAD + 1)]

    def gain(found: dict[str, list[list[float]]], lead: int) -> tuple[float, float, float]:
        large, local = ([e[lead - 1] for e in found[name]] for name in KERNELS)
        return paired_interval([-a / b for a, b in zip(large, local, strict=True)], [-1.0] * seeds, 100)

    effect, low, high = gain(errors, SCORED)
    weather = _weather(500 if budget == "quick" else 2000)
    notes = [
        f"Persistence has {persistence[0]:.2f} at lead 1 and {persistence[SCORED - 1]:.2f} at lead {SCORED}.",
        "At lead 1 the difference is {:.0f} % ({:.0f} to {:.0f}).".format(*gain(errors, 1)),
        "Before the training on roll-outs it is, at lead {}, {:.0f} % ({:.0f} to {:.0f}).".format(
            SCORED, *gain(untuned, SCORED)
        ),
        "The local network's four 3 × 3 kernels reach four cells; the fastest winds bring the tracer from six.",
        "Nothing is said about the cascade of models, or about other architectures.",
    ]
    if weather:
        notes.append(
            "Two-metre temperature over the British Isles (ERA5, March 2019, last week for the test), six hours ahead: "
            "{network:.2f} K, persistence {persistence:.2f} K, mean of the hour of the day {climatology:.2f} K.".format(
                **weather
            )
        )
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="% of the error",
        meaning="positive: the large kernel's error is smaller",
        measurements={
            "rmse_by_lead_and_seed": errors,
            "rmse_by_lead_and_seed_before_tuning": untuned,
            "persistence_by_lead": persistence,
            "parameters": counts,
            "seeds": seeds,
            "steps": [steps, tuned],
            "temperature_rmse_6h": weather,
        },
        notes=notes,
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

    from torchconv.models.forecast.puyun import PuYun

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {
            "kernel_size": kernel,
            "decomposition": decomposition,
            "mlp_ratio": 2.0,
            "layer_scale": 0.5,
        }
        return PuYun(2, WIDTH, depth=2, patch=1, time_features=1, **sizes)


def _train(net: Any, generator: Any, steps: int, length: int, lr: float) -> Any:
    """Squared errors of roll-outs of ``length`` steps on fresh trajectories; nothing depends on the time."""
    import torch.nn.functional as F
    from torch import zeros

    from torchconv.models.forecast.puyun_rollout import rollout_loss

    def loss() -> Any:
        states = _trajectories(16, length + 2, generator)
        known, times = states[:, :2], zeros(length, 1, 1)
        return rollout_loss(net, known, states[:, 2:], times, checkpoint=False, loss=F.mse_loss)

    return train(net, loss, steps=steps, lr=lr, one_cycle=length == 1)


def _roll_out(net: Any, test: Any) -> list[float]:
    """Root mean squared error of the tracer at each lead."""
    import torch

    from torchconv.models.forecast.puyun_rollout import rollout

    with torch.inference_mode():
        forecasts = rollout(net, test[:, :2], torch.zeros(LEAD, 1, 1))
        return [float((y - test[:, 2 + t])[:, 0].square().mean().sqrt()) for t, y in enumerate(forecasts)]


def _weather(steps: int) -> dict[str, float] | None:
    """Errors in K of temperature six hours ahead in the test week; None without the data."""
    import numpy as np
    import torch

    from torchconv.data.named import places
    from torchconv.models.forecast.puyun import PuYun
    from torchconv.models.forecast.puyun_rollout import time_encoding
    from torchconv.training.weather import climatology, latitude_weights, rmse, weighted_l1

    files = (folder / WEATHER for place in places(None) for folder in (place / "weather", place))
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return None
    with np.load(path) as arrays:
        fields = torch.from_numpy(arrays["t2m"])[:, None]
        starts = [np.datetime64(0, "h") + np.timedelta64(int(h), "h") for h in arrays["time"]]
        weights = latitude_weights(arrays["lat"].astype(float), poles=False)
    times = time_encoding(starts, 1)[0]
    known = fields[:TRAINED_HOURS]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options: dict[str, Any] = {"mean": float(known.mean()), "std": float(known.std()), "padding_mode": "zeros"}
        net = PuYun(1, 32, depth=2, patch=3, mlp_ratio=2.0, layer_scale=0.3, **options)

    def forecast(now: Any) -> Any:
        return net(torch.stack((fields[now - 6], fields[now]), 1), times[now])

    def loss() -> Any:
        now = torch.randint(6, TRAINED_HOURS - 6, (16,), generator=generator)
        return weighted_l1(forecast(now), fields[now + 6], weights)

    train(net, loss, steps=steps, lr=3e-3, one_cycle=True)
    valid = torch.arange(TRAINED_HOURS, len(fields))
    mean_day = climatology(known, starts[:TRAINED_HOURS], starts[TRAINED_HOURS:], None)
    with torch.inference_mode():
        found = {
            "network": forecast(valid - 6),
            "persistence": fields[valid - 6],
            "climatology": mean_day,
        }
    return {name: float(rmse(y, fields[valid], weights)) for name, y in found.items()}
