"""LSNet's claim: predicting a small kernel from a wide look beats static kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import train

WIDTH, CROP, NOISE = 16, 32, 0.08


@claim(
    key="lsnet",
    says="Aggregating a small neighbourhood with kernels predicted from a large one beats convolutions whose kernels "
    "are fixed, at fewer parameters than a dense large kernel.",
    source="arXiv 2503.23135, section 3.2 and the ablation of the operator",
    experiment="Learn a bilateral filter (3 × 3 window) of a noisy photograph, left half for training, right half for "
    "the test: 1 × 1 convolution to 16 channels, mixer, 1 × 1 back. Mixers, each batch-normalised and added to its "
    "input: LSConv's aggregation, a dense 7 × 7 and a depthwise 3 × 3 convolution. Effect: the better static mixer's "
    "squared error over LSConv's, less one, over test tiles.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train the three mixers on the same crops and compare them tile by tile."""
    import torch

    from torchconv.ops.lsnet import LSConv2d
    from torchconv.ops.plain import DepthwiseConv2d, PlainConv2d

    seeds, steps = (1, 1000) if budget == "quick" else (3, 2500)
    noisy, target = _images()
    middle = noisy.shape[-1] // 2
    train = noisy[..., :middle], target[..., :middle]
    test = _tiles(noisy[..., middle:]), _tiles(target[..., middle:])
    mixers: dict[str, Callable[[], Any]] = {
        "lsconv": lambda: LSConv2d(WIDTH),
        "dense 7×7": lambda: _residual(PlainConv2d(WIDTH, WIDTH, 7, padding="same")),
        "depthwise 3×3": lambda: _residual(DepthwiseConv2d(WIDTH, kernel_size=3, padding="same")),
    }
    errors: dict[str, list[Any]] = {name: [] for name in mixers}
    counts = {}
    for seed in range(seeds):
        for name, build in mixers.items():
            model = _train(build, train, seed, steps)
            counts[name] = sum(p.numel() for p in model.parameters())
            with torch.no_grad():
                errors[name].append((model(test[0]) - test[1]).square().mean((1, 2, 3)))
            progress(f"seed {seed}: {name} test error {float(errors[name][-1].mean()):.5f}")
    tiles = {name: torch.stack(values).mean(0) for name, values in errors.items()}
    means = {name: float(t.mean()) for name, t in tiles.items()}
    best = min((n for n in mixers if n != "lsconv"), key=lambda n: means[n])
    effect, low, high = _ratio_interval(tiles[best], tiles["lsconv"])
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="ratio − 1",
        meaning="positive: the best static mixer's test error is that much larger than LSConv's",
        measurements={
            "test_error": means,
            "identity_error": float((test[0] - test[1]).square().mean()),
            "parameters": counts,
            "best_static": best,
            "seeds": seeds,
            "steps": steps,
            "tiles": int(tiles[best].numel()),
        },
        notes=[
            "The interval is a bootstrap over test tiles; seeds are averaged within a tile.",
            "LSConv learns more slowly: after 400 steps the depthwise convolution is still ahead of it.",
        ],
    )


def _residual(conv: Any) -> Any:
    """BN(conv(x)) + x, the form that LSConv has, so that the kernels alone differ."""
    from torch import nn

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv, nn.BatchNorm2d(WIDTH)

        def forward(self, x: Any) -> Any:
            return self.bn(self.conv(x)) + x

    return Residual()


def _images() -> tuple[Any, Any]:
    """A noisy grey photograph at half size and its bilateral filtering, (1, 1, H, W)."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).float().mean(2) / 255
    clean = F.avg_pool2d(photo[None, None], 2)
    noisy = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    height, width = noisy.shape[2:]
    around = F.unfold(F.pad(noisy, (1, 1, 1, 1), mode="replicate"), 3).view(1, 9, height, width)
    places = torch.arange(9)
    distance = ((places // 3 - 1).square() + (places % 3 - 1).square()).view(1, 9, 1, 1)
    # Widths as is usual: one pixel in space, the image's standard deviation in brightness.
    weights = torch.exp(-distance / 2 - (around - noisy).square() / (2 * noisy.var()))
    return noisy, (weights * around).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def _train(build: Callable[[], Any], data: tuple[Any, Any], seed: int, steps: int) -> Any:
    """AdamW with a cosine to zero on random crops, the same for every mixer."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, WIDTH, 1), build(), nn.Conv2d(WIDTH, 1, 1))
    noisy, target = data
    rows, columns = (n - CROP + 1 for n in noisy.shape[2:])

    def loss() -> Any:
        tops = torch.randint(rows, (16,), generator=generator).tolist()
        lefts = torch.randint(columns, (16,), generator=generator).tolist()
        x, y = (
            torch.cat([image[..., i : i + CROP, j : j + CROP] for i, j in zip(tops, lefts, strict=True)])
            for image in (noisy, target)
        )
        return (model(x) - y).square().mean()

    return train(model, loss, steps=steps, lr=1e-2)


def _tiles(image: Any) -> Any:
    """The whole tiles of an image (1, 1, H, W) as a batch, of the size trained on."""
    rows, columns = image.shape[2] // CROP, image.shape[3] // CROP
    cut = image[0, 0, : rows * CROP, : columns * CROP].reshape(rows, CROP, columns, CROP)
    return cut.transpose(1, 2).reshape(-1, 1, CROP, CROP)


def _ratio_interval(worse: Any, better: Any) -> tuple[float, float, float]:
    """Ratio of the means less one, with its 95 % bootstrap interval over tiles."""
    import torch

    picks = torch.randint(worse.numel(), (2000, worse.numel()), generator=torch.Generator().manual_seed(0))
    ratios = worse[picks].mean(1) / better[picks].mean(1) - 1
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975])).tolist()
    return float(worse.mean() / better.mean() - 1), low, high
