"""The claim of the cross-species comparison: early blocks of frozen networks see human and cat pictures alike."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import cifar_resnet, trained_resnets, without_resnets

LUMINANCE = (0.299, 0.587, 0.114)
BLURS = (0.0, 0.5, 1.0)


@claim(
    key="cka",
    says="Shown pictures as a human and as a cat sees them, frozen encoders represent the two alike, most so in early "
    "blocks, and less with depth.",
    source="arXiv 2511.02404, layer-wise results (peak at early blocks for the most aligned encoder)",
    experiment="CIFAR-10 ResNet-20, 32, 44, 56 as trained by others, test images (JPEG copy) and the same through a "
    "model of a cat's eye: red and green become one, colours pale, blur of 0, 0.5 or 1 pixel. Unbiased linear CKA, RBF "
    "CKA and RSA of every block, features averaged over positions. Effect: mean CKA of the first third of the blocks "
    "less that of the last third, averaged over the networks, at the blur where it is smallest. Interval: from random "
    "halves of the images. Control: pictures paired wrongly.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Profiles over blocks of trained networks; needs the weights in a folder ``cifar10_resnet``."""
    import torch

    from torchconv.analysis.cka import blocks, compare_layers, features
    from torchconv.data import load, normalise

    files = trained_resnets()
    if not files:
        return without_resnets("CKA")
    draws, count = (40, 300) if budget == "quick" else (200, 2000)
    test = load("cifar10").test
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(test), generator=generator)[:count]  # the file is sorted by class
    pictures, labels = test.x[chosen].float() / 255, test.y[chosen]
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # with which the networks were trained
    views = {blur: normalise(cat_view(pictures, blur), mean, deviation) for blur in BLURS}
    human = normalise(pictures, mean, deviation)
    halves = [torch.randperm(len(human), generator=generator)[: len(human) // 2] for _ in range(draws)]
    networks = {depth: cifar_resnet(depth, path) for depth, path in files.items()}
    found: dict[str, Any] = {}
    drops: dict[float, list[Any]] = {blur: [] for blur in BLURS}
    spreads: dict[float, list[Any]] = {blur: [] for blur in BLURS}
    for depth, model in networks.items():
        names = [n for n in blocks(model) if n.startswith("layer")]
        wanted = [*names, "linear"]
        x = features(model, human, wanted, batch_size=100)
        here: dict[str, Any] = {"accuracy": _accuracy(x.pop("linear"), labels)}
        found[f"ResNet-{depth}"] = here
        for blur, cat in views.items():
            y = features(model, cat, wanted, batch_size=100)
            accuracy = _accuracy(y.pop("linear"), labels)
            here[f"blur {blur}"] = {"accuracy": accuracy, **_profiles(x, y, halves[0])}
            drops[blur].append(_drop(x, y, slice(None)))
            spreads[blur].append(torch.stack([_drop(x, y, rows) for rows in halves]))
            progress(f"ResNet-{depth}, blur {blur}: first third above last third by {float(drops[blur][-1]):.3f}")
    means = {blur: float(torch.stack(d).mean()) for blur, d in drops.items()}
    least = min(BLURS, key=lambda blur: means[blur])
    half_width = 1.96 * float(torch.stack(spreads[least]).mean(0).std())
    drops_said = ", ".join(f"{value:+.3f} at {blur}" for blur, value in means.items())
    seen = {key: [v if key == "accuracy" else v["accuracy"] for v in (n[key] for n in found.values())]
            for key in ("accuracy", *(f"blur {b}" for b in BLURS))}  # fmt: skip
    said = {"accuracy": "as they are"}
    accuracies_said = ", ".join(f"{sum(v) / len(v):.2f} {said.get(k, k)}" for k, v in seen.items())
    first, last = min(networks), max(networks)
    table = compare_layers(networks[first], networks[last], human, batch_size=150)
    stages = [a[:6] == b[:6] for a, b, _ in table.best() if a.startswith("layer")]
    return Evidence(
        effect=means[least],
        low=means[least] - half_width,
        high=means[least] + half_width,
        unit="CKA",
        meaning="positive: early blocks agree more on the two views than late ones",
        measurements={
            "drop_by_blur": {str(blur): value for blur, value in means.items()},
            "networks": found,
            "images": len(human),
            "draws": draws,
            "best_partner_in_same_stage": {"from": first, "to": last, "share": sum(stages) / len(stages)},
        },
        notes=[
            "The paper's encoders (ImageNet CNNs, supervised and DINO ViTs) and its filter are not here: this tests "
            "the fall with depth on small CNNs and a filter of our own, not the order of the architectures.",
            f"First third less last third by blur: {drops_said}. Mean accuracy: {accuracies_said}. The networks' own "
            "invariance to the view decides the sign more than depth does.",
            "The interval is over images, for these networks.",
        ],
    )


def cat_view(pictures: Any, blur: float) -> Any:
    """A cat's colours and acuity, roughly: two cone types, pale colours, a Gaussian blur; (N, 3, H, W) in [0, 1]."""
    import torch
    from torch.nn import functional

    red, green, blue = pictures.unbind(1)
    both = (red + green) / 2
    two = torch.stack([both, both, blue], 1)
    grey = (two * two.new_tensor(LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True)
    pale = 0.5 * two + 0.5 * grey
    if not blur:
        return pale
    taps = torch.exp(-torch.arange(-3, 4).square() / (2 * blur**2))
    taps = taps / taps.sum()
    kernel = (taps[:, None] * taps).expand(3, 1, 7, 7)
    return functional.conv2d(functional.pad(pale, (3, 3, 3, 3), mode="replicate"), kernel, groups=3)


def _accuracy(scores: Any, labels: Any) -> float:
    return float((scores.argmax(1) == labels).float().mean())


def _drop(x: dict[str, Any], y: dict[str, Any], rows: Any) -> Any:
    """Mean CKA of the first third of the blocks less that of the last third, on some of the images."""
    profile = _profile(x, y, rows)
    third = len(profile) // 3
    return profile[:third].mean() - profile[-third:].mean()


def _profiles(x: dict[str, Any], y: dict[str, Any], half: Any) -> dict[str, Any]:
    """The blocks' scores by every measure, and the largest score of wrongly paired pictures."""
    import torch

    from torchconv.analysis.cka import MEASURES

    profile = _profile(x, y, slice(None))
    rolled = {n: v.roll(1, 0) for n, v in y.items()}
    rsa = torch.stack([MEASURES["rsa-spearman"](x[n][half], y[n][half]) for n in x])
    rbf = torch.stack([MEASURES["rbf"](x[n], y[n]) for n in x])
    return {
        "cka_linear": profile.tolist(),
        "cka_rbf": rbf.tolist(),
        "rsa_on_half": rsa.tolist(),
        "peak_block": list(x)[int(profile.argmax())],
        "wrongly_paired_largest": float(_profile(x, rolled, slice(None)).abs().max()),
    }


def _profile(x: dict[str, Any], y: dict[str, Any], rows: Any) -> Any:
    import torch

    from torchconv.analysis.cka import cka

    return torch.stack([cka(x[n][rows], y[n][rows]) for n in x])
