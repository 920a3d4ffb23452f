"""ATConv's claim: kernels made from the image route information as its content asks, which static kernels cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import train

WIDTH, SIZE, BATCH = 16, 12, 32


@claim(
    key="atconv",
    says="A convolution whose kernel is generated from the image's content routes adaptively, as self-attention does "
    "and a static convolution cannot.",
    source="arXiv 2510.20092, sections 1 and 3 (adaptive routing)",
    experiment="Shift an image by one pixel to the right or down, as two constant code planes tell: 1 × 1 convolution "
    "to 16 channels, mixer, 1 × 1 to 1, trained on fresh noise images. Mixers: ATConv, a depthwise and a dense 3 × 3 "
    "convolution. Effect: the better static mixer's squared error less ATConv's; the target's variance is 1.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train the three mixers on the same stream of images and compare them on the same test images."""
    import torch

    from torchconv.ops.atconv import ATConv2d
    from torchconv.ops.plain import DepthwiseConv2d, PlainConv2d

    seeds, steps = (2, 500) if budget == "quick" else (5, 2500)
    mixers: dict[str, Callable[[], Any]] = {
        "atconv": lambda: ATConv2d(WIDTH),
        "depthwise 3×3": lambda: DepthwiseConv2d(WIDTH, kernel_size=3, padding="same"),
        "dense 3×3": lambda: PlainConv2d(WIDTH, WIDTH, 3, padding="same"),
    }
    x, y = _batch(256, torch.Generator().manual_seed(12345))
    errors: dict[str, list[Any]] = {name: [] for name in mixers}
    counts = {}
    for seed in range(seeds):
        for name, build in mixers.items():
            model = _train(build, seed, steps)
            counts[name] = sum(p.numel() for p in model.parameters())
            with torch.no_grad():
                errors[name].append(_interior(model(x), y).mean((1, 2, 3)))
            progress(f"seed {seed}: {name} test error {float(errors[name][-1].mean()):.6f}")
    images = {name: torch.stack(values).mean(0) for name, values in errors.items()}
    means = {name: float(v.mean()) for name, v in images.items()}
    best = min((n for n in mixers if n != "atconv"), key=lambda n: means[n])
    differences = images[best] - images["atconv"]
    half_width = 1.96 * float(differences.std()) / differences.numel() ** 0.5
    effect = float(differences.mean())
    return Evidence(
        effect=effect,
        low=effect - half_width,
        high=effect + half_width,
        unit="mean squared error",
        meaning="positive: ATConv's error is smaller than the best static mixer's",
        measurements={
            "test_error": means,
            "per_seed": {name: [float(v.mean()) for v in values] for name, values in errors.items()},
            "parameters": counts,
            "best_static": best,
            "seeds": seeds,
            "steps": steps,
            "test_images": int(differences.numel()),
        },
        notes=[
            "The interval is over test images; seeds are averaged within an image.",
            "One linear map makes the kernels of all channels, so that more than two directions are not learned.",
        ],
    )


def _batch(count: int, generator: Any) -> tuple[Any, Any]:
    """Noise with two code planes, and the noise shifted right or down."""
    import torch

    noise = torch.randn(count, 1, SIZE, SIZE, generator=generator)
    down = torch.randint(2, (count,), generator=generator).float().reshape(-1, 1, 1, 1)
    plane = torch.ones(count, 1, SIZE, SIZE)
    x = torch.cat([noise, plane * (1 - down), plane * down], 1)
    return x, torch.where(down == 1, noise.roll(1, 2), noise.roll(1, 3))


def _interior(prediction: Any, target: Any) -> Any:
    """Squared errors away from the border, where the shift has no source."""
    errors = (prediction - target).square()
    return errors[..., 1:-1, 1:-1]


def _train(build: Callable[[], Any], seed: int, steps: int) -> Any:
    """AdamW with a cosine to zero on fresh images, the same for every mixer."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), build(), nn.Conv2d(WIDTH, 1, 1))

    def loss() -> Any:
        x, y = _batch(BATCH, generator)
        return _interior(model(x), y).mean()

    return train(model, loss, steps=steps, lr=5e-3)
