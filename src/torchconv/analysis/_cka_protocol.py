"""One frozen encoder on paired images of two kinds, layer by layer: the cross-species protocol of arXiv 2511.02404.

The paper shows encoders frames as they are and through a model of a cat's eye, and asks at which depth they agree.
Its exact settings are not published; here every measure has its standard definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check
from torchconv.analysis._cka_features import Reduction, features
from torchconv.analysis._cka_kernels import cka
from torchconv.analysis._cka_resample import interval, spearman
from torchconv.analysis._cka_samples import two_sample_test, wasserstein1
from torchconv.analysis.rsa import mantel, rdm
from torchconv.data.folder import SUFFIXES, decode


@dataclass(frozen=True)
class PairedReport:
    """What the protocol found.

    Attributes:
        rows: one a layer: layer, linear and RBF CKA (unbiased), RSA (Spearman) with bootstrap bounds and Mantel p, MMD²
            and energy distance with p, mean 1-Wasserstein distance in pooled standard deviations.
        mean: of each measure over layers; ``peak``: measure → layer where it is largest.
        images: pairs; ``settings``: how features were reduced, permutations, seed.
    """

    rows: list[dict[str, Any]]
    mean: dict[str, float]
    peak: dict[str, str]
    images: int
    settings: dict[str, Any]


def compare_images(
    model: nn.Module,
    images: Tensor,
    partners: Tensor,
    layers: Sequence[str] | None = None,
    *,
    reduction: Reduction | None = None,
    permutations: int = 199,
    draws: int = 200,
    batch_size: int = 64,
    seed: int = 0,
) -> PairedReport:
    """Every measure between a network's features of images and of their partners.

    Args:
        model: a frozen encoder; left as it was.
        images: (N, …), normalised as it expects them.
        partners: the same pictures in another form, in the same order.
        layers: names of modules; blocks by default.
        reduction: of maps and tokens to rows.
        permutations: of the Mantel and two-sample tests.
        draws: of the bootstrap.
        batch_size: images at once.
        seed: of all draws.

    Returns:
        Rows a layer, their means and peaks.

    Raises:
        ValueError: fewer than five pairs, or shapes that differ.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> x = torch.randn(12, 3, 9, 9)
        >>> report = compare_images(net, x, 2 * x, permutations=9, draws=9)
        >>> [row["layer"] for row in report.rows]
        ['0', '2']
    """
    check(images.shape == partners.shape, "partners", tuple(partners.shape), f"must be paired: {tuple(images.shape)}")
    check(len(images) >= 5, "images", len(images), "at least five pairs are needed")
    reduction = reduction or Reduction()
    first, second = (
        features(model, side, layers, reduction=reduction, batch_size=batch_size) for side in (images, partners)
    )
    rows: list[dict[str, Any]] = [
        {"layer": n, **_measure(first[n], second[n], permutations, draws, seed)} for n in first
    ]
    means: dict[str, float] = {}
    peaks: dict[str, str] = {}
    for name in ("cka linear", "cka rbf", "rsa"):
        known = [r for r in rows if math.isfinite(r[name])]
        means[name] = sum(r[name] for r in known) / len(known) if known else math.nan
        peaks[name] = max(known, key=lambda r: r[name])["layer"] if known else ""
    settings = {"reduction": asdict(reduction), "permutations": permutations, "draws": draws, "seed": seed}
    return PairedReport(rows, means, peaks, len(images), settings)


def _measure(x: Tensor, y: Tensor, permutations: int, draws: int, seed: int) -> dict[str, float]:
    agreement = interval(x, y, "rsa-spearman", draws=draws, seed=seed)
    mmd, energy = (two_sample_test(x, y, name, permutations, seed=seed) for name in ("mmd", "energy"))
    deviation = torch.cat([x, y]).std(0)
    moves = deviation > 0
    shift = wasserstein1(x[:, moves], y[:, moves]) / deviation[moves]
    return {
        "cka linear": float(cka(x, y)),
        "cka rbf": float(cka(x, y, "rbf")),
        "rsa": agreement.value,
        "rsa low": agreement.low,
        "rsa high": agreement.high,
        "mantel p": mantel(rdm(x), rdm(y), permutations=permutations, seed=seed).p,
        "mmd2": float(mmd.observed),
        "mmd p": mmd.p,
        "energy": float(energy.observed),
        "energy p": energy.p,
        "wasserstein": float(shift.mean()) if len(shift) else 0.0,
    }


def compare_folders(
    model: nn.Module,
    first: str | Path,
    second: str | Path,
    layers: Sequence[str] | None = None,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    image_size: int = 224,
    **options: Any,
) -> PairedReport:
    """:func:`compare_images` on two folders whose pictures have the same names, whatever their format.

    Args:
        model: a frozen encoder.
        first: folder of pictures.
        second: folder of their partners.
        layers: names of modules; blocks by default.
        transform: (N, 3, S, S) in [0, 1] → what the encoder expects; ImageNet's mean and deviation by default.
        image_size: S: shorter side scaled, then centre crop.
        **options: of :func:`compare_images`.

    Returns:
        As :func:`compare_images`.

    Raises:
        ValueError: pictures without a partner, or unreadable ones.
    """
    files = [_pictures(Path(folder)) for folder in (first, second)]
    alone = sorted(set(files[0]) ^ set(files[1]))
    check(not alone, "second", str(second), f"{len(alone)} pictures such as {alone[:1]} have no partner")
    loaded = [transform_or_default(_load(list(side.values()), image_size), transform) for side in files]
    return compare_images(model, loaded[0], loaded[1], layers, **options)


def transform_or_default(images: Tensor, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The given transform, or ImageNet's mean and standard deviation."""
    if transform is not None:
        return transform(images)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    return (images - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def _pictures(folder: Path) -> dict[str, Path]:
    check(folder.is_dir(), "folder", str(folder), "no such folder")
    found = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES}
    check(len(found) >= 5, "folder", str(folder), "holds fewer than five pictures")
    return found


