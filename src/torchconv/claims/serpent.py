"""Serpent's claim: scans at several scales restore as well as attention at full size, for a fraction of the compute."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import train

SIZE, BATCH, SIGMA, NOISE = 16, 16, 1.5, 0.02
RATES = {"serpent": 1e-2, "attention": 4e-3}
ON_PAR, CHEAPER, SIDE = -0.5, 5.0, 512


@claim(
    key="serpent",
    says="A U of selective scans on patches restores images about as well as attention networks that work at full "
    "resolution, at a small fraction of their compute, which grows linearly with the number of pixels.",
    source="arXiv 2403.17902, abstract and section 4",
    experiment="Digits enlarged to 16 × 16, Gaussian blur of deviation 1.5 and noise of 0.02. Serpent (reconstruction: "
    "width 16, patches of 2, three stages) against a network in SwinIR's shape of about as many parameters: blocks of "
    "shifted window attention (torchvision's, windows of 4 × 4) at full resolution, between two convolutions, with the "
    "image added. Same steps on the same images, L1. Effect: Serpent's PSNR less the other's over test images, to be "
    "above -0.5 dB; supported only if Serpent also takes at most a fifth of the operations at 512 × 512.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train both networks on the same blurred digits, compare PSNR, and count operations at two sizes."""
    import torch

    from torchconv.analysis.count import count
    from torchconv.models.restore.scores import psnr

    seeds, steps = (1, 100) if budget == "quick" else (3, 2000)
    train_set, test_set = _digits()
    blurred = _blur(test_set, torch.Generator().manual_seed(777))
    scores: dict[str, Any] = {"blurred": psnr(blurred.clamp(0, 1), test_set)}
    parameters: dict[str, int] = {}
    for seed in range(seeds):
        for name in ("serpent", "attention"):
            net = _train(name, train_set, seed, steps)
            with torch.no_grad():
                score = psnr(net(blurred).clamp(0, 1), test_set)
            scores[name] = scores.get(name, 0) + score / seeds
            parameters[name] = sum(p.numel() for p in net.parameters())
            progress(f"seed {seed}: {name} {float(score.mean()):.2f} dB, blurred {float(scores['blurred'].mean()):.2f}")
    with torch.device("meta"):
        flops = {
            name: {n: count(_network(name).eval(), torch.zeros(1, 1, n, n)).flops for n in (SIDE // 2, SIDE)}
            for name in parameters
        }
    ratio = flops["attention"][SIDE] / flops["serpent"][SIDE]
    gain = scores["serpent"] - scores["attention"]
    half = 1.96 * float(gain.std()) / len(gain) ** 0.5
    effect = float(gain.mean())
    return Evidence(
        effect=effect,
        low=effect - half,
        high=effect + half,
        unit="dB",
        meaning="above -0.5: Serpent is on par with the attention network or better",
        threshold=ON_PAR,
        verdict=None if ratio >= CHEAPER else "not supported",
        measurements={
            "psnr": {name: float(score.mean()) for name, score in scores.items()},
            "parameters": parameters,
            "operations": {name: {f"{n} × {n}": f for n, f in by.items()} for name, by in flops.items()},
            "seeds": seeds,
            "steps": steps,
            "test_images": len(gain),
        },
        notes=[
            f"At {SIDE} × {SIDE} the attention network takes {ratio:.1f} times the operations of Serpent.",
            f"Four times as many pixels take {flops['serpent'][SIDE] / flops['serpent'][SIDE // 2]:.2f} times the "
            "operations of Serpent.",
            "Learning rates, 0.01 and 0.004, are for each network the best of 0.004, 0.01 and 0.02 in short runs.",
            "The interval is over test images of one short training. The paper's 150-fold saving is of larger networks "
            "on photographs, which are not tested here; the network is a reconstruction of the paper's.",
        ],
    )


def _digits() -> tuple[Any, Any]:
    """Digits in [0, 1] enlarged twice: training and test."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().images).float()[:, None] / 16
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return x[:1400], x[1400:]


def _blur(x: Any, generator: Any) -> Any:
    """A Gaussian, and noise."""
    import torch
    import torch.nn.functional as F

    taps = torch.exp(-(torch.arange(-5.0, 6.0) ** 2) / (2 * SIGMA**2))
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    y = F.conv2d(x, kernel, padding=5)
    return y + NOISE * torch.randn(x.shape, generator=generator)


def _network(name: str) -> Any:
    from torch import nn

    from torchconv._common import require
    from torchconv.models.restore.serpent import Serpent

    if name == "serpent":
        return Serpent(1, dim=16, depths=(1, 1, 1), states=4)
    swin = require("torchvision.models.swin_transformer", "compare")

    class Windows(nn.Module):
        """SwinIR's shape: shallow convolution, window attention at full resolution, convolution, image added."""

        def __init__(self, width: int = 60, blocks: int = 3) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, width, 3, padding=1)
            self.blocks = nn.Sequential(
                *(swin.SwinTransformerBlock(width, 4, [4, 4], [i % 2 * 2] * 2, mlp_ratio=2.0) for i in range(blocks))
            )
            self.end = nn.Conv2d(width, 1, 3, padding=1)

        def forward(self, x: Any) -> Any:
            y = self.blocks(self.embed(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return x + self.end(y)

    return Windows()


def _train(name: str, images: Any, seed: int, steps: int) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _network(name)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Any:
        x = images[torch.randint(len(images), (BATCH,), generator=generator)]
        return (net(_blur(x, generator)) - x).abs().mean()

    return train(net, loss, steps=steps, lr=RATES[name], weight_decay=0.0)
