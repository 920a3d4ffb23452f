"""Long convolution's claim: the soft threshold on the taps is what a directly learned long kernel needs."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._sequences import STEPS, WIDTH, image_interval, train_on_digits


@claim(
    key="longconv",
    says="A convolution kernel as long as the sequence, learned tap by tap, does as well as state-space models once a "
    "soft threshold on its taps keeps it simple; without one it does not.",
    source="arXiv 2302.06646, sections 3.1 and 5.1 (table 2)",
    experiment="Digits read as sequences of 64 pixels, 1300 to train on: two residual blocks of width 32, two-sided "
    "long convolution, GLU. The same with threshold 0.003 and without; also the published default, threshold 0.1 and "
    "start 0.002. Effect: accuracy with the threshold less that without, over test sequences.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train networks that differ in the threshold only, on the same data in the same order."""
    import warnings

    from torchconv.ops.longconv import LongConvLayer

    seeds, steps = (3, 250) if budget == "quick" else (8, 1000)
    kinds: dict[str, dict[str, Any]] = {
        "threshold": {"lam": 0.003, "init_std": 0.02},
        "none": {"lam": 0.0, "init_std": 0.02},
        "default of the code": {"lam": 0.1, "init_std": 0.002},
    }
    right: dict[str, list[Any]] = {name: [] for name in kinds}
    live: dict[str, float] = {}
    for seed in range(seeds):
        for name, options in kinds.items():

            def layer(options: dict[str, Any] = options) -> Any:
                return LongConvLayer(WIDTH, STEPS, bidirectional=True, **options)

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the default of the code is warned of, rightly
                found, model = train_on_digits(layer, seed, steps)
            right[name].append(found)
            kernels = [m.kernel for m in model.modules() if isinstance(m, LongConvLayer)]
            live[name] = sum(k.live_taps() for k in kernels) / len(kernels)
            progress(f"seed {seed}: {name} {float(found.mean()):.3f}, {live[name]:.0%} of the taps live")
    effect, low, high = image_interval(right["threshold"], right["none"])
    accuracy = {name: [float(r.mean()) for r in found] for name, found in right.items()}
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="percentage points of accuracy",
        meaning="positive: the soft threshold helps",
        measurements={
            "accuracy": {name: sum(a) / len(a) for name, a in accuracy.items()},
            "per_seed": accuracy,
            "test_sequences": len(right["threshold"][0]),
            "live_taps_after_training": live,
            "seeds": seeds,
            "steps": steps,
        },
        notes=[
            "The interval is over test sequences; seeds are averaged within one. Sequences of 64 are short for the "
            "method.",
            "With the default of the published code no tap is above the threshold at the start, so that none is ever "
            "trained: what is left is the skip connection.",
        ],
    )
