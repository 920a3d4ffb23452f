"""Initial filters for a whole network: one call for the classical laws, fixed banks and filters learned without labels.

G. Hirani and W. Abdulla, "On filter design in deep convolutional neural network", 2024, arXiv 2410.21644: a survey
without code; every method follows its own paper, named in its docstring.

    init(model, "he_normal" | "orthogonal" | "gabor" | "pca" | "spherical_kmeans" | "lsuv" | …, data=…, seed=…)

The model is changed **in place** and returned, like ``torch.nn.init``. Random numbers come from a generator of the
seed on the CPU: the same weights on every device, and PyTorch's own generators are not touched.

Cost: learned filters need one forward pass over the data; O(N·q²) for the covariance of N patches of q values and
O(N·K·q) an iteration of k-means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from torchconv._common import check, check_choice, require
from torchconv.analysis import _filters_learned as learned
from torchconv.analysis import _filters_random as laws
from torchconv.analysis._filters_layers import (
    Layers,
    draw_dtype,
    evaluating,
    has_taps,
    selected,
    set_weight,
    shape_of,
    stored,
    zero_bias,
)
from torchconv.analysis._filters_lsuv import lsuv
from torchconv.analysis._filters_pcanet import PCANet as PCANet
from torchconv.analysis._filters_section import section as section
from torchconv.analysis._filters_size import advise as advise
from torchconv.analysis._filters_size import receptive_fields as receptive_fields
from torchconv.catalog import part

RANDOM: dict[str, Callable[..., Tensor]] = {
    **{name: laws.law(name) for name in laws.LAWS},
    "gaussian": laws.gaussian,
    "trunc_normal": laws.trunc_normal,
    "orthogonal": laws.orthogonal,
    "delta_orthogonal": laws.delta_orthogonal,
    "constant": laws.constant,
}
BANKS = ("dct", "gabor")
MAX_FEATURES = 1152  # 128 channels of 3 × 3: whitening wider patches takes minutes and finds little
LEARNED = ("patches", "pca", "ica", "kmeans", "spherical_kmeans", "conv_kmeans", "sparse", "som")
METHODS = (*RANDOM, "dirac", *BANKS, *LEARNED, "lsuv")


@part(
    "initializers",
    paper="filterdesign",
    kind="analysis",
    dims=(1, 2, 3),
    keywords="initialization initializer He Xavier Glorot orthogonal delta LSUV Gabor DCT PCA k-means ICA SOM filters",
)
def init(
    model: nn.Module,
    method: str = "he_normal",
    *,
    data: Tensor | None = None,
    seed: int = 0,
    layers: Layers = None,
    **options: Any,
) -> nn.Module:
    """Give all convolutions and linear layers of a model new weights, in place; biases become zero.

    Laws and closed forms: the names in ``RANDOM``, and "dirac" (identity). Fixed banks: "dct", "gabor". Learned
    from images layer by layer, each on what the layers before it, already filled, make of them: the names in
    ``LEARNED`` and "lsuv". Banks and learned filters go to convolutions of more than one tap; 1 × 1 convolutions,
    transposed and linear layers get "he_normal" beside them, as do those whose filters have more than 1152 weights
    or that are not called as layers when filters are learned, and "delta_orthogonal" leaves "orthogonal" to layers
    that cannot have it. Layers of other classes keep their weights; so do normalisations.

    Banks give every filter the norm ``gain``; learned filters are scaled until the layer's output has unit variance on
    the data. A bank with fewer filters than the layer is used again with other mixtures of the input channels; after
    the last of the PCA or ICA filters come their negatives (a ReLU tells them apart) and then random ones.

    Args:
        model: changed in place; take ``copy.deepcopy`` first to keep it. Evaluation mode is used meanwhile.
        method: one of ``METHODS``.
        data: one batch of inputs, which methods that learn need.
        seed: of all random numbers.
        layers: names, or a test ``(name, module) -> bool``; all by default.
        **options: of the method: ``gain``, ``fan``, ``std``, ``value``, ``negative_slope`` of laws; those of
            ``gabor_bank``; ``gain``, ``drop_dc`` of "dct"; ``samples`` (20000), ``eps`` (0.1), ``c`` (0.01),
            ``iterations`` (10) of learned filters; ``tol`` and ``max_iter`` of "lsuv".

    Returns:
        The model.

    Raises:
        ValueError: unknown method, no such layer, or data missing.
        TypeError: an option that the method does not have.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Conv2d(8, 16, 3))
        >>> _ = init(net, "gabor", seed=1)
        >>> _ = init(net, "spherical_kmeans", data=torch.rand(16, 1, 20, 20))

    Reference: arXiv 2410.21644.
    """
    check_choice("method", method, METHODS)
    chosen = selected(model, layers)
    generator = Generator().manual_seed(seed)
    if method in LEARNED or method == "lsuv":
        if data is None:
            raise ValueError(f"data=None: {method!r} learns from a batch of inputs; give one")
        if method == "lsuv":
            lsuv(model, data, seed=seed, layers=layers, **options)
        else:
            missed = _learn_all(model, chosen, method, data, generator, options)
            check(layers is None or not missed, "layers", missed, "did not run as layers on the data; leave them out")
            for name in missed:
                _set_he(chosen[name], generator)
        return model
    for module in chosen.values():
        set_weight(module, stored(module, _fixed(module, method, generator, options)))
        zero_bias(module)
    return model


def _fixed(module: Any, method: str, generator: Generator, options: dict[str, Any]) -> Tensor:
    """A weight that needs no data."""
    shape, dtype = shape_of(module), draw_dtype(module)
    if method in BANKS:
        if not has_taps(module):
            return RANDOM["he_normal"](shape, generator=generator, dtype=dtype)
        return _bank_weight(shape, method, generator, **options).to(dtype)
    if method == "dirac":
        return _dirac(shape, getattr(module, "groups", 1), dtype, **options)
    groups = getattr(module, "groups", 1)
    if method == "delta_orthogonal":  # of every group by itself: only so is the whole an isometry
        shape = (shape[0] // groups, *shape[1:])
        fits = len(shape) > 2 and shape[0] >= shape[1] and all(k % 2 for k in shape[2:])
        draw, options = RANDOM[method if fits else "orthogonal"], {"gain": 1.0, **options}
        return torch.cat([draw(shape, generator=generator, dtype=dtype, **options) for _ in range(groups)])
    if options.get("fan_out_groups"):
        options = {"groups": groups, **options}
    return RANDOM[method](shape, generator=generator, dtype=dtype, **options)


def _dirac(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> Tensor:
    """The centre tap copies channel j of its group to output j of its group, as far as there are both."""
    weight = torch.zeros(shape, dtype=dtype)
    centre = tuple(k // 2 for k in shape[2:])
    each = shape[0] // groups
    for group in range(groups):
        for j in range(min(each, shape[1])):
            weight[(group * each + j, j, *centre)] = 1
    return weight


def _bank_weight(
    shape: tuple[int, ...], method: str, generator: Generator, gain: float = math.sqrt(2), **options: Any
) -> Tensor:
    """Spatial filters of a bank times mixtures of the input channels, each filter with norm ``gain``."""
    out_channels, in_channels, *kernel = shape
    if method == "dct":
        bank = laws.dct_bank(kernel, zigzag=True, dtype=torch.float64, **options)
    else:
        check(len(kernel) <= 2, "method", method, "Gabor filters are for one or two axes; take 'dct' in 3-D")
        sizes = kernel if len(kernel) == 2 else [1, *kernel]
        wavelengths = options.pop("wavelengths", (max(2.0, 0.6 * max(kernel)),))
        phases = options.pop("phases", (0.0, math.pi / 2))
        each = -(-out_channels // (len(wavelengths) * len(phases)))
        orientations = options.pop("orientations", min(each, 16) if len(kernel) == 2 else 1)
        options = {"zero_mean": True, **options}
        bank = laws.gabor_bank(sizes, orientations, wavelengths, phases, dtype=torch.float64, **options)
        bank = bank.reshape(-1, *kernel)
    bank = learned.unit(bank.flatten(1))
    which = torch.arange(out_channels)
    if in_channels <= 3:  # images: grey first, then the differences of colours
        mixtures = laws.dct_bank((in_channels,), dtype=torch.float64)[(which // len(bank)) % in_channels]
    else:
        mixtures = learned.unit(
            torch.empty(out_channels, in_channels, dtype=torch.float64).normal_(generator=generator)
        )
    weight = mixtures[:, :, None] * bank[which % len(bank)][:, None]
    return gain * weight.reshape(shape)


def _learn_all(
    model: nn.Module,
    chosen: dict[str, nn.Module],
    method: str,
    data: Tensor,
    generator: Generator,
    options: dict[str, Any],
) -> list[str]:
    """Fill each layer just before it runs for the first time, scale it by what it then gives; names that never ran."""
    seen: set[nn.Module] = set()

    def fill(module: Any, args: tuple[Any, ...]) -> None:
        if module in seen:
            return
        shape = shape_of(module)
        if has_taps(module) and math.prod(shape[1:]) <= MAX_FEATURES:
            weight = learn_filters(_layer_input(module, args[0]), shape, method, generator=generator, **options)
        else:
            weight = RANDOM["he_normal"](shape, generator=generator, dtype=draw_dtype(module))
        set_weight(module, stored(module, weight))
        zero_bias(module)

    def scale(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if module in seen:
            return None
        seen.add(module)
        deviation = output.std(correction=0)
        if not (has_taps(module) and deviation > 0):
            return None
        set_weight(module, module.weight / deviation)
        return output / deviation

    handles = [h for m in chosen.values() for h in (m.register_forward_pre_hook(fill), m.register_forward_hook(scale))]
    try:
        with evaluating(model):
            model(data)
    finally:
        for handle in handles:
            handle.remove()
    return [n for n, m in chosen.items() if m not in seen]


def _set_he(module: Any, generator: Generator) -> None:
    """He's law, for a layer whose weight is used without calling it."""
    set_weight(module, stored(module, _fixed(module, "he_normal", generator, {})))
    zero_bias(module)


