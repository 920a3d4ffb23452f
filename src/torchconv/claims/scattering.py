"""Scattering's claim: features of deeper layers are less changed by a shift, whatever filters and non-linearities."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim

SIZE, DEPTH, SHIFT = 32, 3, 1
FAMILIES = ("wavelet", "curvelet", "haar", "weyl-heisenberg", "random")
NONLINEARITIES = ("modulus", "relu", "tanh", "logsig")


@claim(
    key="scattering",
    says="With pooling, the features of a deep convolutional network become more translation invariant from layer to "
    "layer, for any filters, Lipschitz non-linearities and poolings; the network is non-expansive throughout.",
    source="arXiv 1512.06293, theorems on vertical translation invariance and on deformations",
    experiment=f"Digits enlarged to {SIZE} × {SIZE}, shifted by {SHIFT} pixel. Admissible networks of {DEPTH} layers "
    "with averaging pooling by 2: wavelets, curvelets, Haar, Gabor and random complex filters, each with modulus, "
    "ReLU, tanh and logistic non-linearity; low-pass output atoms. Effect: the change of the features relative to the "
    "norm of the image, as in the theorem, at the input's low-pass less that at the last layer.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Measure the change by layer for every network, and the accuracy of a linear classifier on few labels."""
    import torch

    from torchconv.theory.scattering import decay_constant, translation_bound

    images = 12 if budget == "quick" else 60
    x, y = _digits(SIZE)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    f = x[order[:images]].double()
    gains, own, changes, ratios = [], [], {}, {"distance": 0.0, "energy": 0.0, "translation": 0.0}
    for family in FAMILIES:
        for nonlinearity in NONLINEARITIES:
            net = _network(family, nonlinearity)
            features, moved = net(f), net(f.roll(SHIFT, -1))
            steps = [_norm(b - a) for a, b in zip(features, moved, strict=True)]
            change = 100 * torch.stack([s / _norm(f) for s in steps])
            relative = 100 * torch.stack([s / _norm(a) for s, a in zip(steps, features, strict=True)])
            changes[f"{family}, {nonlinearity}"] = [float(c) for c in relative.mean(1)]
            gains.append((change[0] - change[-1]).mean())
            own.append((relative[0] - relative[-1]).mean())
            total = sum(_norm(a[1:] - a[:-1]) ** 2 for a in features) ** 0.5
            outputs = [*(layer.output for layer in net.layers), net.output]
            even_steps = net(f.roll(2**DEPTH, -1))  # by a multiple of all pooling factors, so that grids move along
            bounds = [translation_bound([2] * n, 2**DEPTH, decay_constant(o)) for n, o in enumerate(outputs)]
            found = {
                "distance": total / _norm(f[1:] - f[:-1]),
                "energy": sum(_norm(a) ** 2 for a in features) / _norm(f) ** 2,
                "translation": torch.stack(
                    [
                        _norm(b - a) / _norm(f) / max(bound, 1e-9)  # the last output can be the mean alone, of bound 0
                        for a, b, bound in zip(features, even_steps, bounds, strict=True)
                    ]
                ),
            }
            ratios = {name: max(ratios[name], float(values.max())) for name, values in found.items()}
            progress(f"{family}, {nonlinearity}: " + " → ".join(f"{c:.3g} %" for c in change.mean(1)))
    gain = torch.stack(gains)
    half_width = 1.96 * float(gain.std()) / len(gain) ** 0.5
    accuracy = _accuracy(x, y, 2 if budget == "quick" else 10)
    effect = float(gain.mean())
    odd = [float(o) for o, name in zip(own, changes, strict=True) if "tanh" in name or "logsig" in name]
    even = [float(o) for o, name in zip(own, changes, strict=True) if "modulus" in name or "relu" in name]
    return Evidence(
        effect=effect,
        low=effect - half_width,
        high=effect + half_width,
        unit="% of the norm of the image",
        meaning="positive: a shift changes the features of the last layer by less than those of the first",
        measurements={
            "change_relative_to_own_norm_by_layer": changes,
            "networks": len(gains),
            "more_invariant": sum(float(g) > 0 for g in gains),
            "more_invariant_relative_to_own_norm": sum(float(o) > 0 for o in own),
            "largest_ratio_to_the_bound": ratios,
            "accuracy": accuracy,
            "images": images,
        },
        notes=[
            f"{sum(float(g) > 0 for g in gains)} of {len(gains)} networks; the interval is over networks.",
            "Bounds hold in all of them; largest ratio of distances {distance:.4f}, of energies {energy:.4f}, of "
            "changes to the translation bound, for shifts by 8 pixels, {translation:.4f}. For shifts that are no "
            "multiple of the pooling factors, sampling on a grid does not follow the theorem.".format(**ratios),
            "Relative to the features' own norm, which the theorems say nothing of, "
            f"{sum(e > 0 for e in even)} of {len(even)} networks with modulus or ReLU became more invariant, and "
            f"{sum(o > 0 for o in odd)} of {len(odd)} with the odd tanh or logistic: there oscillations stay "
            "oscillations, so that the averages vanish rather than become invariant.",
            "Digits at 16 × 16, logistic regression: " + "; ".join(f"{k} {v:.3f}" for k, v in accuracy.items()) + ".",
        ],
    )


