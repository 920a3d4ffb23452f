"""The 13 × 13 block sees what a 3 × 3 block cannot, its merged form loses nothing, and its receptive field is wider."""

from __future__ import annotations

from typing import Any

from torchconv._common import require
from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, train

_SIZE, _REACH, _WIDTH = 24, 5, 16


def _dots(count: int, generator: Any) -> tuple[Any, Any]:
    """Sparse dots, and for every pixel whether a dot is within Chebyshev distance 5."""
    import torch
    import torch.nn.functional as F

    x = (torch.rand(count, 1, _SIZE, _SIZE, generator=generator) < 0.006).float()
    return x, F.max_pool2d(x, 2 * _REACH + 1, stride=1, padding=_REACH)


def _train(kernel_size: int, seed: int, steps: int) -> Any:
    """One block between two 1 × 1 convolutions, trained on fresh dots."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from torchconv.models.classify.unireplknet_block import UniRepLKNetBlock

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = UniRepLKNetBlock(_WIDTH, kernel_size, layer_scale_init_value=1.0)
        model = nn.Sequential(nn.Conv2d(1, _WIDTH, 1), block, nn.Conv2d(_WIDTH, 1, 1))
    # Depthwise convolutions on the CPU train twice as fast in this memory format.
    model = model.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Any:
        x, y = _dots(16, generator)
        return F.binary_cross_entropy_with_logits(model(x.to(memory_format=torch.channels_last)), y)

    return train(model, loss, steps=steps, lr=4e-3)


def _accuracy(logits: Any, y: Any) -> float:
    return float(((logits > 0) == (y > 0)).float().mean())


def _images(size: int) -> Any:
    """The two photographs that come with scikit-learn, normalised."""
    import torch
    import torch.nn.functional as F

    photographs = require("sklearn.datasets", "compare").load_sample_images().images
    found = [torch.tensor(p).permute(2, 0, 1)[None].float() / 255 for p in photographs]
    found = [F.interpolate(p, size=(size, size), mode="bilinear", antialias=True) for p in found]
    return (torch.cat(found) - 0.45) / 0.225


def _side(kernel_size: int, seed: int, x: Any) -> int:
    """Side of the square with half of the contribution, for a fresh network after one pass that sets its statistics."""
    import torch
    from torch import nn

    from torchconv.analysis.erf import erf
    from torchconv.models.classify.unireplknet import UniRepLKNet

    kernels = ((3, 3), *[(kernel_size, kernel_size)] * 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = UniRepLKNet(
            depths=(2, 2, 2, 2),
            dims=(16, 32, 64, 128),
            kernel_sizes=kernels,
            layer_scale_init_value=1.0,
            features_only=True,
        )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # running statistics = those of this one pass
    with torch.no_grad():
        net(x)
    return erf(net, x, thresholds=(0.5,)).sides[0.5] or x.shape[-1]


@claim(
    key="unireplknet",
    says="A few very large depthwise kernels, trained with dilated small ones beside them, see far without depth; "
    "after training the branches fold into one convolution without any loss.",
    source="arXiv 2311.15599, Sections 3.1 and 3.2; arXiv 2410.08049",
    experiment="Mark every pixel with a dot within distance 5 on 24 × 24 maps, with a single block of kernel 13 or 3 "
    "between two 1 × 1 convolutions, paired seeds. The merged block must give the same logits. Besides, the side of "
    "the square that holds half of the log contribution to the centre, for untrained networks of both kernels on "
    "photographs.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """The difference in pixel accuracy over paired seeds with Student's 95 % interval; merge error and ERF sides."""
    import torch
    from torch import nn

    seeds, steps, size = (3, 200, 256) if budget == "quick" else (8, 1000, 256)
    x, y = _dots(200, torch.Generator().manual_seed(10_000))
    scores: dict[int, list[float]] = {13: [], 3: []}
    sides: dict[int, list[int]] = {13: [], 3: []}
    merge_error = 0.0
    for seed in range(seeds):
        for kernel_size, found in scores.items():
            model = _train(kernel_size, seed, steps)
            merged = nn.Sequential(model[0], model[1].merge(), model[2])
            with torch.no_grad():
                logits, after = model(x), merged(x)
            found.append(_accuracy(after, y))
            merge_error = max(merge_error, float((logits - after).abs().max()))
        progress(f"seed {seed}: pixel accuracy {scores[13][-1]:.4f} with kernel 13, {scores[3][-1]:.4f} with kernel 3")
    photographs = _images(size)
    for seed in range(seeds):
        for kernel_size, widths in sides.items():
            widths.append(_side(kernel_size, seed, photographs))
        progress(
            f"seed {seed}: half of the contribution within {sides[13][-1]} against {sides[3][-1]} of {size} pixels"
        )
    mean, low, high = paired_interval(scores[13], scores[3], 100)
    wider = all(a > b for a, b in zip(sides[13], sides[3], strict=True))
    exact = merge_error < 1e-4
    return Evidence(
        effect=mean,
        low=low,
        high=high,
        unit="percentage points of pixel accuracy",
        meaning="positive: the block of kernel 13 is more accurate than the one of kernel 3, after merging",
        verdict=None if wider and exact else "not supported",
        measurements={
            "accuracy": {str(k): v for k, v in scores.items()},
            "majority": float(max(y.mean(), 1 - y.mean())),
            "largest change of a logit by merging": merge_error,
            "ERF side at half of the contribution": {"image side": size, **{str(k): v for k, v in sides.items()}},
        },
        notes=[
            f"Merging changed no logit by more than {merge_error:.1e}.",
            f"Receptive field, untrained: half of the contribution within {sides[13]} pixels for kernel 13, {sides[3]} "
            f"for kernel 3, of {size}.",
            "The task is built so that a 3 × 3 block cannot solve it: it shows the range of one block, not that large "
            "kernels beat depth on natural images.",
        ],
    )
