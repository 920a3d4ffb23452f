"""The fully connected field: against loops over pairs, its limits and symmetries, both methods, gradients, scenes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv.models.segment.crf import (
    PRESETS,
    DenseCRF,
    GaussianKernel,
    PairwiseTerms,
    dense_crf,
    energies_from_labels,
    energies_from_logits,
    energies_from_probabilities,
)
from torchconv.models.segment.crf_filters import pairs_filter
from torchconv.models.segment.crf_lattice import Lattice

SMALL = (GaussianKernel(3.0, 1.5), GaussianKernel(4.0, 5.0, 20.0))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def picture(*size: int, seed: int = 0) -> Tensor:
    return torch.randint(256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def looped(image: Tensor, energies: Tensor, kernels: Any, normalization: str, keep: bool, steps: int) -> Tensor:
    """Mean field of one image by loops over pairs of pixels."""
    size, labels = image.shape[1:], len(energies)
    pixels = [p.tolist() for p in torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1).view(-1, 2)]
    colours, u = image.double().flatten(1).T, energies.flatten(1).T
    matrices = []
    for kernel in kernels:
        k = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
        for i, (a, b) in enumerate(pixels):
            for j, (c, d) in enumerate(pixels):
                far = ((a - c) ** 2 + (b - d) ** 2) / (2 * kernel.spatial_std**2)
                if kernel.colour_std is not None:
                    far += float((colours[i] - colours[j]).square().sum()) / (2 * kernel.colour_std**2)
                k[i, j] = math.exp(-far)
        n = k.sum(1)
        left = {"after": 1 / n, "before": 1 + 0 * n, "symmetric": n.rsqrt(), "none": (len(n) / n.sum()).expand(len(n))}
        right = {"after": 1 + 0 * n, "before": 1 / n, "symmetric": n.rsqrt(), "none": 1 + 0 * n}
        k = left[normalization][:, None] * k * right[normalization]
        matrices.append(k if keep else k - k.diag().diag())
    q = (-u).softmax(1)
    for _ in range(steps):
        q = (-u + sum(kernel.weight * k @ q for kernel, k in zip(kernels, matrices, strict=True))).softmax(1)
    return q.T.reshape(labels, *size)


@pytest.mark.parametrize("normalization", ["after", "before", "symmetric", "none"])
@pytest.mark.parametrize("keep", [True, False])
def test_exact_equals_loops_whole_and_in_chunks(normalization: str, keep: bool) -> None:
    image, energies = picture(2, 3, 5, 6), noise(2, 4, 5, 6)
    options: dict[str, Any] = {"kernels": SMALL, "normalization": normalization, "include_self": keep, "iterations": 3}
    whole = dense_crf(image, energies=energies, method="exact", **options)
    for ours, one, given in zip(whole, image, energies, strict=True):
        torch.testing.assert_close(ours, looped(one, given, SMALL, normalization, keep, 3), rtol=0, atol=1e-12)
    chunked = dense_crf(image, energies=energies, method="exact", max_pairs=100, **options)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)


def test_limits() -> None:
    image, logits = picture(1, 3, 6, 7), noise(1, 3, 6, 7)
    softmax = logits.softmax(1)
    for method in ("exact", "lattice"):
        nothing = dense_crf(image, logits=logits, kernels=[GaussianKernel(0.0, 3.0)], method=method)
        torch.testing.assert_close(nothing, softmax)
        torch.testing.assert_close(dense_crf(image, logits=logits, iterations=0, method=method), softmax)
    wide = [GaussianKernel(4.0, 2.0, 1e9)]
    plain = [GaussianKernel(4.0, 2.0)]
    both = [dense_crf(image, logits=logits, kernels=k, method="exact") for k in (wide, plain)]
    torch.testing.assert_close(*both)
    # A kernel narrower than a pixel is the identity.
    alone = dense_crf(image, logits=logits, kernels=[GaussianKernel(2.0, 0.05)], iterations=1, method="exact")
    torch.testing.assert_close(alone, (logits.log_softmax(1) + 2 * softmax).softmax(1))


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_symmetries(method: str) -> None:
    image, logits = picture(2, 3, 8, 6), noise(2, 3, 8, 6)
    q = dense_crf(image, logits=logits, kernels=SMALL, method=method)
    torch.testing.assert_close(q.sum(1), torch.ones(2, 8, 6).double())
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(dense_crf(image, logits=logits[:, order], kernels=SMALL, method=method), q[:, order])
    shifted = logits + noise(2, 1, 8, 6, seed=3)
    torch.testing.assert_close(dense_crf(image, logits=shifted, kernels=SMALL, method=method), q)
    alone = [dense_crf(image[i : i + 1], logits=logits[i : i + 1], kernels=SMALL, method=method) for i in range(2)]
    torch.testing.assert_close(torch.cat(alone), q)
    if method == "exact":
        mirrored = dense_crf(image.flip(3), logits=logits.flip(3), kernels=SMALL, method=method)
        torch.testing.assert_close(mirrored.flip(3), q)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_sums_of_normalised_matrices(method: str) -> None:
    image = picture(1, 3, 5, 4)
    unit = torch.eye(20, dtype=torch.float64).view(20, 1, 5, 4).movedim(0, 1)  # (1, 20, 5, 4): columns as labels
    for normalization in ("after", "before", "symmetric"):
        terms = PairwiseTerms(image, SMALL[1:], normalization=normalization, method=method, dtype=torch.float64)
        matrix = terms.message(unit, [1.0]).view(20, 20).T  # [i, j]: what j's label gives to i
        if normalization == "after":
            torch.testing.assert_close(matrix.sum(1), torch.ones(20).double())
            constant = torch.tensor([0.2, 0.8]).double().view(1, 2, 1, 1).expand(1, 2, 5, 4)
            torch.testing.assert_close(terms.message(constant, [1.0]), constant)
        elif method == "exact" and normalization == "before":
            torch.testing.assert_close(matrix.sum(0), torch.ones(20).double())
        elif method == "exact":
            torch.testing.assert_close(matrix.T, matrix)


def test_lattice_is_near_the_gaussian_and_its_gradient_is_the_transpose() -> None:
    points = noise(1, 300, 2) * 2
    values = noise(300, 3, seed=1).requires_grad_()
    lattice = Lattice.build(points)
    assert torch.allclose(lattice.weights.sum(1), torch.ones(300).double())
    assert lattice.weights.min() > -1e-9
    exact = torch.exp(-torch.cdist(points[0], points[0]).square() / 2)
    ones = torch.ones(300, 1).double()
    smooth, expected = lattice.filter(values) / lattice.filter(ones), exact @ values / (exact @ ones)
    assert (smooth - expected).abs().mean() < 0.2 * expected.abs().mean()
    matrix = lattice.filter(torch.eye(300).double())
    given = noise(300, 3, seed=2)
    (grad,) = torch.autograd.grad(lattice.filter(values), values, given)
    torch.testing.assert_close(grad, matrix.T @ given)
    assert torch.autograd.gradcheck(lattice.filter, values[:, :1].detach().requires_grad_(), fast_mode=True)


def test_lattice_of_sets_that_do_not_see_each_other() -> None:
    points, values = noise(3, 40, 3), noise(120, 2, seed=1)
    together = Lattice.build(points).filter(values)
    alone = [Lattice.build(p[None]).filter(v) for p, v in zip(points, values.split(40), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_gradients() -> None:
    image = (picture(1, 3, 3, 4).double() / 4).requires_grad_()
    logits = noise(1, 2, 3, 4).requires_grad_()
    weight = noise(2, 2).requires_grad_()

    def run(image: Tensor, logits: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return dense_crf(
            image, logits=logits, kernels=SMALL, compatibilities=[weight, weight[0]], iterations=2, **options
        )

    for pairs in (10_000, 40):
        given = (image, logits, weight)
        assert torch.autograd.gradcheck(lambda *t, p=pairs: run(*t, method="exact", max_pairs=p), given, fast_mode=True)
    lattice = (logits, weight)
    assert torch.autograd.gradcheck(lambda *t: run(image.detach(), *t, method="lattice"), lattice, fast_mode=True)


def test_chunks_hold_less_than_the_matrix() -> None:
    """No tensor made on the way is larger than asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return out

    features, values = noise(1, 500, 5), noise(1, 500, 2).requires_grad_()
    with Watch():
        pairs_filter(features, 20_000)(values).sum().backward()
    assert largest <= 20_000