def _digits(size: int) -> tuple[Any, Any]:
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    return F.interpolate(images, (size, size), mode="bilinear").squeeze(1), torch.tensor(raw.target)


def _network(family: str, nonlinearity: str) -> Any:
    """Averaging pooling by 2 in every layer; random filters of 7 × 7 beside the wavelets' low-pass."""
    import torch

    from torchconv.theory.scattering import FrameLayer, FrameNetwork, frame_network, make_admissible

    scale = 2 if family in ("weyl-heisenberg", "curvelet") else 3
    base = "wavelet" if family == "random" else family
    net = frame_network(
        base, (SIZE, SIZE), DEPTH, scale=scale, wedges=4, nonlinearity=nonlinearity, step=2, average=True
    )
    if family != "random":
        return make_admissible(net)[0]
    generator = torch.Generator().manual_seed(0)
    layers = []
    for layer in net.layers:
        n = layer.size[0]
        kernels = torch.randn(4, min(7, n), min(7, n), generator=generator, dtype=torch.complex128)
        atoms = torch.fft.fft2(kernels, s=(n, n))
        atoms = atoms / atoms.abs().square().sum(0).max().sqrt()
        layers.append(FrameLayer(atoms, layer.output, nonlinearity, 2, layer.pooling))
    return make_admissible(FrameNetwork(tuple(layers), net.output))[0]


def _norm(features: Any) -> Any:
    """Of every image: (images,)."""
    return features.abs().square().flatten(1).sum(1).sqrt()


def _accuracy(x: Any, y: Any, repeats: int) -> dict[str, float]:
    """A linear classifier on scattering coefficients and on pixels, few labels, test images shifted or not."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from torchconv.ops.scattering import Scattering2d

    small, _ = _digits(16)
    layer = Scattering2d(16, 2, 6)
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(-2, 3, (len(small), 2), generator=generator).tolist()
    padded = F.pad(small, (2, 2, 2, 2))
    moved = torch.stack([p[2 + i : 18 + i, 2 + j : 18 + j] for p, (i, j) in zip(padded, steps, strict=True)])
    with torch.no_grad():
        sets = {
            "scattering": [layer(v).flatten(1).numpy() for v in (small, moved)],
            "pixels": [v.flatten(1).numpy() for v in (small, moved)],
        }
    found: dict[str, list[float]] = {}
    for repeat in range(repeats):
        order = torch.randperm(len(small), generator=torch.Generator().manual_seed(repeat)).numpy()
        for name, (plain, shifted) in sets.items():
            for labels in (50, 300):
                known, unseen = order[:labels], order[labels:]
                model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=200))
                model.fit(plain[known], y[known].numpy())
                for place, data in (("", plain), (", shifted by up to 2", shifted)):
                    score = float(np.mean(model.predict(data[unseen]) == y[unseen].numpy()))
                    found.setdefault(f"{name}, {labels} labels{place}", []).append(score)
    return {name: sum(scores) / len(scores) for name, scores in found.items()}
