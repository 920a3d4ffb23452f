"""DeepLab's claim: atrous convolution widens the field of view at no cost in parameters or multiply-adds."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, train

SIZE, CLASSES, WIDTH = 40, 3, 12
RATES = {"atrous": (2, 4, 6, 8), "rate 1": (1, 1, 1, 1)}


@claim(
    key="deeplab",
    says="Parallel atrous convolutions see objects at several scales and label pixels better, with the parameters and "
    "the computation of ordinary ones.",
    source="arXiv 1606.00915, abstract, sections 3.1 and 3.2",
    experiment="Noisy 40 × 40 images with one large disc or square of the same brightness, labelled by its kind; two 3 "
    "× 3 convolutions of 12 channels, a pyramid of four 3 × 3 branches, a 1 × 1 classifier. Rates 2, 4, 6, 8 against "
    "four times rate 1, equal parameters, multiply-adds and starts, paired seeds. Effect: mean intersection over "
    "union.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train both pyramids on the same images and compare the overlap."""
    import torch

    seeds, steps = (4, 200) if budget == "quick" else (10, 1500)
    x, y = _images(200, torch.Generator().manual_seed(777))
    found: dict[str, list[float]] = {name: [] for name in RATES}
    parameters = {}
    for seed in range(seeds):
        for name, rates in RATES.items():
            net = _network(rates, seed)
            parameters[name] = sum(p.numel() for p in net.parameters())
            _train(net, seed, steps)
            with torch.no_grad():
                found[name].append(_overlap(net(x).argmax(1), y))
        progress(f"seed {seed}: " + ", ".join(f"{name} {scores[-1]:.3f}" for name, scores in found.items()))
    effect, low, high = paired_interval(found["atrous"], found["rate 1"], 100)
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="points of mean intersection over union",
        meaning="positive: the atrous pyramid labels better",
        measurements={"mean_iou": found, "parameters": parameters, "seeds": seeds, "steps": steps},
        notes=[
            "The fields of view are 21 and 7 pixels; the objects measure 15 to 25, so that the narrow one sees an edge "
            "without its shape.",
            "Multiply-adds are equal by construction. The paper's conditional random field is not part of this.",
        ],
    )


def _images(count: int, generator: Any) -> tuple[Any, Any]:
    """One shape an image, disc or square."""
    import torch

    rows, columns = torch.arange(SIZE).reshape(1, -1, 1), torch.arange(SIZE).reshape(1, 1, -1)
    centre = torch.randint(12, SIZE - 12, (2, count, 1, 1), generator=generator)
    radius = torch.randint(7, 13, (count, 1, 1), generator=generator)
    square = torch.randint(2, (count, 1, 1), generator=generator).bool()
    down, right = (rows - centre[0]).abs(), (columns - centre[1]).abs()
    inside = torch.where(square, torch.maximum(down, right) <= radius, down**2 + right**2 <= radius**2)
    labels = torch.where(inside, 1 + square.long(), 0)
    return inside.float()[:, None] + 0.3 * torch.randn(count, 1, SIZE, SIZE, generator=generator), labels


def _overlap(predicted: Any, target: Any) -> float:
    """Mean over the classes of intersection over union."""
    scores = []
    for kind in range(CLASSES):
        ours, theirs = predicted == kind, target == kind
        scores.append(float((ours & theirs).sum()) / max(1.0, float((ours | theirs).sum())))
    return sum(scores) / CLASSES


def _network(rates: tuple[int, ...], seed: int) -> Any:
    import torch
    from torch import nn

    from torchconv.ops.deeplab import ASPP2d

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = nn.Conv2d(1, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        pyramid, last = ASPP2d(WIDTH, WIDTH, rates=rates), nn.Conv2d(WIDTH, CLASSES, 1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), pyramid, nn.ReLU(), last)


def _train(net: Any, seed: int, steps: int) -> None:
    """Fresh images for every step."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(seed)

    def loss() -> Any:
        x, y = _images(16, generator)
        return F.cross_entropy(net(x), y)

    train(net, loss, steps=steps, lr=1e-2, one_cycle=True)
