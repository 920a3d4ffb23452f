"""Deep kernel machines: identities of their layers, closed forms, and machines that learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from torchconv.models.classify.dkm import Whitening, conv_dkm, inducing_patches
from torchconv.ops.dkm import (
    F2G,
    DeepKernelMachine,
    GPOutput,
    GramLayer,
    Input,
    Inputs,
    ReluKernel,
    SqExpKernel,
    SumKernel,
)
from torchconv.ops.dkm_conv import BigFinalConv, ConvF2G, ConvMixup, GramBatchNorm, NystromGAP, ResNetBlock
from torchconv.theory.dkm import (
    FullDKM,
    GramStructure,
    apply_kernel,
    deep_linear_optimum,
    full_objective,
    gaussian_kl,
    symmetric_root,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def structure(p: int = 5, n: int = 7, width: int = 6) -> GramStructure:
    return F2G()(Inputs(normal(p, width), normal(n, width, seed=1)))


def pictures(p: int = 4, n: int = 3, channels: int = 2, size: int = 6) -> GramStructure:
    return ConvF2G()(Inputs(normal(p, 3, 3, channels), normal(n, channels, size, size, seed=1)))


def positive(p: int, seed: int = 0) -> Tensor:
    root = normal(p, 2 * p, seed=seed)
    return root @ root.T / (2 * p)


def blocks(g: GramStructure) -> tuple[Tensor, Tensor, Tensor]:
    return g.ii, g.ti, g.t


@pytest.mark.parametrize("parameters", ["full", "cholesky"])
@pytest.mark.parametrize("term", ["kl", "taylor"])
def test_gram_layer_starts_at_its_kernel(parameters: str, term: str) -> None:
    g = ReluKernel().double()(structure())
    layer = GramLayer(5, 3.0, parameters=parameters, term=term).double()
    found = layer(g)
    for ours, given in zip(blocks(found), blocks(g), strict=True):
        torch.testing.assert_close(ours, given)
    assert abs(float(found.terms.detach())) < 1e-10
    found.terms.backward()
    assert float(layer.V.grad.abs().max()) < 1e-9
    with torch.no_grad():
        layer.V += 0.1 * normal(5, 5, seed=3)
    assert float(layer(g).terms.detach()) < -1e-3  # it can only fall
    fresh = GramLayer(5, 3.0, parameters=parameters, term=term).double()
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(g).ii, layer(g).ii)  # a loaded state is not overwritten by the first forward
    torch.testing.assert_close(copy.deepcopy(layer)(g).ii, layer(g).ii)


def test_divergence_is_the_one_between_gaussians() -> None:
    g, k = positive(4), positive(4, seed=1)
    gaussians = [torch.distributions.MultivariateNormal(torch.zeros(4).double(), m) for m in (g, k)]
    torch.testing.assert_close(gaussian_kl(g, k), torch.distributions.kl_divergence(*gaussians))
    layer = GramLayer(4, 2.0).double()
    with torch.no_grad():
        layer.V.copy_(torch.linalg.cholesky(g) * 2)
    layer._waits = False
    ti = normal(3, 4)
    found = layer(GramStructure(k, ti, torch.full((3,), 9.0).double(), torch.tensor(0.0).double()))
    torch.testing.assert_close(found.terms, -2 * gaussian_kl(g, k))
    second = GramLayer(4, 2.0, term="taylor").double()
    second.load_state_dict(layer.state_dict())
    ratio = torch.linalg.inv(g) @ k - torch.eye(4).double()
    terms = second(GramStructure(k, ti, torch.full((3,), 9.0).double(), torch.tensor(0.0).double())).terms
    torch.testing.assert_close(terms, -0.5 * ratio.square().sum())
    a = ti @ torch.linalg.inv(k)
    torch.testing.assert_close(found.t, 9 + (a @ g @ a.T - a @ ti.T).diagonal())


def test_kernels() -> None:
    x = normal(6, 4)
    g = F2G()(Inputs(x, x))
    plain = ReluKernel(1e-30, 1.0, mult_eps=0, abs_eps=0).double()
    found = plain(g)
    torch.testing.assert_close(found.ii, apply_kernel(x @ x.T / 4, "relu"))
    torch.testing.assert_close(found.ii.diagonal(), g.t)  # the diagonal is kept
    torch.testing.assert_close(found.t, g.t)
    torch.testing.assert_close(found.ti, found.ii, rtol=1e-6, atol=1e-7)
    larger = plain(GramStructure(9 * g.ii, 9 * g.ti, 9 * g.t, g.terms))
    torch.testing.assert_close(larger.ii, 9 * found.ii)  # homogeneous
    exponential = SqExpKernel(mult_eps=0, abs_eps=0)(g)
    distances = torch.cdist(x, x) ** 2 / 4
    torch.testing.assert_close(exponential.ti, (-distances / 2).exp(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(exponential.ii, apply_kernel(x @ x.T / 4, "sqexp"))
    assert bool((exponential.t == 1).all())
    jittered = SqExpKernel(mult_eps=0.1, abs_eps=0.01)(g)
    torch.testing.assert_close(jittered.ii - exponential.ii, 0.11 * torch.eye(6).double())
    assert float(jittered.t[0]) == pytest.approx(1.11)


def test_inducing_points_that_are_the_data() -> None:
    """The sparse machine is then the full one."""
    x = normal(6, 8)
    sparse = F2G()(Inputs(x, x))
    gram = x @ x.T / 8
    layer = GramLayer(6, 1.0).double()
    with torch.no_grad():
        layer.V.copy_(normal(6, 6, seed=2))
    layer._waits = False
    found = layer(sparse)
    torch.testing.assert_close(found.ti, found.ii)
    torch.testing.assert_close(found.t, found.ii.diagonal())
    root = layer.root()
    torch.testing.assert_close(found.terms, -gaussian_kl(root @ root.T, gram))


@pytest.mark.parametrize("layers", [1, 3])
def test_deep_linear_machines_have_a_closed_form(layers: int) -> None:
    g0, gy = positive(4), positive(4, seed=1)
    found = deep_linear_optimum(g0, gy, layers)

    def objective(grams: list[Tensor]) -> Tensor:
        chain = [g0, *grams, gy]
        return -torch.stack([gaussian_kl(after, before) for before, after in pairwise(chain)]).sum()

    free = [g.clone().requires_grad_() for g in found]
    value = objective(free)
    for gradient in torch.autograd.grad(value, free):
        assert float(gradient.abs().max()) < 1e-8
    moved = [g + 0.01 * positive(4, seed=5) for g in found]
    assert float(objective(moved)) < float(value)
    torch.testing.assert_close(symmetric_root(g0) @ symmetric_root(g0), g0)


def test_full_machines() -> None:
    x = normal(16, 3)
    y = torch.stack([(3 * x[:, 0]).sin(), x[:, 1] * x[:, 2]], 1)
    soft = FullDKM([2.0, 2.0], noise_var=0.05).fit(x, y, steps=15)
    assert soft.history == sorted(soft.history)
    start = soft.objective(x, y, soft.start(x))
    assert float(start.kl.abs().max()) < 1e-9
    end = soft.objective(x, y, soft.factors)
    assert float(end.value) == pytest.approx(soft.history[-1], rel=1e-3)
    assert float(end.value) > float(start.value) + 1
    assert float(end.kl.min()) > 0
    stiff = FullDKM([1e8, 1e8], noise_var=0.05).fit(x, y, steps=5)
    gram = x @ x.T / 3
    for factor in stiff.factors:  # ν → ∞ keeps the kernel of the infinitely wide network
        gram = apply_kernel(gram)
        torch.testing.assert_close(factor @ factor.T, gram, rtol=1e-3, atol=1e-3)


def test_output() -> None:
    torch.manual_seed(0)
    g = ReluKernel().double()(structure())
    output = GPOutput(5, 3, mc_samples=4000).double()
    samples, terms = output(g)
    assert tuple(samples.shape) == (4000, 7, 3)
    b = g.ti @ torch.linalg.inv(g.ii)
    a = output.L @ output.L.T / 5
    torch.testing.assert_close(samples.mean(0), b @ output.mu, atol=0.15, rtol=0.1)
    variance = g.t + (b @ (a - g.ii) @ b.T).diagonal()
    torch.testing.assert_close(samples.var(0).mean(1), variance, rtol=0.1, atol=0.02)
    one = GPOutput(5, 3, tempered=False).double()
    one.load_state_dict(output.state_dict())
    each = [torch.distributions.MultivariateNormal(output.mu[:, c], a) for c in range(3)]
    prior = torch.distributions.MultivariateNormal(torch.zeros(5).double(), g.ii)
    kl = torch.stack([torch.distributions.kl_divergence(q, prior) for q in each]).sum()
    torch.testing.assert_close(one(g)[1], -kl)
    torch.testing.assert_close(terms, -kl / 3)
    with torch.no_grad():
        output.mu.zero_()
        output.L.copy_(torch.linalg.cholesky(g.ii) * math.sqrt(5))
    torch.testing.assert_close(output(g)[0].var(0).mean(1), g.t, rtol=0.1, atol=0.0)


def test_convolution_of_kernels() -> None:
    """Patches' Gram matrices, and the mixing against features of which they are the Gram matrices."""
    patches, x = normal(4, 3, 3, 2), normal(3, 2, 6, 6, seed=1)
    g = ConvF2G()(Inputs(patches, x))
    seen = torch.nn.functional.unfold(x, 3, padding=1).unflatten(1, (2, 9)).permute(0, 3, 2, 1).flatten(2)
    torch.testing.assert_close(g.ti.flatten(1, 2), seen @ patches.flatten(1).T / 18)
    torch.testing.assert_close(
        g.t[:, 1:-1, 1:-1].flatten(1), (seen.square().sum(2) / 18).view(3, 6, 6)[:, 1:-1, 1:-1].flatten(1)
    )
    mix = ConvMixup(4, 5, 3, 2).double()
    found = mix(g)
    weights = mix.latent_learned_weights / 2
    # Features with these inner products: inducing ones without space, data with it.
    features = torch.linalg.cholesky(g.ii)
    data = torch.cholesky_solve(g.ti.reshape(-1, 4).T, features).T @ features
    data = data.view(3, 6, 6, 4).movedim(-1, 1)
    taps = torch.einsum("apij,pf->aijf", weights, features)
    torch.testing.assert_close(found.ii, torch.einsum("aijf,bijf->ab", taps, taps) / 9)
    again = torch.nn.functional.conv2d(data, taps.permute(0, 3, 1, 2), stride=2, padding=1) / 9
    torch.testing.assert_close(found.ti, again.movedim(1, -1))
    one = ConvMixup(4, 4, 1).double()
    with torch.no_grad():
        one.latent_learned_weights.copy_(2 * torch.eye(4).view(4, 4, 1, 1))
    for ours, given in zip(blocks(one(g)), blocks(g), strict=True):
        torch.testing.assert_close(ours, given)


