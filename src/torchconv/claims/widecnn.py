"""Wide networks' claim: what depends on few adjacent variables is learnt at a rate set by these alone."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval

STUDENT = (2, 2, 2)
TEACHERS = {1: (2,), 2: (2, 2), 3: (2, 2, 2)}  # by the layer whose patch the target depends on


@claim(
    key="widecnn",
    says="The kernel of a deep convolutional network adapts to the target's locality: the test error of a target on "
    "one patch of the l-th layer falls at a rate set by that patch's effective dimension, not by the input's, and a "
    "target as deep as the network is cursed by dimension.",
    source="arXiv 2208.01003, theorem on the generalisation error and section on numerical experiments",
    experiment="Inputs of four points of a circle. Kernel regression (ridge 1e-9) with the tangent kernel of filter "
    "sizes 2, 2, 2; targets are Gaussian fields with tangent kernels on one point, on two adjacent ones, and on all "
    "four. Exponents β of the error n^−β fitted from n = 128; paired seeds. Effect: the exponent for one point less "
    "that for all.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Fit exponents of learning curves on the same inputs for all three targets."""
    import torch

    from torchconv.theory.widecnn import learning_curve, learning_exponent, sphere_patches

    seeds, sizes = (12, (64, 128, 256, 512, 1024)) if budget == "quick" else (24, (64, 128, 256, 512, 1024, 2048, 4096))
    exponents: dict[int, list[float]] = {level: [] for level in TEACHERS}
    errors: dict[int, list[Any]] = {level: [] for level in TEACHERS}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x = sphere_patches(max(sizes) + 256, 4, 2, generator=generator)
        for level, teacher in TEACHERS.items():
            part = x[:, : 2**level]
            curve = learning_curve(
                STUDENT, teacher, x, sizes, teacher_inputs=part, draws=4, fit_from=128, generator=generator
            )
            exponents[level].append(curve.exponent)
            errors[level].append(curve.errors.mean(0))
        progress(f"seed {seed}: " + ", ".join(f"β{level} {found[-1]:.3f}" for level, found in exponents.items()))
    mean = {level: sum(found) / len(found) for level, found in exponents.items()}
    expected = {level: learning_exponent(STUDENT, level, 0.5, ridgeless=True) for level in TEACHERS}
    effect, low, high = paired_interval(exponents[1], exponents[3])
    middle = paired_interval(exponents[1], exponents[2]), paired_interval(exponents[2], exponents[3])
    last = {level: float(torch.stack(found).mean(0)[-1]) for level, found in errors.items()}
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="difference of exponents",
        meaning="positive: the error of the local target falls faster than that of the global one",
        measurements={
            "exponents": {str(level): found for level, found in exponents.items()},
            "mean_exponents": {str(level): value for level, value in mean.items()},
            "estimated_exponents": {str(level): value for level, value in expected.items()},
            "errors": {str(level): torch.stack(found).mean(0).tolist() for level, found in errors.items()},
            "sizes": list(sizes),
            "seeds": seeds,
        },
        notes=[
            "Exponents for one, two and four points: "
            + ", ".join(f"{mean[level]:.3f} (spectral estimate {expected[level]:.3f})" for level in TEACHERS)
            + ".",
            "One against two points: {:+.3f} ({:+.3f} to {:+.3f}).".format(*middle[0]),
            "Two against four points: {:+.3f} ({:+.3f} to {:+.3f}).".format(*middle[1]),
            f"Relative errors at n = {max(sizes)}: " + ", ".join(f"{last[level]:.3f}" for level in TEACHERS) + ".",
        ],
    )
