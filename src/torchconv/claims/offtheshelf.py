"""The claim of off-the-shelf features: a linear SVM on a network trained for another task beats what is made for it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import train

WEIGHTS = "imagenet_squeezenet/squeezenet1_0_pruned.safetensors"
CAFFE = (123.0, 117.0, 104.0)  # mean of red, green, blue, taken off values of 0 … 255
PICTURES = ("t91", "kodak", "set5")
PARTS = {"large parts": (0.6, 0.77), "small parts": (0.35, 0.6)}  # shares of width and height


@claim(
    key="offtheshelf",
    says="Features of a network trained to classify ImageNet, frozen, normalised and given to a linear SVM, beat or "
    "match systems made for a task; crude spatial search makes them good at retrieval too.",
    source="arXiv 1403.6382, figure 1, tables of recognition and of retrieval",
    experiment="SqueezeNet 1.0 trained on ImageNet by others (pruned, 1.2 M parameters): mean of the last map, SVMs "
    "one against one, C one over the variance of the features. Task: CIFAR-10, 1,000 training images, enlarged. "
    "Against it, on the same images: the same network with random weights and pixels (linear SVMs both), and a small "
    "residual network trained from scratch with flips and shifts. Effect: mean class accuracy above the best of these, "
    "interval from 1,000 bootstrap samples of the test images. Beside it: few-shot curves (one against all), retrieval "
    "of distorted pictures with levels of patches, whitening.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Transfer of a trained SqueezeNet; needs its weights in a folder ``imagenet_squeezenet`` and CIFAR-10."""
    import torch

    from torchconv.analysis import offtheshelf as lib

    path, cifar = _find(WEIGHTS), _find("cifar10_lossless")
    if path is None or cifar is None:
        return _without()
    quick = budget == "quick"
    tests, side, seeds = (500, 96, 1) if quick else (2000, 128, 3)
    x, y = _cifar(cifar)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    rows, held = order[:1000], order[1000 : 1000 + tests]
    network, images = squeezenet(path), caffe(x)
    kinds = {"trained": lib.extract(network, images[torch.cat([rows, held])], size=side)}
    progress("features of the trained network")
    for seed in range(seeds):
        fresh = lib.random_weights(network, seed)
        kinds[f"random weights {seed}"] = lib.extract(fresh, images[torch.cat([rows, held])], size=side)
        progress(f"features of random weights {seed}")
    kinds["pixels"] = (x[torch.cat([rows, held])] - 0.5).flatten(1)
    truth = y[held]
    found: dict[str, float] = {}
    predictions: dict[str, Any] = {}
    curves = {}
    for name, z in kinds.items():
        C, sets = lib.scaled_C(lib.unit(z[:1000])), (z[:1000], y[rows], z[1000:], truth)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Liblinear")  # the last digits of a machine do not change a share
            result = lib.recognise(*sets, C=C)
            curve = lib.few_shot(*sets, (1, 5, 20, 50), C=C, scheme="one-vs-all", draws=5 if quick else 20)
        found[name], predictions[name] = result.score.value, result.predictions
        curves[name] = {s.shots: [s.score.value, s.score.low, s.score.high] for s in curve}
        progress(f"{name}: {result.score.value:.3f}")
    for seed in range(seeds):
        name = f"from scratch {seed}"
        predictions[name] = _from_scratch(x[rows], y[rows], x[held], seed, 400 if quick else 2000)
        found[name] = float(lib.mean_class_accuracy(predictions[name], truth))
        progress(f"{name}: {found[name]:.3f}")
    best = max((n for n in found if n != "trained"), key=lambda n: found[n])

    def gain(i: torch.Tensor) -> float:
        ours, other = (lib.mean_class_accuracy(predictions[n][i], truth[i]) for n in ("trained", best))
        return 100 * float(ours - other)

    effect = lib.bootstrap(gain, tests)
    measured: dict[str, Any] = {"mean_class_accuracy": found, "best_other": best, "few_shot": curves}
    measured["category_retrieval"] = _categories(kinds["trained"], torch.cat([y[rows], truth]))
    notes = [
        "One network, one task, and opponents that fit a desk: the paper's are specialised systems of 2013 on a dozen "
        "tasks, with OverFeat's 4,096 numbers.",
        "The interval is over test images, for these training images.",
    ]
    said = ", ".join(f"{k} {v:.3f}" for k, v in measured["category_retrieval"].items())
    notes.append(f"Mean average precision of retrieving images of the same class: {said}.")
    pictures = _find("sr_images")
    if pictures is not None:
        measured["instance_retrieval"], note = _instances(network, pictures, quick)
        notes.append(note)
        progress(note)
    if not quick:
        views = lib.sixteen_views()
        some = torch.cat([rows[:500], held[:500]])
        plain, many = (lib.extract(network, images[some], size=side, views=v) for v in (None, views))
        measured["views_of_500_images"] = {
            name: lib.recognise(
                z[:500], y[some[:500]], z[500:], y[some[500:]], C=lib.scaled_C(lib.unit(z[:500]))
            ).score.value
            for name, z in (("one", plain), ("sixteen", many))
        }
    return Evidence(
        effect=effect.value,
        low=effect.low,
        high=effect.high,
        unit="points of accuracy",
        meaning=f"positive: frozen features above the best of the others ({best})",
        measurements=measured,
        notes=notes,
    )