@pytest.mark.parametrize("i_norm", ["none", "global", "local"])
@pytest.mark.parametrize("t_norm", ["none", "global", "local", "location", "image"])
def test_batch_norm_scales_features(i_norm: str, t_norm: str) -> None:
    """Of features that are scaled, row by row: the structure is theirs, and the chosen means are one."""
    g = pictures()
    found = GramBatchNorm(i_norm, t_norm, "local", "location", inducing=4, size=(6, 6)).double()(g)
    i = (found.ii.diagonal() / g.ii.diagonal()).sqrt()
    t = (found.t / g.t).sqrt()
    torch.testing.assert_close(found.ii, g.ii * i[:, None] * i)
    torch.testing.assert_close(found.ti, g.ti * t[..., None] * i)
    ones = {"global": found.ii.diagonal().mean(), "local": found.ii.diagonal()}.get(i_norm)
    if ones is not None:
        torch.testing.assert_close(ones, torch.ones_like(ones))
    means = {"global": None, "local": (), "location": (0,), "image": (1, 2)}
    if t_norm != "none":
        axes = means[t_norm]
        mean = found.t.mean() if axes is None else found.t.mean(axes) if axes else found.t
        torch.testing.assert_close(mean, torch.ones_like(mean))


def test_poolings() -> None:
    g = ReluKernel().double()(pictures())
    gap = NystromGAP()(g)
    torch.testing.assert_close(gap.ti, g.ti.mean((1, 2)))
    # Pixels that the inducing points explain wholly: the pooled kernel is that of the pooled features.
    root = torch.linalg.cholesky(g.ii)
    features = torch.linalg.solve_triangular(root, g.ti.reshape(-1, 4).T, upper=False).T.view(3, 6, 6, 4)
    explained = g.but(t=features.square().sum(-1))
    torch.testing.assert_close(NystromGAP()(explained).t, features.mean((1, 2)).square().sum(-1))
    mean = BigFinalConv()(g)
    torch.testing.assert_close(mean.t, g.t.mean((1, 2)))
    for mixing in (NystromGAP(4, 3).double(), BigFinalConv(4, 3, 36).double()):
        mixed = mixing(g)
        assert (tuple(mixed.ii.shape), tuple(mixed.ti.shape), tuple(mixed.t.shape)) == ((3, 3), (3, 3), (3,))
        torch.testing.assert_close(mixed.ii, mixed.ii.T)
    shared = BigFinalConv(4, 3, 36).double()
    single = NystromGAP(4, 3).double()
    with torch.no_grad():
        shared.latent_learned_weights.copy_(single.latent_learned_weights.repeat(1, 36))
    torch.testing.assert_close(shared(g).ii, single(g).ii)  # the same weights everywhere are one mixing
    torch.testing.assert_close(shared(g).ti, single(g).ti)


