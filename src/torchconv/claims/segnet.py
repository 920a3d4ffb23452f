"""SegNet's claim: unpooling at the remembered maxima draws boundaries better than upsampling without them."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, train

SIZE, CLASSES, WIDTHS = 32, 4, (12, 12)


@claim(
    key="segnet",
    says="Upsampling by the positions of the pooling maxima keeps boundaries at almost no cost in memory, where an "
    "upsampling that does not know them blurs.",
    source="arXiv 1511.00561, abstract, sections 3 and 4",
    experiment="Noisy 32 × 32 images of squares, discs and crosses on a background, two levels of 12 channels with 5 "
    "× 5 convolutions as in SegNet-Basic, unpooling against nearest-neighbour upsampling, equal parameters and starts, "
    "paired seeds. Effect: mean intersection over union of the classes within two pixels of a boundary, in points.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train both decoders on the same images and compare the overlap near boundaries."""
    import torch

    seeds, steps = (8, 120) if budget == "quick" else (10, 800)
    x, y = _images(200, torch.Generator().manual_seed(777))
    near = _near_boundaries(y)
    kinds = ("unpooling", "nearest")
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    parameters = {}
    for seed in range(seeds):
        for kind in kinds:
            net = _network(kind, seed)
            parameters[kind] = sum(p.numel() for p in net.parameters())
            _train(net, seed, steps)
            with torch.no_grad():
                predicted = net(x).argmax(1)
            found[kind].append((_overlap(predicted[near], y[near]), _overlap(predicted, y)))
        progress(f"seed {seed}: " + ", ".join(f"{kind} {found[kind][-1][0]:.3f}" for kind in kinds))
    near_by_kind, all_by_kind = ([[s[i] for s in found[kind]] for kind in kinds] for i in (0, 1))
    effect, low, high = paired_interval(near_by_kind[0], near_by_kind[1], 100)
    everywhere = paired_interval(all_by_kind[0], all_by_kind[1], 100)
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="points of mean intersection over union near boundaries",
        meaning="positive: unpooling at the maxima is better",
        measurements={
            "near_boundaries": dict(zip(kinds, near_by_kind, strict=True)),
            "everywhere": dict(zip(kinds, all_by_kind, strict=True)),
            "everywhere_difference_points": list(everywhere),
            "parameters": parameters,
            "bytes_kept_a_window": {"places": 1, "indices_of_pytorch": 8, "the_window's_values": 16},
            "seeds": seeds,
            "steps": steps,
        },
        notes=[
            "Over the whole image the difference is {:+.2f} points ({:+.2f} to {:+.2f}).".format(*everywhere),
            "Memory is counted, not measured: a byte for each 2 × 2 window and channel, where keeping the encoder's "
            "map takes 16.",
        ],
    )


def _images(count: int, generator: Any) -> tuple[Any, Any]:
    """Three shapes an image, one of each class, later ones in front; colours with noise."""
    import torch

    rows, columns = torch.arange(SIZE).reshape(1, -1, 1), torch.arange(SIZE).reshape(1, 1, -1)
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for kind in (1, 2, 3):
        centre = torch.randint(5, SIZE - 5, (2, count, 1, 1), generator=generator)
        radius = torch.randint(4, 8, (count, 1, 1), generator=generator)
        down, right = (rows - centre[0]).abs(), (columns - centre[1]).abs()
        inside = {
            1: torch.maximum(down, right) <= radius,
            2: down**2 + right**2 <= radius**2,
            3: (torch.minimum(down, right) <= 1) & (torch.maximum(down, right) <= radius),
        }[kind]
        labels[inside] = kind
    # One brightness for all shapes: the class follows from the outline.
    shape = (labels > 0).float()[:, None] * torch.tensor([0.8, 0.5, 0.3]).reshape(1, 3, 1, 1)
    return shape + 0.25 * torch.randn(count, 3, SIZE, SIZE, generator=generator), labels


def _near_boundaries(y: Any) -> Any:
    """Pixels with another class within two pixels."""
    import torch.nn.functional as F

    padded = F.pad(y[:, None].float(), (2, 2, 2, 2), mode="replicate")
    highest, lowest = F.max_pool2d(padded, 5, 1), -F.max_pool2d(-padded, 5, 1)
    return (highest != lowest)[:, 0]


def _overlap(predicted: Any, target: Any) -> float:
    """Mean over the classes of intersection over union."""
    scores = []
    for kind in range(CLASSES):
        ours, theirs = predicted == kind, target == kind
        scores.append(float((ours & theirs).sum()) / max(1.0, float((ours | theirs).sum())))
    return sum(scores) / CLASSES


def _network(kind: str, seed: int) -> Any:
    """Two levels inside each other and a 1 × 1 classifier."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from torchconv.ops.segnet_level import SegNetLevel2d

    class Nearest(SegNetLevel2d):
        """The level with upsampling that forgets the maxima."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.encoder(x)
            inside = self.inner(F.max_pool2d(x, 2, ceil_mode=True))
            y: Tensor = self.decoder(F.interpolate(inside, size=x.shape[2:], mode="nearest"))
            return y

    level = SegNetLevel2d if kind == "unpooling" else Nearest
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outer, inner = WIDTHS
        body = level(3, outer, outer, level(outer, outer, inner, kernel_size=5), kernel_size=5)
        return nn.Sequential(body, nn.Conv2d(outer, CLASSES, 1))


def _train(net: Any, seed: int, steps: int) -> None:
    """Fresh images; classes weighted against their frequency."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([0.4, 1.0, 1.0, 2.0])

    def loss() -> Any:
        x, y = _images(16, generator)
        return F.cross_entropy(net(x), y, weights)

    train(net, loss, steps=steps, lr=1e-2, one_cycle=True)
