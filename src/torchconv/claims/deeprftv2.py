"""DeepRFTv2's claim: estimating a transfer function from the spectrum removes blur better than local blocks do."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import train

SIZE, PAD, WIDTH, BATCH = 32, 4, 12, 16


@claim(
    key="deeprftv2",
    says="Blur is a convolution with a large kernel; a network that estimates a transfer function from the spectrum "
    "and applies it by one product removes it better than convolutional blocks at about the same cost.",
    source="arXiv 2511.21132, sections 3 and 4",
    experiment="Digits enlarged to 32 × 32 on a border of 4, each with a motion blur of its own, 6 to 12 pixels long "
    "in any direction, and weak noise. Two NAF blocks and a Fourier kernel estimator of width 12 (one block a level) "
    "against as many parameters in NAF blocks of width 12, same steps on the same images, L1 and 0.01 times the "
    "spectra's L1. Effect: PSNR with the estimator less that without, over test images.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train both networks on the same blurred digits and compare PSNR on the same test images."""
    import torch

    from torchconv.models.restore.scores import psnr

    seeds, steps = (1, 300) if budget == "quick" else (3, 3000)
    train_set, test_set = _digits()
    blurred = _blur(test_set, torch.Generator().manual_seed(777))
    scores: dict[str, Any] = {"blurred": psnr(blurred.clamp(0, 1), test_set)}
    counts: dict[str, int] = {}
    for seed in range(seeds):
        for name in ("estimator", "blocks only"):
            net = _train(name, train_set, seed, steps)
            with torch.no_grad():
                score = psnr(net(blurred).clamp(0, 1), test_set)
            scores[name] = scores.get(name, 0) + score / seeds
            counts[name] = sum(p.numel() for p in net.parameters())
            progress(f"seed {seed}: {name} {float(score.mean()):.2f} dB, blurred {float(scores['blurred'].mean()):.2f}")
    gain = scores["estimator"] - scores["blocks only"]
    half = 1.96 * float(gain.std()) / len(gain) ** 0.5
    effect = float(gain.mean())
    return Evidence(
        effect=effect,
        low=effect - half,
        high=effect + half,
        unit="dB",
        meaning="positive: the network with the estimator is closer to the sharp image",
        measurements={
            "psnr": {name: float(score.mean()) for name, score in scores.items()},
            "parameters": counts,
            "seeds": seeds,
            "steps": steps,
            "test_images": len(gain),
        },
        notes=["The interval is over test images; the paper's results are on photographs, after 600 000 steps."],
    )


def _digits() -> tuple[Any, Any]:
    """Digits in [0, 1] enlarged four times, with a border: training and test."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().images).float()[:, None] / 16
    x = F.pad(F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False), [PAD] * 4)
    return x[:1500], x[1500:]


def _blur(x: Any, generator: Any) -> Any:
    """A line of 6 to 12 pixels in a direction of its own for each image, and noise of 0.01."""
    import torch
    import torch.nn.functional as F

    count = len(x)
    length = 6 + 6 * torch.rand(count, 1, generator=generator)
    angle = torch.pi * torch.rand(count, 1, generator=generator)
    at = torch.linspace(-0.5, 0.5, 49) * length
    axis = torch.arange(13) - 6.0
    # every point of the line spreads over the four nearest taps
    rows = (1 - (axis[:, None, None] - at * torch.sin(angle)).abs()).clamp(min=0)
    columns = (1 - (axis[:, None, None] - at * torch.cos(angle)).abs()).clamp(min=0)
    kernels = torch.einsum("uns,vns->nuv", rows, columns)
    kernels = kernels / kernels.sum((1, 2), keepdim=True)
    y = F.conv2d(x.transpose(0, 1), kernels[:, None], padding=6, groups=count).transpose(0, 1)
    return y + 0.01 * torch.randn(x.shape, generator=generator)


def _network(name: str) -> Any:
    from torch import nn

    from torchconv.ops.deeprftv2_kernel import FourierKernelEstimator, NAFBlock

    class Deblur(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, WIDTH, 3, padding=1)
            # 8 blocks have about the parameters of 2 and an estimator with 4
            self.blocks = nn.Sequential(*(NAFBlock(WIDTH) for _ in range(2 if name == "estimator" else 8)))
            estimator = FourierKernelEstimator(WIDTH, image_channels=1) if name == "estimator" else None
            self.end = nn.Conv2d(WIDTH, 1, 3, padding=1) if estimator is None else None
            self.estimator = estimator

        def forward(self, x: Any) -> Any:
            feature = self.blocks(self.embed(x))
            if self.estimator is not None:
                return self.estimator(feature, x)[1]
            assert self.end is not None
            return self.end(feature) + x

    return Deblur()


def _train(name: str, images: Any, seed: int, steps: int) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _network(name)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Any:
        x = images[torch.randint(len(images), (BATCH,), generator=generator)]
        y = net(_blur(x, generator))
        return (y - x).abs().mean() + 0.01 * torch.fft.rfft2(y - x).abs().mean()

    return train(net, loss, steps=steps, lr=4e-3, weight_decay=0.0)