def test_compatibilities() -> None:
    image, logits = picture(1, 3, 5, 5), noise(1, 3, 5, 5)
    options: dict[str, Any] = {"logits": logits, "kernels": SMALL[1:], "method": "exact", "iterations": 3}
    potts = dense_crf(image, compatibilities=[2.5], **options)
    same = (
        torch.tensor(2.5),
        -2.5 * torch.ones(3),
        -2.5 * torch.eye(3),
        2.5 * (1 - torch.eye(3)),  # as a penalty on unequal labels
    )
    for form in same:
        torch.testing.assert_close(dense_crf(image, compatibilities=[form], **options), potts)
    skewed = noise(3, 3)
    both = [dense_crf(image, compatibilities=[m], **options) for m in (skewed, (skewed + skewed.T) / 2)]
    torch.testing.assert_close(*both)
    with pytest.raises(ValueError, match=r"compatibility=\(2,\)"):
        dense_crf(image, compatibilities=[torch.ones(2)], **options)
    with pytest.raises(ValueError, match="compatibilities=2"):
        dense_crf(image, compatibilities=[1.0, 2.0], **options)


def test_objective_is_the_sum_of_its_terms() -> None:
    image, energies = picture(2, 3, 6, 6), noise(2, 2, 6, 6)
    terms = PairwiseTerms(image, SMALL, normalization="symmetric", method="exact", dtype=torch.float64)
    history = terms.mean_field(energies, 4, history=True)
    assert len(history) == 5
    assert torch.equal(history[-1], terms.mean_field(energies, 4)[0])
    q = history[-1].exp()
    expected = (q * q.log() + energies * q - q * terms.message(q)).sum((1, 2, 3))
    torch.testing.assert_close(terms.objective(q, energies), expected)
    # Without neighbours it is the divergence from the softmax, least there, where it is minus the normaliser.
    alone = PairwiseTerms(image, [GaussianKernel(0.0, 1.0)], method="exact", dtype=torch.float64)
    least = alone.objective((-energies).softmax(1), energies)
    torch.testing.assert_close(least, -(-energies).logsumexp(1).sum((1, 2)))
    assert (alone.objective(q, energies) > least).all()


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_one_and_three_axes(method: str) -> None:
    """A volume of one slice is an image, and the order of axes is that of the widths."""
    image, logits = picture(1, 1, 6, 7), noise(1, 2, 6, 7)
    flat = dense_crf(image, logits=logits, kernels=[GaussianKernel(3.0, (1.0, 4.0), 30.0)], method=method)
    volume = [GaussianKernel(3.0, (2.0, 1.0, 4.0), 30.0)]
    deep = dense_crf(image[:, :, None], logits=logits[:, :, None], kernels=volume, method=method)
    assert deep.shape == (1, 2, 1, 6, 7)
    line = dense_crf(image[:, :, 0], logits=logits[:, :, 0], kernels=[GaussianKernel(3.0, 4.0, 30.0)], method=method)
    assert line.shape == (1, 2, 7)
    if method == "exact":
        torch.testing.assert_close(deep[:, :, 0], flat)
        turned = dense_crf(
            image.transpose(2, 3),
            logits=logits.transpose(2, 3),
            kernels=[GaussianKernel(3.0, (4.0, 1.0), 30.0)],
            method=method,
        )
        torch.testing.assert_close(turned.transpose(2, 3), flat)


