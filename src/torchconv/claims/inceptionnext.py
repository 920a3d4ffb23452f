"""Inception depthwise mixer against a 7 × 7 depthwise one: time of a block, accuracy of a small network on digits."""

from __future__ import annotations

from functools import partial
from typing import Any

from torchconv.claims import Evidence, Progress, Verdict, claim
from torchconv.claims._support import paired_interval, random_batches, test_accuracy, train

_MARGIN = 1.0


def _mixers() -> dict[str, Any]:
    from torchconv.ops.inceptionnext import InceptionDWConv2d
    from torchconv.ops.plain import DepthwiseConv2d

    return {"depthwise 7x7": partial(DepthwiseConv2d, kernel_size=7, padding="same"), "inception": InceptionDWConv2d}


def _digits() -> tuple[Any, ...]:
    """Digits enlarged four times, 1347 for training and 450 for testing, in the same split for every seed."""
    import torch
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    x = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1347]], y[order[:1347]], x[order[1347:]], y[order[1347:]]


def _accuracy(mixer: Any, data: tuple[Any, ...], seed: int, steps: int) -> tuple[float, int]:
    import torch
    import torch.nn.functional as F

    from torchconv.models.classify.inceptionnext import MetaNeXt

    x, y, x_test, y_test = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layout: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64), "mlp_ratios": 2}
        net = MetaNeXt(1, 10, **layout, ls_init_value=0.1, token_mixer=mixer)
    batch = random_batches(x, y, 64, seed)

    def loss() -> Any:
        images, labels = batch()
        return F.cross_entropy(net(images), labels)

    train(net, loss, steps=steps, lr=4e-3, weight_decay=0.05, one_cycle=True)
    return test_accuracy(net, x_test, y_test), sum(p.numel() for p in net.parameters())


def _blocks(channels_last: bool, training: bool) -> dict[str, Any]:
    """One call of a block of each kind on 8 maps of 96 × 28 × 28, with the backward pass where ``training``."""
    import torch

    from torchconv.models.classify.inceptionnext import MetaNeXtBlock

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(8, 96, 28, 28).contiguous(memory_format=layout)

    def call(block: Any) -> Any:
        def forward() -> Any:
            return block(x)

        def step() -> None:
            with torch.enable_grad():
                block.zero_grad()
                block(x.detach().requires_grad_()).sum().backward()

        return step if training else forward

    found = {}
    for name, mixer in _mixers().items():
        block: Any = MetaNeXtBlock(96, token_mixer=mixer).train(training)
        found[name] = call(block.to(memory_format=layout))
    return found


def _words(ratio: list[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


@claim(
    key="inceptionnext",
    says="A block with the inception depthwise mixer runs faster than the same block with a 7 × 7 depthwise "
    "convolution, above all in training, and the network keeps its accuracy.",
    source="arXiv 2303.16900, Section 4 (Tables 3 and 4)",
    experiment="Training step of a MetaNeXt block (96 channels, 28 × 28, batch 8) with either mixer, timed in turn; "
    "accuracy of a four-stage MetaNeXt with either mixer on digits at 32 × 32, paired seeds.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Time saved in a training step; supported needs the accuracy to be no more than a point lower as well."""
    import torch

    from torchconv.analysis.latency import paired_latency

    seeds, steps, repeats = (4, 120, 20) if budget == "quick" else (10, 300, 100)
    times: dict[str, Any] = {}
    saved = (0.0, 0.0, 0.0)
    for channels_last in (False, True):
        for training in (True, False):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                measured = paired_latency(_blocks(channels_last, training), repeats=repeats, device="cpu")
            ratio = measured.ratios["inception"]
            label = f"{'training step' if training else 'inference'}, {'channels last' if channels_last else 'NCHW'}"
            times[label] = {
                "median_ms": {name: round(t.median_ms, 3) for name, t in measured.latencies.items()},
                "ratio": [ratio.median, ratio.low, ratio.high],
            }
            if training and not channels_last:
                saved = (100 * (1 - ratio.median), 100 * (1 - ratio.high), 100 * (1 - ratio.low))
            progress(f"{label}: inception takes {ratio.median:.2f} of the time of 7 x 7")
    data = _digits()
    scores: dict[str, list[float]] = {name: [] for name in _mixers()}
    parameters = {}
    for seed in range(seeds):
        for name, mixer in _mixers().items():
            accuracy, parameters[name] = _accuracy(mixer, data, seed, steps)
            scores[name].append(accuracy)
        progress(f"seed {seed}: " + ", ".join(f"{name} {found[-1]:.3f}" for name, found in scores.items()))
    mean, low, high = paired_interval(scores["inception"], scores["depthwise 7x7"], 100)
    verdict: Verdict = "inconclusive"
    if saved[1] > 0 and low > -_MARGIN:
        verdict = "supported"
    elif saved[2] < 0 or high < -_MARGIN:
        verdict = "not supported"
    return Evidence(
        effect=saved[0],
        low=saved[1],
        high=saved[2],
        unit="% of a block's training step",
        meaning="positive: the inception mixer's block is faster",
        verdict=verdict,
        measurements={
            "block": times,
            "accuracy": scores,
            "accuracy_difference_points": [mean, low, high],
            "parameters": parameters,
        },
        notes=[
            f"Accuracy, inception less 7 x 7: {mean:+.2f} points, 95 % interval {low:+.2f} to "
            f"{high:+.2f} over {seeds} seeds; within {_MARGIN:g} point counts as kept.",
            "Inference of the block, time over that of 7 x 7 with its interval: "
            + "; ".join(f"{label} {_words(t['ratio'])}" for label, t in times.items() if "inference" in label)
            + ". An interval that holds 1 shows no gain.",
        ],
    )
