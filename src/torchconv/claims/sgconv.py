"""SGConv's claim: few parameters an octave and decay with the distance make a global kernel learn better."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._sequences import STEPS, WIDTH, image_interval, train_on_digits


@claim(
    key="sgconv",
    says="A convolution as long as the sequence learns long-range dependence better when its kernel has few parameters "
    "an octave and decays with the distance than when every tap is free.",
    source="arXiv 2210.09298, sections 3 and 4.1",
    experiment="Digits read as sequences of 64 pixels, 1300 to train on: two residual blocks of width 32, two-sided "
    "convolution, GLU. Kernels: structured (8 numbers an octave, α = 1/2), structured without decay (α = 1), and every "
    "tap free. The free kernel starts with the same norm. Effect: accuracy of the structured kernel less that of the "
    "free one, over test sequences.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train networks that differ in the kernels only, on the same data in the same order."""
    from torchconv.ops.sgconv import SGConvLayer

    seeds, steps = (3, 250) if budget == "quick" else (8, 1000)
    kinds: dict[str, dict[str, Any]] = {
        "structured": {"kernel_dim": 8, "decay_min": 2.0, "decay_max": 2.0},
        "without decay": {"kernel_dim": 8, "decay_min": 1.0, "decay_max": 1.0},
        "free": {"kernel_dim": STEPS, "n_scales": 1},
    }
    right: dict[str, list[Any]] = {name: [] for name in kinds}
    counts = {}
    for seed in range(seeds):
        for name, options in kinds.items():

            def layer(options: dict[str, Any] = options) -> Any:
                return SGConvLayer(WIDTH, STEPS, bidirectional=True, postact="glu", **options)

            found, model = train_on_digits(layer, seed, steps)
            right[name].append(found)
            counts[name] = sum(p.numel() for p in model.parameters())
            progress(f"seed {seed}: {name} {float(found.mean()):.3f}")
    effect, low, high = image_interval(right["structured"], right["free"])
    decay = image_interval(right["structured"], right["without decay"])
    accuracy = {name: [float(r.mean()) for r in found] for name, found in right.items()}
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="percentage points of accuracy",
        meaning="positive: the structured kernel is better than one with every tap free",
        measurements={
            "accuracy": {name: sum(a) / len(a) for name, a in accuracy.items()},
            "per_seed": accuracy,
            "test_sequences": len(right["structured"][0]),
            "structured_less_without_decay": {"effect": decay[0], "low": decay[1], "high": decay[2]},
            "parameters": counts,
            "seeds": seeds,
            "steps": steps,
        },
        notes=[
            "The interval is over test sequences; seeds are averaged within one. Sequences of 64 are short for the "
            "method."
        ],
    )