def scene(seed: int, height: int = 36, width: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Three regions in three colours, and scores of which about 72 % are right."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    label = (x > width * 0.55 + 6 * torch.sin(y / 7)).long()
    label[(y - 0.6 * height) ** 2 + (x - 0.3 * width) ** 2 < (0.26 * height) ** 2] = 2
    colours = torch.tensor([[60.0, 90.0, 200.0], [190.0, 170.0, 60.0], [70.0, 180.0, 80.0]])
    image = colours[label].movedim(-1, 0) + 12 * torch.randn(3, height, width, generator=generator)
    logits = 1.2 * F.one_hot(label, 3).movedim(-1, 0) + 0.9 * torch.randn(3, height, width, generator=generator)
    return image.clamp(0, 255).round().to(torch.uint8)[None], logits[None], label[None]


def test_scenes() -> None:
    """As published in kind: the labels of noisy scores become those of the objects."""
    right: dict[str, list[float]] = {"scores": [], "exact": [], "lattice": []}
    for seed in range(3):
        image, logits, label = scene(seed)
        found = {m: dense_crf(image, logits=logits, iterations=5, method=m) for m in ("exact", "lattice")}
        for name, q in {"scores": logits, **found}.items():
            right[name].append(float((q.argmax(1) == label).float().mean()))
        assert (found["exact"].argmax(1) == found["lattice"].argmax(1)).float().mean() > 0.95
    mean = {name: sum(v) / 3 for name, v in right.items()}
    assert 0.66 < mean["scores"] < 0.78
    assert min(right["exact"]) > 0.93
    assert min(right["lattice"]) > 0.93


@pytest.mark.parametrize("compatibility", ["potts", "diagonal", "matrix"])
def test_module_starts_at_the_preset_and_learns(compatibility: str) -> None:
    image, logits, label = scene(0, 16, 20)
    crf = DenseCRF(3, "default", iterations=3, compatibility=compatibility, log=True)
    start = dense_crf(image, logits=logits, kernels=PRESETS["default"], iterations=3)
    torch.testing.assert_close(crf(image, logits).exp(), start)
    optimizer = torch.optim.SGD(crf.parameters(), lr=0.5)
    losses = []  # against wrong labels, so that there is something to unlearn
    for _ in range(4):
        loss = F.nll_loss(crf(image, logits), (label + 1) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert set(crf.param_options()) == dict(crf.named_parameters()).keys()
    twin = copy.deepcopy(crf)
    assert torch.equal(twin(image, logits), crf(image, logits))


def test_images_of_other_types_and_scales() -> None:
    image, logits = picture(1, 3, 6, 7), noise(1, 2, 6, 7).float()
    for method in ("exact", "lattice"):
        expected = dense_crf(image, logits=logits, method=method)
        torch.testing.assert_close(dense_crf(image.float(), logits=logits, method=method), expected)
        unit = dense_crf(image.float() / 255, logits=logits, method=method, image_max=1.0)
        torch.testing.assert_close(unit, expected, rtol=1e-3, atol=1e-3)
        half = dense_crf(image, logits=logits.bfloat16(), method=method)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)
        last = image.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(dense_crf(last, logits=logits, method=method), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(dense_crf(image, logits=logits, method=method), expected)


def test_energies() -> None:
    logits = noise(2, 3, 4, 5)
    torch.testing.assert_close(energies_from_logits(logits), energies_from_probabilities(logits.softmax(1)))
    assert energies_from_probabilities(torch.tensor([[[1.0], [0.0]]]), 1e-3).max().item() == pytest.approx(
        math.log(1e3)
    )
    annotated = energies_from_labels(torch.tensor([[0, 2, 255]]), 3, 0.6, ignore_index=255)
    expected = torch.tensor([[0.6, 0.2, 1 / 3], [0.2, 0.2, 1 / 3], [0.2, 0.6, 1 / 3]])
    torch.testing.assert_close(annotated.neg().exp()[0], expected)


def test_scores_cannot_be_mistaken() -> None:
    image, logits = picture(1, 3, 4, 5), noise(1, 3, 4, 5)
    with pytest.raises(ValueError, match="give them as probabilities="):
        dense_crf(image, logits=logits.softmax(1))
    with pytest.raises(ValueError, match="give them as probabilities="):
        DenseCRF(3)(image, logits.softmax(1))
    with pytest.raises(ValueError, match="give them as logits="):
        dense_crf(image, probabilities=logits)
    with pytest.raises(ValueError, match=r"sums over the labels.*logits="):
        dense_crf(image, probabilities=logits.sigmoid())
    for given in ({}, {"logits": logits, "energies": logits}):
        with pytest.raises(ValueError, match="exactly one of logits, probabilities, energies"):
            dense_crf(image, **given)
    with pytest.raises(ValueError, match=r"image='values from .* to 1'.*image_max=1.0"):
        dense_crf(image.double() / image.max(), logits=logits)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("normalization='row'", {"normalization": "row"}),
        ("method='fast'", {"method": "fast"}),
        ("include_self=False.*exact", {"include_self": False}),
        ("max_pairs=0", {"max_pairs": 0}),
        ("image_max=0", {"image_max": 0}),
        ("iterations=-1", {"iterations": -1}),
        ("kernels='vg'.*vgg", {"kernels": "vg"}),
        ("kernels=3", {"kernels": 3}),
        ("widths=.*larger", {"kernels": [GaussianKernel(1.0, 1e-4, 1e-4)]}),
        ("spatial_std=.*2 for this image", {"kernels": [GaussianKernel(1.0, (1.0, 2.0, 3.0))]}),
        ("colour_std=.*3 for this image", {"kernels": [GaussianKernel(1.0, 1.0, (1.0, 2.0))]}),
    ],
)
def test_refusals(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        dense_crf(picture(1, 3, 4, 5), logits=noise(1, 2, 4, 5), **options)


def test_refusals_of_shapes_and_values() -> None:
    image, logits = picture(1, 3, 4, 5), noise(1, 2, 4, 5)
    for bad in (noise(1, 2, 5, 5), noise(2, 2, 4, 5), noise(2, 4, 5)):
        with pytest.raises(ValueError, match="shape of the scores"):
            dense_crf(image, logits=bad)
    with pytest.raises(ValueError, match=r"image=\(3, 4\)"):
        dense_crf(picture(3, 4), logits=logits)
    with pytest.raises(ValueError, match="image"):
        dense_crf(picture(0, 3, 4, 5), logits=noise(0, 2, 4, 5))
    with pytest.raises(ValueError, match=r"expected \(B, 4, \*spatial\)"):
        DenseCRF(4)(image, logits)
    with pytest.raises(ValueError, match="features='not finite'"):
        dense_crf(torch.full((1, 3, 4, 5), math.nan), logits=logits)
    for width in (0, -1.0, math.inf, (), (1.0, 0.0)):
        with pytest.raises(ValueError, match="spatial_std"):
            GaussianKernel(1.0, width)
    with pytest.raises(ValueError, match="compatibility='full'"):
        DenseCRF(3, compatibility="full")
    for options in ({"num_classes": 1}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            energies_from_labels(torch.zeros(1, 4, dtype=torch.long), **{"num_classes": 3, **options})
    with pytest.raises(ValueError, match=r"labels=\[7\]"):
        energies_from_labels(torch.tensor([[7]]), 3)


def test_learns_inside_a_network() -> None:
    """The field passes gradients to the network before it."""
    image, _, label = scene(1, 12, 16)
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 1)
    crf = DenseCRF(3, iterations=2, log=True)
    F.nll_loss(crf(image, net(image.float() / 255)), label).backward()
    assert net.weight.grad is not None
    assert net.weight.grad.abs().max() > 0


def test_lattice_says_why_it_cannot_be_exported() -> None:
    with pytest.raises(Exception, match=r"method='lattice'.*method='exact'"):
        torch.export.export(DenseCRF(3, iterations=1), (picture(1, 3, 5, 6), noise(1, 3, 5, 6).float()))
