"""The survey's subject at a desk: are filters learned without labels a better start than random ones, and which?"""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval, test_accuracy, train

TRAIN = 1297
METHODS = ("he_normal", "gaussian", "xavier_normal", "orthogonal", "lsuv", "dct", "gabor", "pca", "spherical_kmeans")
DEPTH_METHODS = ("gaussian", "xavier_normal", "he_normal", "orthogonal", "lsuv")


@claim(
    key="filterdesign",
    says="The initial filters of a network matter where labels are few, and filters learned from images without labels "
    "are a better start than random ones.",
    source="arXiv 2410.21644, the sections on initialisation and on unsupervised learning of filters",
    experiment="Digits (8 × 8): 100 labelled images drawn anew for each seed, 1297 without labels, 500 to test. Two "
    "3 × 3 convolutions (32 and 64 filters), pooling, a linear layer that is the same for all methods; AdamW. "
    "Effect: test accuracy when the convolutions start from spherical k-means less that when they start from He's law, "
    "paired over seeds. Beside it: seven other starts, linear SVMs on fixed features, the signal after 20 layers.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Train the network from every start, on the same labelled images."""
    import torch
    import torch.nn.functional as F

    from torchconv.initializers import init

    seeds, steps = (10, 120) if budget == "quick" else (30, 240)
    x, y = _digits()
    x_test, y_test = x[TRAIN:], y[TRAIN:]
    accuracy: dict[str, list[float]] = {m: [] for m in METHODS}
    before: dict[str, list[float]] = {m: [] for m in METHODS}
    for seed in range(seeds):
        rows = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(1000 + seed))[:100]
        for method in METHODS:
            model = _network(seed)
            init(model, method, data=x[:TRAIN], seed=seed, layers=["0", "3"])

            def loss(model: Any = model, rows: Any = rows) -> Any:
                return F.cross_entropy(model(x[rows]), y[rows])

            before[method].append(float(loss().detach()))
            train(model, loss, steps=steps, lr=3e-3)
            accuracy[method].append(test_accuracy(model, x_test, y_test))
        progress(f"seed {seed}: " + ", ".join(f"{m} {accuracy[m][-1]:.3f}" for m in METHODS))
    random = "he_normal"
    effect, low, high = paired_interval(accuracy["spherical_kmeans"], accuracy[random], 100)
    others = {m: paired_interval(accuracy[m], accuracy[random], 100) for m in METHODS if m != random}
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="points of test accuracy",
        meaning="positive: filters from spherical k-means end higher than He's random ones",
        measurements={
            "accuracy": {m: sum(v) / len(v) for m, v in accuracy.items()},
            "less_he_normal": {m: {"mean": v[0], "low": v[1], "high": v[2]} for m, v in others.items()},
            "loss_at_the_start": {m: sum(v) / len(v) for m, v in before.items()},
            "svm_accuracy": _svms(x, y),
            "mean_square_after_20_layers": _depth(),
            "seeds": seeds,
            "steps": steps,
        },
        notes=[
            "Intervals are Student's, over seeds, each with its own labelled images; they are not corrected for the "
            "number of methods.",
            "LSUV gives the layers the same variance as learned filters: what it lacks is not the scale.",
            "The second layer learns its filters from what the first one gives, also without labels.",
        ],
    )


def _digits() -> tuple[Any, Any]:
    import torch
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(raw.target)[order]


def _network(seed: int) -> Any:
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 10),
        )


def _svms(x: Any, y: Any) -> dict[str, float]:
    """Linear SVMs on pixels, on PCANet's features and on soft-thresholded responses summed over quadrants."""
    import torch
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    from torchconv import initializers as ti

    net = ti.PCANet(3, 6, 6, block=4, overlap=0.5).fit(x[:TRAIN])
    generator = torch.Generator().manual_seed(0)
    rows = ti.contrast_normalise(ti.patches(x, 4))
    used = ti.patches(x[:TRAIN], 4).shape[0]
    white = ti.zca(rows[:used])(rows)
    start = torch.randn(48, 16, generator=generator)
    banks = {
        "random filters": start / start.norm(dim=1, keepdim=True),
        "spherical k-means": ti.spherical_kmeans(white[:used], start, 10, reseed=generator)[0],
    }
    features = {"pixels": x.flatten(1), "PCANet": net.transform(x)}
    for name, bank in banks.items():
        response = white @ bank.T
        codes = torch.cat([(response - 0.25).clamp_min(0), (-response - 0.25).clamp_min(0)], 1)
        maps = codes.reshape(len(x), 5, 5, -1).permute(0, 3, 1, 2)
        features[name] = torch.nn.functional.adaptive_avg_pool2d(maps, 2).flatten(1)
    scores = {}
    for name, f in features.items():
        svm = LinearSVC(C=0.01, random_state=0)
        # PCANet's counts are taken as they are, as in its paper; rare codes would weigh too much otherwise.
        classifier = svm if name == "PCANet" else make_pipeline(StandardScaler(), svm)
        classifier.fit(f[:TRAIN].numpy(), y[:TRAIN].numpy())
        scores[name] = float(classifier.score(f[TRAIN:].numpy(), y[TRAIN:].numpy()))
    return scores


def _depth() -> dict[str, float]:
    """Mean square of the signal after 20 layers with ReLU, 1 at the start."""
    import torch
    from torch import nn

    from torchconv.initializers import init

    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    found = {}
    for method in DEPTH_METHODS:
        layers: list[nn.Module] = []
        for _ in range(20):
            layers += [nn.Linear(256, 256), nn.ReLU()]
        model = init(nn.Sequential(*layers), method, data=x)
        with torch.no_grad():
            found[method] = float(model(x).square().mean())
    return found
