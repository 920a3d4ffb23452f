"""CNN Filter DB's claim: filters trained on one task share a distribution; metrics show which layers are degenerate."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import trained_resnets, without_resnets

PRUNED = 0.7
OTHERS = {"VDSR (super-resolution)": "vdsr_291.safetensors", "DnCNN (denoising)": "dncnn_25.pth"}


@claim(
    key="filterdb",
    says="The 3 × 3 filters of networks trained on one task and data set have nearly one distribution, whatever their "
    "depth, far from that of random filters; sparsity and entropy of the variance show which layers are degenerate.",
    source="arXiv 2203.15331, sections 4 (shift) and 5 (degeneration)",
    experiment="CIFAR-10 ResNet-20, 32, 44, 56 as trained by others, against random normal filters of the same shapes, "
    "one common basis and range, 70 bins. Effect: mean shift D between trained and random networks less the mean shift "
    "between trained ones. Interval: bootstrap over the layers of every network. Besides: verdicts on trained and "
    "random layers and on trained ones with the smallest 70 % of each layer's filters set to zero.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Compare trained, random and pruned filters; needs the weights in a folder ``cifar10_resnet``."""
    import numpy as np

    from torchconv.analysis.filterdb import inspect_filters, layers, study
    from torchconv.weights import read_state

    files = trained_resnets()
    if len(files) < 4:
        return without_resnets("symmetric KL divergence D")
    trained = {f"ResNet-{d}": read_state(path) for d, path in files.items()}
    trained = {n: {k: t for k, t in s.items() if t.dim() == 4} for n, s in trained.items()}
    noise = {f"random {n}": _random(s, seed) for seed, (n, s) in enumerate(trained.items())}
    pruned = {f"pruned {n}": _pruned(s) for n, s in trained.items()}
    rows = {n: [x.filters for x in layers(s)] for n, s in (trained | noise).items()}
    found = study(rows)
    counts = {n: _layer_counts(found, pieces) for n, pieces in rows.items()}
    effects = [_effect(counts, found, tuple(trained), tuple(noise))]
    draw = np.random.default_rng(0)
    for k in range(200 if budget == "quick" else 2000):
        again = {n: c[draw.integers(len(c), size=len(c))] for n, c in counts.items()}
        effects.append(_effect(again, found, tuple(trained), tuple(noise)))
        if k % 100 == 99:
            progress(f"{k + 1} samples of layers: effect {effects[0]:.3f}, last {effects[-1]:.3f}")
    low, high = np.quantile(effects[1:], [0.025, 0.975])
    reports = {n: inspect_filters(s) for n, s in (trained | noise | pruned).items()}
    kinds = {"trained": trained, "random": noise, "pruned": pruned}
    verdicts = {k: dict(Counter(r.verdict for n in names for r in reports[n].layers)) for k, names in kinds.items()}
    progress(f"verdicts: {verdicts}")
    others = _others(found)
    lows = {n: [r.layer.name for r in reports[n].layers if r.verdict == "low diversity"] for n in trained}
    return Evidence(
        effect=effects[0],
        low=float(low),
        high=float(high),
        unit="symmetric KL divergence D",
        meaning="positive: trained networks are nearer to each other than to random filters",
        measurements={
            "shift": {
                "between_trained": _mean(found, itertools.combinations(trained, 2)),
                "largest_between_trained": max(found.between(a, b) for a, b in itertools.combinations(trained, 2)),
                "trained_to_random": _mean(found, itertools.product(trained, noise)),
                "between_random": _mean(found, itertools.combinations(noise, 2)),
                "trained_to_other_tasks": others,
            },
            "filters": dict(zip(found.names, found.sizes, strict=True)),
            "explained_variance_ratio": [round(float(a), 4) for a in found.basis.ratio],
            "verdicts": verdicts,
            "low_diversity_layers": lows,
            "entropy": {n: round(r.mean(), 4) for n, r in reports.items()},
            "sparsity": {n: round(r.mean("sparsity"), 4) for n, r in reports.items()},
            "bootstrap_samples": len(effects) - 1,
        },
        notes=[
            "Four networks of one family, one task and one training recipe: the paper's 647 models are not here.",
            "A bootstrap that draws a layer twice makes small groups, whose shift is larger: the interval is cautious.",
            "Cut-offs of the verdicts are torchconv's; the paper gives the metrics and the random level.",
            *([] if others else ["No folder sr_denoise_weights was found: networks of other tasks were left out."]),
        ],
    )


def _random(state: dict[str, Any], seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) for n, t in state.items()}


def _pruned(state: dict[str, Any]) -> dict[str, Any]:
    """The filters of smallest magnitude of every layer set to zero."""
    changed = {}
    for name, weight in state.items():
        peaks = weight.abs().amax((2, 3), keepdim=True)
        changed[name] = weight * (peaks > peaks.flatten().quantile(PRUNED))
    return changed


def _layer_counts(found: Any, pieces: list[Any]) -> Any:
    """(layers, taps, bins) counts, whose sums over layers are the network's."""
    import numpy as np

    from torchconv.analysis.filterdb import Histogram

    counts = []
    for rows in pieces:
        histogram = Histogram(found.basis, found.x_range, found.counts.shape[-1])
        histogram.update(rows)
        counts.append(histogram.counts)
    return np.stack(counts)


def _effect(counts: dict[str, Any], found: Any, trained: tuple[str, ...], noise: tuple[str, ...]) -> float:
    from torchconv.analysis.filterdb import probabilities, shift

    h = {n: probabilities(c.sum(0), found.x_range) for n, c in counts.items()}
    apart = [shift(h[a], h[b], found.weights) for a, b in itertools.product(trained, noise)]
    within = [shift(h[a], h[b], found.weights) for a, b in itertools.combinations(trained, 2)]
    return sum(apart) / len(apart) - sum(within) / len(within)


def _mean(found: Any, pairs: Any) -> float:
    values = [found.between(a, b) for a, b in pairs]
    return sum(values) / len(values)


def _others(found: Any) -> dict[str, float]:
    """Shift of networks of other tasks to ResNet-56, in the basis and range of the study."""
    from torchconv.analysis.filterdb import Histogram, layers, shift
    from torchconv.data.named import places
    from torchconv.weights import read_state

    shifts = {}
    for name, file in OTHERS.items():
        paths = [p / "sr_denoise_weights" / file for p in places(None)]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            continue
        histogram = Histogram(found.basis, found.x_range, found.counts.shape[-1])
        histogram.update([x.filters for x in layers(read_state(path))])
        shifts[name] = shift(histogram.probabilities(), found.histograms[found.names.index("ResNet-56")], found.weights)
    return shifts