def squeezenet(path: Path) -> Any:
    """torchvision's SqueezeNet 1.0 with the weights of a safetensors file."""
    from torchconv._common import require
    from torchconv.weights import read_state

    model = require("torchvision", "compare").models.squeezenet1_0()
    model.load_state_dict(read_state(path))
    return model.eval()


def caffe(x: Any) -> Any:
    """(N, 3, H, W) red, green, blue in [0, 1] as networks trained in Caffe expect them: BGR, 0 … 255, less the mean."""
    return (255 * x - x.new_tensor(CAFFE).view(3, 1, 1)).flip(-3)


def _find(name: str) -> Path | None:
    from torchconv.data.named import places

    return next((p / name for p in places(None) if (p / name).exists()), None)


def _cifar(folder: Path) -> tuple[Any, Any]:
    """All images of the lossless subset in [0, 1], and their classes."""
    import torch

    from torchconv.data import load

    data = load("cifar10", root=folder)
    splits = (data.train, data.val, data.test)
    return torch.cat([s.x for s in splits]).float() / 255, torch.cat([s.y for s in splits])


def _from_scratch(x: Any, y: Any, test: Any, seed: int, steps: int) -> Any:
    """Predictions of a residual network of eight layers trained on the images alone, with flips and shifts."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from torchconv.compare.nets import BasicBlock

    def convolution(in_channels: int, channels: int, stride: int) -> nn.Module:
        return nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stages = [BasicBlock(convolution, a, b, s, 2) for a, b, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2))]
        start = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        model = nn.Sequential(*start, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        x, test = (2 * (z - 0.5) for z in (x, test))

        def loss() -> Any:
            rows = torch.randint(len(x), (64,))
            dx, dy = torch.randint(9, (2,)).tolist()
            batch = F.pad(x[rows], (4, 4, 4, 4), mode="reflect")[..., dy : dy + 32, dx : dx + 32]
            batch = torch.where(torch.rand(64, 1, 1, 1) < 0.5, batch, batch.flip(-1))
            return F.cross_entropy(model(batch), y[rows])

        train(model, loss, steps=steps, lr=5e-3, weight_decay=0.05)
    with torch.no_grad():
        return torch.cat([model(z).argmax(1) for z in test.split(500)])


def _categories(z: Any, y: Any) -> dict[str, float]:
    """mAP of the last images among the first 1,000, by class, before and after whitening."""
    from torchconv.analysis import offtheshelf as lib

    z, positive = lib.unit(z), y[1000:, None] == y[None, :1000]
    forms = {"L2": z}
    for name, whiten in (("PCA-32", False), ("PCA-32 whitened", True)):
        forms[name] = lib.Postprocess(32, 1.0, whiten).fit(z[:1000])(z)
    return {
        name: float(
            lib.ranking_precision(lib.spatial_search(f[1000:], f[:1000]).ranking, positive, rule="rectangle").mean()
        )
        for name, f in forms.items()
    }


def _instances(network: Any, folder: Path, quick: bool) -> tuple[dict[str, Any], str]:
    """Pictures found again from distorted parts of them, by the whole image and by patches."""
    import numpy as np
    import torch
    from PIL import Image

    from torchconv.analysis import offtheshelf as lib

    files = sorted(p for f in PICTURES for p in (folder / f).rglob("*") if p.suffix in (".png", ".bmp", ".jpg"))
    images = [np.array(Image.open(p).convert("RGB"), dtype=np.float32) / 255 for p in files]
    references = [torch.from_numpy(i).permute(2, 0, 1) for i in images]
    generator = torch.Generator().manual_seed(1)
    levels, of_query = (2, 1) if quick else (3, 2)
    x = lib.unit(lib.extract(network, [caffe(r) for r in references], views=lib.patches(levels), size=112))
    post, own = lib.Postprocess(64).fit(x), torch.eye(len(x))
    found: dict[str, Any] = {"references": len(x)}
    said = []
    for name, sides in PARTS.items():
        queries = [_distorted(r, sides, generator) for r in references]
        q = lib.unit(lib.extract(network, [caffe(r) for r in queries], views=lib.patches(of_query), size=112))
        settings = {
            "whole image": (q[:, :1], x[:, :1]),
            f"{levels} levels of patches": (q[:, :1], x),
            f"{levels} levels, whitened, squared": (post(q[:, :1]), post(x)),
        }
        if of_query > 1:
            settings[f"{levels} levels, {of_query} of the query"] = (q, x)
        each = [
            lib.ranking_precision(lib.spatial_search(a, b).ranking, own, rule="rectangle") for a, b in settings.values()
        ]
        lift = lib.bootstrap(lambda i, gain=each[1] - each[0]: gain[i].mean(), len(x))  # type: ignore[misc]
        scores = {n: float(v.mean()) for n, v in zip(settings, each, strict=True)}
        found[name] = {"map": scores, "lift": [lift.value, lift.low, lift.high]}
        numbers = ", ".join(f"{n} {v:.3f}" for n, v in scores.items())
        said.append(f"from {name}, {numbers}; patches add {lift.value:.3f} [{lift.low:.3f}, {lift.high:.3f}]")
    return found, f"Mean average precision of finding {len(x)} pictures by distorted parts: {'. '.join(said)}."


def _distorted(image: Any, sides: tuple[float, float], generator: Any) -> Any:
    """A part of a share of the sides, turned by up to 15 degrees, in other light and colours, mirrored or not."""
    import torch

    from torchconv.analysis.offtheshelf import View

    u = torch.rand(9, generator=generator).tolist()
    side = sides[0] + (sides[1] - sides[0]) * u[0]
    x, y = u[1] * (1 - side), u[2] * (1 - side)
    view = View((x, y, x + side, y + side), 30 * u[3] - 15, u[4] < 0.5)
    height, width = image.shape[1:]
    part = view(image[None], (max(32, int(height * side)), max(32, int(width * side))))[0]
    gains = torch.tensor([0.85 + 0.3 * v for v in u[5:8]]) * (0.7 + 0.6 * u[8])
    return (part * gains.view(3, 1, 1)).clamp(0, 1)


def _without() -> Evidence:
    return Evidence(
        effect=0.0,
        low=0.0,
        high=0.0,
        unit="points of accuracy",
        meaning="nothing was measured",
        verdict="inconclusive",
        notes=[
            f"The weights or the images are missing, so nothing was measured: put {WEIGHTS} (torchvision's names) and "
            "cifar10_lossless/cifar10_lossless_4k.npz below a folder and name it with $TORCHCONV_DATA."
        ],
    )
