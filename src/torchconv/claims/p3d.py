"""P3D's claim: a temporal convolution beside the spatial one sees motion, at less than half of a 3-D kernel's cost."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, test_accuracy, train

SIZE, FRAMES, BATCH, WIDTH = 12, 8, 16, 16


@claim(
    key="p3d",
    says="Splitting 3 × 3 × 3 convolutions into 1 × 3 × 3 and 3 × 1 × 1 ones, wired in three ways, learns motion: "
    "better than a 2-D network on frames and than a full 3-D network, with fewer parameters than the latter.",
    source="arXiv 1711.10305, abstract and section 3",
    experiment="Clips of three dots that move up, down, left or right on a torus, 8 frames of 12 × 12; single frames "
    "say nothing of the direction. A 1 × 3 × 3 stem, three bottlenecks of 4 planes, mean, linear: P3D mixed (with the "
    "full budget also A, B and C alone), the same with 1 × 1 × 1 in place of T (frames), and with one 3 × 3 × 3 "
    "convolution in place of S and T. Effect: accuracy of P3D mixed less that of the network on frames, in points, "
    "paired over seeds.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train the networks on the same stream of clips and compare them on the same test clips."""
    import torch

    quick = budget == "quick"
    seeds, steps = (3, 200) if quick else (8, 800)
    kinds = ("mixed", "frames", "full 3-D", *(() if quick else "ABC"))
    x, y = _clips(512, torch.Generator().manual_seed(12345))
    accuracy: dict[str, list[float]] = {kind: [] for kind in kinds}
    counts: dict[str, int] = {}
    for seed in range(seeds):
        for kind in kinds:
            model = _train(kind, seed, steps)
            counts[kind] = sum(p.numel() for p in model.parameters())
            accuracy[kind].append(100 * test_accuracy(model, x, y))
            progress(f"seed {seed}: {kind} {accuracy[kind][-1]:.1f} %")
    effect, low, high = paired_interval(accuracy["mixed"], accuracy["frames"])
    means = {kind: sum(v) / len(v) for kind, v in accuracy.items()}
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="points of accuracy",
        meaning="positive: P3D tells directions that the network on frames cannot",
        measurements={
            "accuracy": means,
            "per_seed": accuracy,
            "mixed_less_full_3d": means["mixed"] - means["full 3-D"],
            "parameters": counts,
            "seeds": seeds,
            "steps": steps,
            "test_clips": len(y),
        },
        notes=[
            "The interval is Student's over seeds, paired.",
            "The toy says that T sees motion. It does not rank A, B, C and mixed, nor does it test the gain over a "
            "full 3-D network, which the paper finds on Sports-1M and UCF101.",
        ],
    )


def _clips(count: int, generator: Any) -> tuple[Any, Any]:
    """Three dots at random places, all moving by one pixel a frame in one of four directions, with wrap-around."""
    import torch

    label = torch.randint(4, (count,), generator=generator)
    place = torch.randint(SIZE, (count, 3, 2), generator=generator)
    step = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])[label]
    frame = torch.arange(FRAMES).reshape(1, FRAMES, 1, 1)
    at = (place[:, None] + frame * step[:, None, None]) % SIZE
    clips = torch.zeros(count, FRAMES, SIZE * SIZE)
    clips.scatter_(2, at[..., 0] * SIZE + at[..., 1], 1.0)
    return clips.reshape(count, 1, FRAMES, SIZE, SIZE), label


def _block(kind: str, form: str) -> Any:
    """A bottleneck of 16 channels and 4 planes."""
    from torch import nn

    from torchconv.models.video.p3d import P3DBottleneck

    planes = WIDTH // 4
    block: Any = P3DBottleneck(WIDTH, planes, form=form)
    if kind == "frames":
        block.conv3 = nn.Conv3d(planes, planes, 1, bias=False)
    return block


def _full_block() -> Any:
    """The bottleneck with one 3 × 3 × 3 convolution inside."""
    from torch import Tensor, nn

    planes = WIDTH // 4

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return (x + super().forward(x)).relu()

    def conv(before: int, after: int, kernel: int) -> list[nn.Module]:
        return [nn.Conv3d(before, after, kernel, padding=kernel // 2, bias=False), nn.BatchNorm3d(after)]

    return Residual(*conv(WIDTH, planes, 1), nn.ReLU(), *conv(planes, planes, 3), nn.ReLU(), *conv(planes, WIDTH, 1))


def _network(kind: str) -> Any:
    """Stem, three bottlenecks, global mean, linear."""
    from torch import nn

    stem = [nn.Conv3d(1, WIDTH, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(WIDTH), nn.ReLU()]
    forms = kind * 3 if kind in ("A", "B", "C") else "ABC"
    blocks = [_full_block() if kind == "full 3-D" else _block(kind, form) for form in forms]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(WIDTH, 4))


def _train(kind: str, seed: int, steps: int) -> Any:
    """AdamW with a cosine to zero on fresh clips, the same for every kind."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _network(kind)

    def loss() -> Any:
        x, y = _clips(BATCH, generator)
        return F.cross_entropy(model(x), y)

    return train(model, loss, steps=steps, lr=5e-3)