def _layer_input(module: Any, x: Tensor) -> Tensor:
    """What patches are taken from: (samples, channels of a group, *spatial), thinned by the dilation."""
    if x.dim() == len(module.kernel_size) + 1:
        x = x[None]
    x = x.unflatten(1, (module.groups, -1)).flatten(0, 1)
    thin = (slice(None), slice(None), *(slice(None, None, d) for d in module.dilation))
    x = x[thin].to(draw_dtype(module))
    short = [max(0, k - n) for k, n in zip(module.kernel_size, x.shape[2:], strict=True)]
    return F.pad(x, [p for s in reversed(short) for p in (s // 2, s - s // 2)]) if any(short) else x


def learn_filters(
    images: Tensor,
    shape: tuple[int, ...],
    method: str = "spherical_kmeans",
    *,
    generator: Generator | None = None,
    samples: int = 20000,
    eps: float = 0.1,
    c: float = 0.01,
    iterations: int = 10,
) -> Tensor:
    """Filters of unit norm learned from patches of images, as a weight for plain images.

    "patches": random patches; "pca": principal components of patches less their means; "ica": FastICA; "kmeans":
    centroids; "spherical_kmeans", "conv_kmeans", "sparse" (dictionary learning), "som": as in the functions of these
    names. Patches are contrast-normalised and, but for PCA, ZCA-whitened; the whitening is folded into the filters
    ("conv_kmeans" whitens windows of twice the side, which has no exact folding: its filters are taken as they are).

    Args:
        images: (N, C, *spatial).
        shape: (filters, C, *kernel).
        method: one of ``LEARNED``.
        generator: of the random choices.
        samples: how many patches at most.
        eps: of the whitening.
        c: of the contrast normalisation; 10 for values to 255.
        iterations: of k-means and the like.

    Raises:
        ValueError: unknown method, or channels that differ.
        ImportError: "ica" and "kmeans" need scikit-learn.

    Example:
        >>> learn_filters(torch.rand(8, 1, 12, 12), (6, 1, 3, 3), "pca").shape
        torch.Size([6, 1, 3, 3])

    Reference: Coates, Lee and Ng 2011; arXiv 2410.21644, section on unsupervised learning.
    """
    check_choice("method", method, LEARNED)
    count, channels, *kernel = shape
    check(images.shape[1] == channels, "shape", shape, f"must have the images' {images.shape[1]} channels")
    generator = generator or Generator().manual_seed(0)
    if method == "conv_kmeans":
        sides = [min(2 * k, n) for k, n in zip(kernel, images.shape[2:], strict=True)]
        x = learned.contrast_normalise(_sample(images, sides, samples, generator), c)
        windows = learned.zca(x, eps)(x).reshape(-1, channels, *sides)
        start = _sample(windows, kernel, count, generator)
        centroids = learned.unit(_complete(start, count, generator)).reshape(shape)
        for _ in range(iterations):
            centroids = learned.convolutional_kmeans_step(windows, centroids).centroids
        return centroids
    x = _sample(images, kernel, samples, generator)
    if method == "pca":
        x = (x.unflatten(1, (channels, -1)) - x.unflatten(1, (channels, -1)).mean(2, keepdim=True)).flatten(1)
        rank = channels * (math.prod(kernel) - 1)  # a mean was taken out of each channel
        filters, _ = learned.principal_filters(x, min(count, rank))
        return _complete(filters, count, generator).reshape(shape)
    x = learned.contrast_normalise(x, c)
    whitening = learned.zca(x, eps)
    filters = _learn(whitening(x), count, method, generator, iterations)
    filters, _ = whitening.fold(filters)
    return _complete(learned.unit(filters), count, generator).reshape(shape)


def _sample(images: Tensor, kernel: list[int], samples: int, generator: Generator) -> Tensor:
    """At most so many patches, from as many images as are needed for some variety."""
    positions = math.prod(n - k + 1 for n, k in zip(images.shape[2:], kernel, strict=True))
    wanted = -(-4 * samples // max(1, positions))
    if len(images) > wanted:
        images = images[torch.randperm(len(images), generator=generator)[:wanted].to(images.device)]
    x = learned.patches(images, kernel)
    return x[torch.randperm(len(x), generator=generator)[:samples].to(x.device)] if len(x) > samples else x


def _complete(filters: Tensor, count: int, generator: Generator) -> Tensor:
    """Negatives and then random rows of unit norm until there are ``count``."""
    filters = torch.cat([filters, -filters])[:count] if len(filters) < count else filters[:count]
    missing = torch.empty(count - len(filters), filters.shape[1]).normal_(generator=generator)
    return torch.cat([filters, learned.unit(missing).to(filters)])


def _learn(x: Tensor, count: int, method: str, generator: Generator, iterations: int) -> Tensor:
    """Rows learned from whitened patches: ``count`` of them, or as many as the patches allow."""
    start = x[torch.randperm(len(x), generator=generator)[:count].to(x.device)]
    if method == "patches":
        return start
    if method == "spherical_kmeans":
        noise = torch.empty(count, x.shape[1]).normal_(generator=generator).to(x)
        return learned.spherical_kmeans(x, noise, iterations, reseed=generator)[0]
    if method == "som":
        rows = max(d for d in range(1, math.isqrt(len(start)) + 1) if len(start) % d == 0)
        grid = start.reshape(rows, len(start) // rows, -1)
        return learned.self_organising_map(x[:5000], grid, sigma=max(rows / 2, 0.5)).flatten(0, 1)
    if method == "sparse":
        return learned.dictionary(x, start, iterations=iterations)
    require("sklearn", "compare")
    import sklearn.cluster
    import sklearn.decomposition

    state, array = generator.initial_seed() % 2**32, x.double().cpu().numpy()
    if method == "kmeans":
        count = min(count, len(x))
        fitted = sklearn.cluster.KMeans(count, n_init=1, max_iter=iterations * 10, random_state=state).fit(array)
        found = fitted.cluster_centers_
    else:
        count = min(count, x.shape[1] - 1)  # contrast normalisation took one dimension
        ica = sklearn.decomposition.FastICA(count, random_state=state, max_iter=iterations * 20, tol=1e-3)
        found = ica.fit(array).components_
    return torch.from_numpy(found).to(x)
