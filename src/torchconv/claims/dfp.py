"""Digits trained in 16-bit dynamic fixed point against floats, with the same recipe; fewer bits for comparison."""

from __future__ import annotations

from functools import cache
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval

_EPOCHS = 8
_MARGIN = 1.0  # points of accuracy that count as matching


@cache
def _digits() -> tuple[Any, ...]:
    import torch
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def _trained(bits: int | None, seed: int) -> tuple[float, float, Any]:
    """Test accuracy after training, the loss of the last epoch, and what the layers saw (first seed only)."""
    import contextlib

    import torch
    import torch.nn.functional as F
    from torch import nn

    from torchconv.claims._support import test_accuracy
    from torchconv.compress.dfp_networks import convert_to_dfp, watch

    x, y, test_x, test_y = _digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2))
        ]
        net: Any = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    if bits is not None:
        net = convert_to_dfp(net, bits=bits)
    steps = _EPOCHS * (len(x) // 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    watching: Any = watch(net) if bits is not None and seed == 0 else contextlib.nullcontext()
    with watching as seen:
        for _ in range(_EPOCHS):
            order = torch.randperm(len(x), generator=generator)
            losses = []
            for rows in order[: len(x) // 64 * 64].split(64):
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
    net.eval()
    return test_accuracy(net, test_x, test_y), sum(losses) / len(losses), seen


@claim(
    key="dfp",
    says="Convolutional networks train with 16-bit integers that share an exponent a tensor, in all three passes, to "
    "the accuracy of 32-bit floats: in as many steps, with the same hyper-parameters and without a loss scale.",
    source="arXiv 1802.00930, Section 5 (ResNet-50, GoogLeNet, VGG-16 and AlexNet on ImageNet)",
    experiment="Digits, three 3 × 3 convolutions of 16, 32 and 32 channels with batch norm and a linear layer, 8 "
    "epochs of SGD with momentum at 0.05: floats and 16 bits from the same weights with the same batches, on paired "
    "seeds; then 8, 6, 4 and 3 bits. Exponents of inputs, weights and gradients are noted at every step of one run.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Accuracy of 16 bits minus that of floats, in points, with a 95 % interval; matching means within one point."""
    seeds, fewer = (5, 1) if budget == "quick" else (20, 6)
    plain = [_trained(None, seed) for seed in range(seeds)]
    sixteen = [_trained(16, seed) for seed in range(seeds)]
    effect, low, high = paired_interval([a for a, *_ in sixteen], [a for a, *_ in plain], 100.0)
    progress(f"floats {100 * _mean(plain):.2f} %, 16 bits {100 * _mean(sixteen):.2f} %")
    narrow = {}
    for bits in (8, 6, 4, 3):
        narrow[bits] = _mean([_trained(bits, seed) for seed in range(fewer)])
        progress(f"{bits} bits {100 * narrow[bits]:.2f} %")
    seen = sixteen[0][2]
    layers = list(dict.fromkeys(r.layer for r in seen.readings))
    epoch = len(_digits()[0]) // 64
    exponents = {
        layer: {
            kind: [round(sum(e) / len(e), 1) for e in _parts(seen.exponents(layer, kind), epoch)]
            for kind in ("input", "weight", "gradient")
        }
        for layer in layers
    }
    change = [rows["gradient"][-1] - rows["gradient"][0] for rows in exponents.values()]
    drift = max(max(rows["weight"]) - min(rows["weight"]) for rows in exponents.values())
    zeroed = max(r.zeroed for r in seen.readings)
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="points of accuracy over floats",
        meaning=f"above −{_MARGIN:g}: 16 bits match floats to within {_MARGIN:g} point",
        threshold=-_MARGIN,
        measurements={
            "accuracy_floats": [a for a, *_ in plain],
            "accuracy_16_bits": [a for a, *_ in sixteen],
            "accuracy_by_bits": {str(b): a for b, a in narrow.items()},
            "loss_floats": [loss for _, loss, _ in plain],
            "loss_16_bits": [loss for _, loss, _ in sixteen],
            "exponents_by_epoch": exponents,
            "largest_share_rounded_to_zero": zeroed,
        },
        notes=[
            "The network is small and so is the task: this is about the arithmetic, not about ImageNet.",
            "Fewer bits, mean accuracy: " + ", ".join(f"{b} bits {100 * a:.1f} %" for b, a in narrow.items()) + ".",
            f"From the first epoch to the last the mean exponents of the gradients changed by {min(change):+.1f} "
            f"to {max(change):+.1f}, those of the weights stayed within {drift:.1f}; at most {100 * zeroed:.1f} % "
            f"of the numbers of a tensor became 0.",
            "Integer multiply-add units are emulated, so the paper's speed-up of 1.8 is not tested.",
        ],
    )


def _mean(runs: list[tuple[float, float, Any]]) -> float:
    return sum(a for a, *_ in runs) / len(runs)


def _parts(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]
