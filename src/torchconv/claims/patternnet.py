"""PatternNet's claim: filters that fire together are representative and discriminative patterns, and sit on objects."""

from __future__ import annotations

from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import cifar_resnet, trained_resnets, without_resnets

PROPOSALS = 5
QUANTILES = (0.9, 0.95, 0.98, 0.99, 0.995)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # with which the networks were trained


@claim(
    key="patternnet",
    says="Filters of the last convolution, combined, give patterns that are representative of a class and tell it from "
    "the others; the patterns are found without sampling patches, classify images, and localise objects.",
    source="arXiv 1703.06339, abstract and section 3",
    experiment="CIFAR-10 ResNet-20, 32, 44, 56 as trained by others, 1000 test images (JPEG copy) for mining, 1000 for "
    "testing. For every class the set of two or three filters, and the single filter, of largest support × confidence "
    "on the mining images, each at the best of five thresholds. Effect: support × confidence on the test images, "
    "sets less single filters, mean over classes and networks. Interval: bootstrap over the test images. Control: sets "
    "from filters ranked at random. Besides: classification by patterns; pointing at, and proposals "
    "for, digits put at random places.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Mine patterns of trained networks; needs the weights in a folder ``cifar10_resnet``."""
    import torch

    from torchconv.data import load, normalise

    files = trained_resnets()
    if not files:
        return without_resnets("support × confidence")
    test = load("cifar10").test
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(test), generator=generator)[:2000]  # the file is sorted by class
    x, y = normalise(test.x[rows].float() / 255, MEAN, DEVIATION), test.y[rows]
    halves = (x[: len(x) // 2], y[: len(x) // 2], x[len(x) // 2 :], y[len(x) // 2 :])
    draws = [torch.arange(len(halves[3]))]
    count = 200 if budget == "quick" else 2000
    draws += [torch.randint(len(halves[3]), (len(halves[3]),), generator=generator) for _ in range(count)]
    effects = torch.zeros(len(draws), dtype=torch.float64)
    networks = {}
    for depth, path in files.items():
        found, difference = _network(cifar_resnet(depth, path), halves, draws)
        networks[f"ResNet-{depth}"] = found
        effects += difference / len(files)
        progress(f"ResNet-{depth}: sets {found['sets']['worth']:.3f}, single {found['single']['worth']:.3f}")
    low, high = effects[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    pointing = _digits(budget)
    progress(f"digits: pointing {pointing['pointing']:.3f}, by chance {pointing['chance']:.3f}")
    means = {
        kind: {k: sum(n[kind][k] for n in networks.values()) / len(networks) for k in ("support", "confidence")}
        for kind in ("sets", "single", "random")
    }
    said = "; ".join(f"{k}: {v['support']:.2f} and {v['confidence']:.2f}" for k, v in means.items())
    by = {k: sum(n["accuracy"][k] for n in networks.values()) / len(networks) for k in ("patterns", "head", "network")}
    return Evidence(
        effect=float(effects[0]),
        low=low,
        high=high,
        unit="support × confidence",
        meaning="positive: filters that fire together are better patterns than the best single filters",
        measurements={"networks": networks, "means": means, "digits": pointing, "bootstrap_samples": count},
        notes=[
            f"Support and confidence on test images, mean over networks: {said}.",
            f"Mean accuracy: patterns alone {by['patterns']:.2f}, the fitted head {by['head']:.2f}, the networks "
            f"themselves {by['network']:.2f}.",
            f"Digits: the best position lies on the digit in {pointing['pointing']:.2f} of the images that show the "
            f"pattern of their class, {pointing['chance']:.2f} by chance; one of five proposals has an IoU "
            f"of 0.5 with the digit in {pointing['recall']:.2f} of all, one of five random boxes of its size in "
            f"{pointing['recall_by_chance']:.2f}.",
            "The networks stay as they were trained; the paper trains the head along with the network.",
            "The competing patch-mining systems, and their time, were not measured.",
        ],
    )


def _network(model: Any, halves: Any, draws: list[Any]) -> tuple[dict[str, Any], Any]:
    """What was measured for one network, and sets less single filters for every draw of test images."""
    import torch

    from torchconv.analysis.patternnet import (
        FeatureMaps,
        PatternNetHead,
        bag_of_patterns,
        classify_by_patterns,
        fit_head,
        largest_responses,
        mine_patterns,
    )

    x, y, test_x, test_y = halves
    maps = FeatureMaps(model, x)
    test_maps = FeatureMaps(model, test_x, maps.layer)
    responses = largest_responses(maps)
    head = fit_head(responses, y, 10)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        chance = PatternNetHead(responses.shape[1], 10)
        logits, own = head.fc(head.gate(largest_responses(test_maps))), model(test_x)
    shown = {
        "sets": _best(maps, y, test_maps, head, (2, 3)),
        "single": _best(maps, y, test_maps, head, (1, 1)),
        "random": _best(maps, y, test_maps, chance, (2, 3)),
    }
    found = {kind: _held_out(present, test_y, draws[0]) for kind, present in shown.items()}
    mining = mine_patterns(maps, y, head, sizes=(2, 3), quantile=0.95)
    accuracy = {
        "network": float((own.argmax(1) == test_y).float().mean()),
        "head": float((logits.argmax(1) == test_y).float().mean()),
        "patterns": classify_by_patterns(bag_of_patterns(maps, mining), y, bag_of_patterns(test_maps, mining), test_y),
        "count": len(mining.patterns),
    }
    worth = [[_held_out(shown[kind], test_y, d)["worth"] for kind in ("sets", "single")] for d in draws]
    difference = torch.tensor(worth, dtype=torch.float64)
    return {**found, "accuracy": accuracy}, difference[:, 0] - difference[:, 1]


def _best(maps: Any, y: Any, test_maps: Any, head: Any, sizes: tuple[int, int]) -> Any:
    """(T, 10): in which test images the best pattern of every class is present, chosen on the mining images."""
    import torch

    from torchconv.analysis.patternnet import Mining, mine_patterns

    best: dict[int, tuple[float, Any, Any]] = {}
    for quantile in QUANTILES:
        mining = mine_patterns(maps, y, head, sizes=sizes, quantile=quantile, max_overlap=1)
        for c in range(10):
            for pattern in mining.of(c)[:1]:
                worth = pattern.support * pattern.confidence
                if worth > best.get(c, (0.0,))[0]:
                    best[c] = (worth, pattern, mining.thresholds)
    present = torch.zeros(len(test_maps), 10, dtype=torch.bool)
    for c, (_, pattern, thresholds) in best.items():
        present[:, c] = Mining([pattern], thresholds).locate(test_maps).present[:, 0]
    return present


def _held_out(present: Any, labels: Any, rows: Any) -> dict[str, float]:
    """Support, confidence and their product of the classes' patterns, mean over the classes."""
    from torchconv.analysis.patternnet import supports

    shares = supports(present[rows], labels[rows], 10)
    support = shares.diagonal()
    confidence = support / shares.sum(1).clamp_min(1e-12)
    return {
        "support": float(support.mean()),
        "confidence": float(confidence.mean()),
        "worth": float((support * confidence).mean()),
    }


def _digits(budget: str) -> dict[str, float]:
    """A small network with the head, trained on digits at random places: do its patterns point at them?"""
    import torch
    from torch import nn

    from torchconv.analysis.patternnet import PatternNetHead, basic_patterns, mine_patterns, propose, receptive_field
    from torchconv.claims._support import random_batches, test_accuracy, train
    from torchconv.data import load

    data = load("digits")
    generator = torch.Generator().manual_seed(0)
    x, _ = _canvas(data.train.x, generator)
    test_x, corners = _canvas(data.test.x, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        head = PatternNetHead(48, 10, scale=2.0)
    model = nn.Sequential(body, head)
    draw = random_batches(x, data.train.y, 64, 0)

    def loss() -> Any:
        batch, labels = draw()
        return nn.functional.cross_entropy(model(batch), labels)

    train(model, loss, steps=240 if budget == "quick" else 1000, lr=5e-3)
    with torch.no_grad():
        maps, test_maps = body(x), body(test_x)
    mining = basic_patterns(maps, data.train.y, head)
    geometry = receptive_field(body, x[:1])
    at = mining.locate(test_maps, geometry)
    own = torch.tensor([[p.label for p in mining.patterns]]) == data.test.y[:, None]
    hits, chance, total = 0.0, 0.0, 0
    size = test_maps.shape[2:]
    everywhere = geometry.centres(torch.arange(size.numel()), size)
    for image, pattern in (own & at.present).nonzero().tolist():
        corner = corners[image]
        inside = ((everywhere >= corner) & (everywhere <= corner + 7)).all(1)
        hits += float(inside[at.position[image, pattern]])
        chance += float(inside.float().mean())
        total += 1
    sets = mine_patterns(maps, data.train.y, head, sizes=(2, 3), quantile=0.95)
    boxes = [p.boxes[:PROPOSALS] for p in propose(test_maps, sets, geometry.shrunk(0.8))]
    anywhere = [torch.randint(17, (PROPOSALS, 2), generator=generator).double() for _ in boxes]
    return {
        "recall": _recall(boxes, corners),
        "recall_by_chance": _recall([torch.cat([low, low + 7], 1) for low in anywhere], corners),
        "accuracy": test_accuracy(model, test_x, data.test.y),
        "patterns": len(mining.patterns),
        "support": sum(p.support for p in mining.patterns) / max(1, len(mining.patterns)),
        "pointing": hits / max(1, total),
        "chance": chance / max(1, total),
    }


def _recall(boxes: list[Any], corners: Any) -> float:
    """Share of the images whose digit of 8 × 8 pixels has an IoU of at least 0.5 with one of the boxes."""
    from torchconv.analysis.patternnet import iou

    digits = [corner.double().repeat(2) + corner.new_tensor([0, 0, 7, 7]) for corner in corners]
    hits = [bool((iou(b, digit) >= 0.5).any()) for b, digit in zip(boxes, digits, strict=True)]
    return sum(hits) / len(hits)


def _canvas(digits: Any, generator: Any) -> tuple[Any, Any]:
    """Digits of 8 × 8 pixels on a noisy ground of 24 × 24, and their corners (x, y)."""
    import torch

    ground = 0.3 * torch.rand(len(digits), 1, 24, 24, generator=generator)
    corners = torch.randint(17, (len(digits), 2), generator=generator)
    for picture, digit, (left, top) in zip(ground, digits, corners.tolist(), strict=True):
        picture[:, top : top + 8, left : left + 8] += digit.float() / 255
    return ground, corners