def test_residual_connections() -> None:
    g = ReluKernel().double()(pictures())
    twice = SumKernel([nn.Identity(), nn.Identity()], [0.5, 0.5]).double()
    for ours, given in zip(blocks(twice(g)), blocks(g), strict=True):
        torch.testing.assert_close(ours, given)
    assert [round(v, 4) for v in SumKernel([nn.Identity()] * 2, [2.0, 1.0]).weights.lw.exp().softmax(0).tolist()] == [
        0.7311,
        0.2689,
    ]
    block = ResNetBlock(2, 4, 6, 1.0, stride=2).double()
    found = block(g)
    assert tuple(found.ti.shape) == (3, 3, 3, 6)
    assert {n.split(".")[0] for n, _ in block.named_parameters()} == {"b"}
    assert any(".kernels.1.i." in name for name in block.state_dict())
    assert not any("V" in name.split(".") for name in ResNetBlock(1, 4, 4, None).state_dict())


def test_machines_learn() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data)[:400] / 8, torch.tensor(digits.target)[:400]
    torch.manual_seed(0)
    layers = [Input(x[:40]), F2G(), ReluKernel(), GramLayer(40, 1.0), ReluKernel(), GPOutput(40, 10, 20)]
    machine = DeepKernelMachine(*layers).double()
    machine(x[:10])
    optimizer = torch.optim.Adam(machine.parameters(), 0.02, betas=(0.8, 0.9))
    values = []
    for step in range(60):
        rows = torch.randperm(300, generator=torch.Generator().manual_seed(step))[:100]
        optimizer.zero_grad()
        parts = machine.objective(x[rows], y[rows], num_data=300)
        (-parts.objective).backward()
        optimizer.step()
        values.append(float(parts.objective))
    assert values[-1] > values[0] + 0.5
    probabilities = machine.predict(x[300:])
    torch.testing.assert_close(probabilities.sum(1), torch.ones(100).double())
    assert float((probabilities.argmax(1) == y[300:]).double().mean()) > 0.85
    regression = machine.objective(x[:9], x[:9, :10], num_data=300, likelihood="gaussian", noise_var=0.5)
    assert bool(torch.isfinite(regression.objective))


