"""What several claims need: a short training loop and an interval over paired seeds. torch is imported when called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchconv.claims import Evidence


def train(
    model: Any,
    loss: Callable[[], Any],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    one_cycle: bool = False,
) -> Any:
    """AdamW on ``loss()``, which draws its own batch, with a cosine to zero or the one-cycle rule; then eval mode."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedules = torch.optim.lr_scheduler
    schedule: Any = (
        schedules.OneCycleLR(optimizer, lr, total_steps=steps)
        if one_cycle
        else schedules.CosineAnnealingLR(optimizer, steps)
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def random_batches(x: Any, y: Any, size: int, seed: int) -> Callable[[], tuple[Any, Any]]:
    """Batches drawn with replacement."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Any, Any]:
        rows = torch.randint(len(x), (size,), generator=generator)
        return x[rows], y[rows]

    return draw


def test_accuracy(model: Any, x: Any, y: Any) -> float:
    """Share of right answers."""
    import torch

    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def paired_interval(ours: Sequence[float], theirs: Sequence[float], scale: float = 1.0) -> tuple[float, float, float]:
    """Mean of the differences over paired seeds times ``scale``, with Student's 95 % interval."""
    from scipy import stats

    differences = [scale * (a - b) for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / len(differences)
    low, high = stats.t.interval(0.95, len(differences) - 1, loc=mean, scale=stats.sem(differences))
    return mean, float(low), float(high)


def trained_resnets() -> dict[int, Path]:
    """Files of trained CIFAR-10 ResNets by depth (20, 32, 44, 56), those that the data folders hold."""
    from torchconv.data.named import places

    found: dict[int, Path] = {}
    for place in places(None):
        for folder in (place / "cifar10_resnet", place):
            for depth in (20, 32, 44, 56):
                for path in sorted(folder.glob(f"resnet{depth}-*.th"))[:1]:
                    found.setdefault(depth, path)
    return found


def cifar_resnet(depth: int, path: Path) -> Any:
    """The CIFAR ResNet with the parameter names of the trained file."""
    from collections import OrderedDict

    from torch import nn

    from torchconv.compare.nets import BasicBlock
    from torchconv.weights import read_state

    def convolution(in_channels: int, channels: int, stride: int) -> nn.Module:
        return nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)

    parts: OrderedDict[str, nn.Module] = OrderedDict(conv1=convolution(3, 16, 1))
    parts |= {"bn1": nn.BatchNorm2d(16), "act": nn.ReLU()}
    channels = 16
    for stage, width in enumerate((16, 32, 64), 1):
        stack = []
        for block in range((depth - 2) // 6):
            stack.append(BasicBlock(convolution, channels, width, 2 if stage > 1 and not block else 1, 2))
            channels = width
        parts[f"layer{stage}"] = nn.Sequential(*stack)
    parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "linear": nn.Linear(64, 10)}
    model = nn.Sequential(parts)
    model.load_state_dict(read_state(path))
    return model.eval()


def without_resnets(unit: str) -> Evidence:
    """What a claim says that needs :func:`trained_resnets` and finds them missing."""
    return Evidence(
        effect=0.0,
        low=0.0,
        high=0.0,
        unit=unit,
        meaning="nothing was measured",
        verdict="inconclusive",
        notes=[
            "The weights are missing, so nothing was measured: put resnet20-*.th, resnet32-*.th, resnet44-*.th and "
            "resnet56-*.th (trained CIFAR-10 networks) into a folder cifar10_resnet and name its parent with "
            "$TORCHCONV_DATA."
        ],
    )
