"""ScaleCrafter's claim: a trained network works at another resolution once its kernels reach as far as in training."""

from __future__ import annotations

import itertools
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import train

SIZE, NOISE, BATCH = 16, 0.3, 32
FACTORS = (2.0, 2.5)


@claim(
    key="scalecrafter",
    says="A network trained at one resolution fails at a higher one because its convolutions see too small a part of "
    "the picture; dilating the trained kernels by the ratio of the resolutions, fractional ones included, repairs it "
    "without training.",
    source="arXiv 2310.07702, sections 3.1 and 3.2",
    experiment="Four 3 × 3 convolutions trained to remove noise from handwritten digits at 16 × 16, then run on the "
    "noisy test images enlarged 2 and 2.5 times (bilinear), plain and re-dilated. Effect: the plain network's squared "
    "distance to the enlarged clean image over the re-dilated one's, least over both ratios, less 1; the interval is "
    "over resampled test images.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train denoisers at 16 × 16 and compare both forms at the two larger sizes."""
    import numpy as np
    import torch

    seeds, steps = (2, 600) if budget == "quick" else (5, 3000)
    train_set, test_set = _digits()
    generator = torch.Generator().manual_seed(99)
    noisy = test_set + NOISE * torch.randn(test_set.shape, generator=generator)
    errors: dict[tuple[float, str], Any] = {}
    self_distance: dict[str, float] = {}
    for seed in range(seeds):
        net = _train(train_set, seed, steps)
        with torch.no_grad():
            low = net(noisy)
            for factor in FACTORS:
                size = round(SIZE * factor)
                clean, large = _enlarge(test_set, size), _enlarge(noisy, size)
                for name, ratio in (("plain", 1.0), ("re-dilated", factor)):
                    y = _redilated(net, ratio)(large)
                    error = (y - clean).square().mean((1, 2, 3)) / seeds
                    errors[factor, name] = errors.get((factor, name), 0) + error
                    distance = float((y - _enlarge(low, size)).square().mean()) / seeds
                    key = f"{name} at {factor}×"
                    self_distance[key] = self_distance.get(key, 0.0) + distance
            progress(f"seed {seed}: error at {SIZE} × {SIZE} {float((low - test_set).square().mean()):.4f}")
    ratios = {f: _ratio(errors[f, "plain"], errors[f, "re-dilated"]) for f in FACTORS}
    worst = min(ratios, key=lambda f: ratios[f])
    plain, ours = errors[worst, "plain"], errors[worst, "re-dilated"]
    rows = torch.randint(len(plain), (1000, len(plain)), generator=generator)
    draws = np.array([_ratio(plain[r], ours[r]) for r in rows]) - 1
    return Evidence(
        effect=ratios[worst] - 1,
        low=float(np.quantile(draws, 0.025)),
        high=float(np.quantile(draws, 0.975)),
        unit="ratio of squared errors less 1",
        meaning="positive: re-dilated kernels are closer to the clean image",
        measurements={
            "error": {f"{name} at {f}×": float(e.mean()) for (f, name), e in errors.items()},
            "distance_to_enlarged_low_resolution_result": self_distance,
            "ratio": {f"{f}×": r for f, r in ratios.items()},
            "seeds": seeds,
            "steps": steps,
            "test_images": len(plain),
        },
        notes=[
            "Denoising stands for one step of sampling; whether generated pictures stop repeating objects needs a "
            "diffusion model.",
        ],
    )


def _ratio(plain: Any, ours: Any) -> float:
    return float(plain.mean() / ours.mean())


def _digits() -> tuple[Any, Any]:
    """Training and test digits in [0, 1], enlarged to 16 × 16."""
    import torch
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    images = _enlarge(images, SIZE)
    return images[:1400], images[1400:]


def _enlarge(x: Any, size: int) -> Any:
    import torch.nn.functional as F

    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def _train(images: Any, seed: int, steps: int) -> Any:
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = (1, 24, 24, 24, 1)
        layers: list[Any] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
        net = nn.Sequential(*layers[:-1])

    def loss() -> Any:
        x = images[torch.randint(len(images), (BATCH,), generator=generator)]
        return (net(x + NOISE * torch.randn(x.shape, generator=generator)) - x).square().mean()

    return train(net, loss, steps=steps, lr=2e-3, weight_decay=0.0)


def _redilated(net: Any, factor: float) -> Any:
    from torch import nn

    from torchconv.ops.scalecrafter import ReDilatedConv2d

    return nn.Sequential(
        *(ReDilatedConv2d.from_conv(layer, factor) if isinstance(layer, nn.Conv2d) else layer for layer in net)
    )