def test_convolutional_machine_in_single_precision() -> None:
    images = normal(12, 1, 8, 8).float()
    white = Whitening.of(images)(images)
    machine = conv_dkm(white, 3, blocks=1, dof=0.01, mc_samples=5)
    parts = machine.objective(white, torch.arange(12) % 3, num_data=12)
    (-parts.objective).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in machine.parameters())
    again = conv_dkm(white, 3, blocks=1, dof=0.01, mc_samples=5, seed=9)
    again.load_state_dict(machine.state_dict())
    noise = torch.randn(5, 12, 3)
    torch.testing.assert_close(again.predict(white, noise=noise), machine.predict(white, noise=noise))
    stiff = conv_dkm(white, 3, blocks=1, dof=None, pooling="conv", mc_samples=5)
    assert not any(isinstance(m, GramLayer) for m in stiff.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, i: Input(torch.ones(3)), r"inducing=\(3,\)"),
        (lambda g, i: Input(torch.ones(3, 4))(torch.ones(2, 5)), r"x=\(2, 5\): give \(N, 4\)"),
        (lambda g, i: GramLayer(4, 1.0)(g), r"ii=\(5, 5\): this layer has 4"),
        (lambda g, i: GramLayer(4, -1.0), "dof=-1.0"),
        (lambda g, i: GramLayer(4, math.inf), "dof=inf"),
        (lambda g, i: GramLayer(4, 1.0, term="mse"), "term='mse'"),
        (
            lambda g, i: GramLayer(5, 1.0).double()(g.but(ii=torch.ones(5, 5).double())),
            "not positive definite: use fewer",
        ),
        (lambda g, i: ReluKernel(0.0), "bias_var=0.0"),
        (lambda g, i: SqExpKernel(abs_eps=-1), "abs_eps=-1"),
        (lambda g, i: GPOutput(4, 2)(i), "pool over the pixels first"),
        (lambda g, i: GPOutput(3, 2)(g), "this layer has 3"),
        (lambda g, i: ConvMixup(4, 4, 0), "kernel_size=0"),
        (lambda g, i: ConvMixup(3, 4)(i), "this layer takes 3"),
        (lambda g, i: ConvMixup(5, 4)(g), "give blocks of images"),
        (lambda g, i: GramBatchNorm("all"), "i_norm='all'"),
        (lambda g, i: GramBatchNorm(i_scale="local"), "inducing=None"),
        (lambda g, i: GramBatchNorm(t_norm="image")(g), "needs images"),
        (lambda g, i: NystromGAP()(g), "give blocks of images"),
        (lambda g, i: NystromGAP(4), "inducing_out=None"),
        (lambda g, i: BigFinalConv(4, 3, 9).double()(i), "takes 9 positions"),
        (lambda g, i: SumKernel([]), "branches="),
        (lambda g, i: SumKernel([nn.Identity()], [0.0]), "weights="),
        (lambda g, i: full_objective(torch.ones(3, 2), torch.ones(3, 1), [], []), "nu="),
        (lambda g, i: FullDKM([0.0]), "nu="),
        (lambda g, i: deep_linear_optimum(torch.eye(2), torch.eye(2), 0), "layers=0"),
        (lambda g, i: apply_kernel(torch.eye(2), "rbf"), "kernel='rbf'"),
        (lambda g, i: conv_dkm(torch.ones(2, 1, 8, 8), 3, pooling="max"), "pooling='max'"),
        (lambda g, i: inducing_patches(torch.ones(2, 1, 2, 2), 4), "images="),
        (lambda g, i: Whitening.of(torch.ones(2, 4)), "images="),
    ],
)
def test_bad_arguments(call: Callable[[GramStructure, GramStructure], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(ReluKernel().double()(structure()), pictures().but(ii=ReluKernel().double()(pictures()).ii))