def _load(paths: list[Path], size: int) -> Tensor:
    images = []
    for path in paths:
        pixels = decode(path, (size, size), 3)
        if isinstance(pixels, str):
            raise ValueError(f"{path}: {pixels}")
        images.append(torch.tensor(pixels))
    return torch.stack(images).float() / 255


def perturbation(
    model: nn.Module,
    images: Tensor,
    strengths: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.8),
    layers: Sequence[str] | None = None,
    *,
    change: Callable[[Tensor, float], Tensor] | None = None,
    reduction: Reduction | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """How features of images and of perturbed images drift apart with the strength of the perturbation.

    Args:
        model: a frozen encoder.
        images: (N, …), normalised as it expects them.
        strengths: what ``change`` gets.
        layers: names of modules; blocks by default.
        change: (images, strength) → images; Gaussian noise of that standard deviation by default.
        reduction: of maps and tokens to rows.
        batch_size: images at once.
        seed: of the noise.

    Returns:
        A row a strength: strength, mean CKA over layers, rank correlation of the profile over layers with that of the
        weakest strength, and CKA by layer.
    """
    check(len(strengths) > 0, "strengths", strengths, "give at least one")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)
    change = change or (lambda clean, strength: clean + strength * noise)
    options: dict[str, Any] = {"reduction": reduction, "batch_size": batch_size}
    clean = features(model, images, layers, **options)
    rows: list[dict[str, Any]] = []
    profiles: list[Tensor] = []
    for strength in strengths:
        other = features(model, change(images, strength), layers, **options)
        profiles.append(torch.stack([cka(clean[n], other[n]) for n in clean]))
        rank = spearman(profiles[0], profiles[-1]) if len(clean) > 1 else math.nan
        scores = dict(zip(clean, profiles[-1].tolist(), strict=True))
        rows.append({"strength": strength, "mean": float(profiles[-1].mean()), "rank stability": rank, **scores})
    return rows
