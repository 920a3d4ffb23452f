"""Tunable convolutions' claim: one network, moved by ω, does what networks trained for each trade-off do."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import random_batches, train

NOISE, WIDTH, GRID, MARGIN = 0.2, 12, (0.0, 0.25, 0.5, 0.75, 1.0), 1.0


@claim(
    key="tunable",
    says="Kernels mixed by the vector that also mixes the losses give one network whose behaviour is moved at "
    "inference, as good at every setting as a network trained for that setting, at no extra cost once ω is fixed.",
    source="arXiv 2304.00898, abstract and section 4 (image denoising)",
    experiment="Digits at 16 × 16 with noise of deviation 0.2; three 3 × 3 convolutions of 12 channels predict the "
    "noise. Objectives: squared error to the clean and to the noisy image, ω uniform on the simplex for every item. "
    "Compared at ω_1 = 0.25, 0.5, 0.75, 1 with plain networks trained for that ω alone. Effect: PSNR of the tunable "
    "network less that of the plain one, to the best mixture of clean and noisy image, at the setting where it is "
    "worst.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train a tunable network and one plain network a setting, on the same data, and compare on test images."""
    import torch

    from torchconv.models.restore.scores import psnr

    seeds, steps = (2, 400) if budget == "quick" else (5, 1500)
    clean, test = _digits()
    noise = NOISE * torch.randn(test.shape, generator=torch.Generator().manual_seed(99))
    gaps: list[Any] = []
    curves, fixed_curves, parameters = [], [], {}
    for seed in range(seeds):
        net = _train(clean, seed, steps, None)
        curve, fixed = [], []
        for setting in GRID:
            omega = torch.tensor([setting, 1 - setting])
            with torch.no_grad():
                ours = net.merge(omega)(test + noise)
            curve.append(_psnr(ours, test))
            if setting == 0:
                continue
            plain = _train(clean, seed, steps, omega)
            parameters = {"tunable": _count(net), "plain": _count(plain), "merged": _count(net.merge(omega))}
            with torch.no_grad():
                theirs = plain.merge(omega)(test + noise)
            target = setting * test + (1 - setting) * (test + noise)
            gaps.append(psnr(ours, target) - psnr(theirs, target))
            fixed.append(_psnr(theirs, test))
        curves.append(curve)
        fixed_curves.append(fixed)
        progress(f"seed {seed}: PSNR to clean " + ", ".join(f"{v:.1f}" for v in curve))
    stacked = torch.stack(gaps).reshape(seeds, len(GRID) - 1, -1)
    by_setting = stacked.mean((0, 2))
    images = stacked[:, int(by_setting.argmin())].mean(0)
    half_width = 1.96 * float(images.std()) / images.numel() ** 0.5
    effect = float(images.mean())
    rising = all(a < b for curve in curves for a, b in itertools.pairwise(curve))
    return Evidence(
        effect=effect,
        low=effect - half_width,
        high=effect + half_width,
        unit="dB",
        meaning="positive: the tunable network is nearer to the optimum of the mixed loss than the one trained for it",
        threshold=-MARGIN,
        measurements={
            "settings": list(GRID),
            "psnr_to_clean": curves,
            "psnr_to_clean_of_fixed_networks": fixed_curves,
            "gap_by_setting": [round(float(v), 3) for v in by_setting],
            "rises_with_omega": rising,
            "parameters": parameters,
            "seeds": seeds,
            "steps": steps,
        },
        notes=[
            f"As good means within {MARGIN:g} dB. ω_1 = 0 is left out: a network that answers 0 is then perfect.",
            f"PSNR to the clean image rises with ω_1 at every step: {'yes' if rising else 'no'}.",
            "Merged at any ω the tunable network has exactly the plain one's layers, so the cost is equal by "
            f"construction; before that it stores {parameters['tunable']} numbers against {parameters['plain']}.",
            "The interval is over test images, with seeds averaged within an image.",
        ],
    )


def _digits() -> tuple[Any, Any]:
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    return images[:1400], images[1400:]


def _network(num_params: int) -> Any:
    from torch import Tensor, nn

    from torchconv.ops.tunable import TunableConv2d
    from torchconv.surgery.merging import merge

    class Denoiser(nn.Module):
        """Three convolutions predict the noise, which is taken away."""

        def __init__(self) -> None:
            super().__init__()
            sizes = (1, WIDTH, WIDTH, 1)
            self.layers = nn.ModuleList(
                TunableConv2d(a, b, 3, num_params=num_params, mode="linear") for a, b in itertools.pairwise(sizes)
            )

        def forward(self, x: Tensor, params: Tensor | None = None) -> Tensor:
            y = x
            for number, layer in enumerate(self.layers):
                y = layer(y) if params is None else layer(y, params)
                y = y.relu() if number < 2 else y
            return x - y

        def merge(self, params: Tensor) -> nn.Module:
            from torchconv.ops.tunable import set_tuning

            set_tuning(self, params if num_params > 1 else [1.0])
            twin = Denoiser()
            twin.layers = nn.ModuleList(merge(layer) for layer in self.layers)
            return twin

    return Denoiser()


def _train(clean: Any, seed: int, steps: int, omega: Any) -> Any:
    """On the mixed loss: ω drawn for every item, or fixed for a network with single kernels."""
    import torch

    from torchconv.ops.tunable_loss import multi_loss, sample_tuning

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _network(2 if omega is None else 1)
    batch = random_batches(clean, clean, 64, seed)

    def loss() -> Any:
        x, _ = batch()
        noisy = x + NOISE * torch.randn(x.shape, generator=generator)
        drawn = sample_tuning(len(x), 2, generator=generator)
        y = net(noisy, drawn) if omega is None else net(noisy)
        losses = [(y - target).square().mean((1, 2, 3)) for target in (x, noisy)]
        return multi_loss(losses, drawn if omega is None else omega)

    return train(net, loss, steps=steps, lr=1e-2, weight_decay=0.0)


def _psnr(ours: Any, target: Any) -> float:
    return round(-10 * math.log10(float((ours - target).square().mean())), 2)


def _count(net: Any) -> int:
    return sum(p.numel() for p in net.parameters())
