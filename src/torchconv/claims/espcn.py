"""ESPCN's claim: convolve at low resolution and upscale last, more accurate and cheaper than upscaling first."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import random_batches, train

FACTOR, PATCH, TILE = 3, 51, 48
_NAMES = ("espcn", "upscaled first")


@claim(
    key="espcn",
    says="Convolutions at low resolution with a sub-pixel convolution at the end enlarge images more accurately than a "
    "network on the bicubically enlarged image, at a fraction of the cost.",
    source="arXiv 1609.05158, abstract and sections 2 and 3",
    experiment="Three times enlargement of the luma of two photographs (scikit-learn's), trained on the left three "
    "fifths of each and tested on the tiles with detail of the right two fifths: ESPCN (64-32) against three "
    "convolutions 9-1-5 (64-32) after bicubic enlargement, at equal multiply-adds of training. Effect: ESPCN's PSNR "
    "less the other's, over tiles.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train both networks on the same patches and compare PSNR on the same tiles."""
    import torch

    from torchconv.analysis.count import count
    from torchconv.models.restore.scores import psnr

    seeds, steps = (1, 1200) if budget == "quick" else (3, 6000)
    left, right = _halves()
    tiles = _tiles(right, TILE, TILE)
    low = _shrink(tiles)
    macs = {name: count(_network(name).eval(), low[:1]).macs for name in _NAMES}
    spent = {name: round(steps * macs["espcn"] / macs[name]) for name in _NAMES}
    found: dict[str, Any] = {"bicubic": psnr(_enlarge(low), tiles, FACTOR)}
    for seed in range(seeds):
        for name in _NAMES:
            net = _train(name, left, seed, spent[name])
            with torch.no_grad():
                score = psnr(net(low), tiles, FACTOR)
            found[name] = found.get(name, 0) + score / seeds
            progress(f"seed {seed}: {name} {float(score.mean()):.2f} dB, bicubic {float(found['bicubic'].mean()):.2f}")
    gain = found["espcn"] - found["upscaled first"]
    half = 1.96 * float(gain.std()) / len(gain) ** 0.5
    effect = float(gain.mean())
    over = found["espcn"] - found["bicubic"]
    return Evidence(
        effect=effect,
        low=effect - half,
        high=effect + half,
        unit="dB",
        meaning="positive: ESPCN is closer to the image",
        measurements={
            "psnr": {name: float(score.mean()) for name, score in found.items()},
            "tiles": len(tiles),
            "multiply_adds_a_tile": macs,
            "seeds": seeds,
            "steps": spent,
        },
        notes=[
            f"ESPCN needs {macs['espcn'] / macs['upscaled first']:.2f} of the other's multiply-adds.",
            f"Over bicubic enlargement it changes PSNR by {float(over.mean()):+.2f} dB.",
            "Both stop early, with the same multiply-adds spent: how good they become in the end is not asked.",
            "The interval is over tiles of two photographs; the paper's numbers are from long training on far more.",
        ],
    )


def _halves() -> tuple[list[Any], list[Any]]:
    """The luma of both photographs in [0, 1], left three fifths and right two fifths."""
    import torch
    from sklearn.datasets import load_sample_images

    weights = torch.tensor([65.481, 128.553, 24.966])
    luma = [(16 + torch.from_numpy(i / 255.0).float() @ weights) / 255 for i in load_sample_images().images]
    images = [y[None, None] for y in luma]
    return [y[..., :384] for y in images], [y[..., 384:] for y in images]


def _tiles(images: list[Any], side: int, step: int) -> Any:
    """Squares with detail: a flat sky measures nothing."""
    import torch

    tiles = torch.cat([y.unfold(2, side, step).unfold(3, side, step).reshape(-1, 1, side, side) for y in images])
    return tiles[tiles.std((1, 2, 3)) > 0.08]


def _shrink(y: Any) -> Any:
    import torch.nn.functional as F

    size = tuple(n // FACTOR for n in y.shape[2:])
    return F.interpolate(y, size=size, mode="bicubic", antialias=True)


def _enlarge(x: Any) -> Any:
    import torch.nn.functional as F

    size = tuple(n * FACTOR for n in x.shape[2:])
    # Antialiasing changes nothing but the cubic's parameter when enlarging: -0.5, the usual one.
    return F.interpolate(x, size=size, mode="bicubic", antialias=True)


def _network(name: str) -> Any:
    from torch import Tensor, nn

    from torchconv.models.restore.espcn import ESPCN

    class Enlarge(nn.Module):
        """Bicubic enlargement."""

        def forward(self, x: Tensor) -> Any:
            return _enlarge(x)

    if name == "espcn":
        return ESPCN(upscale_factor=FACTOR, icnr=True)
    first, second, last = nn.Conv2d(1, 64, 9, padding=4), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 1, 5, padding=2)
    return nn.Sequential(Enlarge(), first, nn.ReLU(), second, nn.ReLU(), last)


def _train(name: str, images: list[Any], seed: int, steps: int) -> Any:
    """Adam with the one-cycle rule on random patches."""
    import torch
    import torch.nn.functional as F

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _network(name)
    patches = _tiles(images, PATCH, PATCH // 2)
    batch = random_batches(_shrink(patches), patches, 8, seed)

    def loss() -> Any:
        x, target = batch()
        return F.mse_loss(net(x), target)

    return train(net, loss, steps=steps, lr=3e-3, weight_decay=0.0, one_cycle=True)
