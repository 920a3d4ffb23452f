"""MaskSparsity: the pull on scales, thresholds, votes, and what pruning does to trained networks."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.parity.core import read_case
from tests.parity.masksparsity import adapt
from torchconv.analysis.count import count
from torchconv.compress.masksparsity import (
    KINDS,
    MaskSparsity,
    channel_masks,
    keep_mask,
    optimal_threshold,
    read_masks,
    sparse_gradient,
    sparsity_penalty,
    vote,
)
from torchconv.data import load, normalise
from torchconv.surgery import channel_groups, prune
from torchconv.training import FitConfig, fit

GOLDEN = Path(__file__).parent.parent / "golden" / "masksparsity"


def small_net(seed: int = 0, channels: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    convs = nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    norms = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
    layers = [convs[0], norms[0], nn.ReLU(), convs[1], norms[1], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, 10))


def test_the_term_itself_is_that_of_the_authors() -> None:
    """Golden gradients are 1e4 times the term, so that their difference is compared."""
    tensors = load_file(GOLDEN / "sparse_gradient.safetensors")
    case = read_case(GOLDEN / "sparse_gradient.safetensors")
    gamma, keep, config = tensors["state.bn.weight"], tensors["input.keep_mask"], case.config
    names = [n for n in case.grads if n.endswith(".bn.weight") and n != "task_only.bn.weight"]
    assert len(names) == 5
    for name in names:
        kind = name.split(".")[0]
        mask = None if kind.startswith("global_") else keep
        ours = sparse_gradient(gamma, mask, config["sparsity"], kind.removeprefix("global_"), config["lr"])
        assert ours.abs().max() > 1e-4
        expected = case.grads[name] - case.grads["task_only.bn.weight"]
        assert torch.allclose(ours, expected, atol=2e-6, rtol=0), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_has_the_gradient(kind: str) -> None:
    gamma = torch.tensor([2.0, -0.5, 0.01, -0.02, 0.3, 1e-3], dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, False, False, False, True, False])
    for mask in (keep, None):
        loss = sparsity_penalty(gamma, mask, 0.2, kind, 0.1)
        [grad] = torch.autograd.grad(loss, gamma)
        assert torch.equal(grad, sparse_gradient(gamma.detach(), mask, 0.2, kind, 0.1))
    assert float(sparsity_penalty(gamma.detach(), torch.ones(6, dtype=torch.bool), 0.2, kind, 0.1)) == 0


def test_smooth_penalty_is_continuous() -> None:
    near = torch.tensor([0.02], dtype=torch.float64)
    below, above = (sparsity_penalty(near + e, None, 0.2, "smoothL1", 0.1) for e in (-1e-9, 1e-9))
    assert abs(float(below - above)) < 1e-9


def test_kept_channels_do_not_notice() -> None:
    """Their gradient is bit for bit that without the pull; the others' differs by ±λ."""
    net, x = small_net(), torch.randn(4, 1, 8, 8)
    masks = {"1": torch.arange(6) > 2}
    sparse = MaskSparsity(net, masks, lam=0.125)
    (sparse(x).square().sum()).backward()
    before = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    sparse.apply_gradient()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        difference = parameter.grad - before[name]
        expected = 0.125 * parameter.sign() * (torch.arange(6) <= 2) if name == "1.weight" else torch.zeros(())
        assert torch.allclose(difference, expected.expand_as(difference), atol=1e-5, rtol=0), name
        assert name == "1.weight" or torch.equal(parameter.grad, before[name])
    assert torch.equal(net[1].weight.grad[3:], before["1.weight"][3:])  # type: ignore[union-attr, index]


def test_limits_are_slimming_and_plain_training() -> None:
    net = small_net()
    scales = torch.cat([net[1].weight, net[4].weight])
    assert torch.equal(MaskSparsity(net, lam=0.1).penalty(), 0.1 * scales.abs().sum())
    with pytest.raises(ValueError, match="there is no channel to pull"):
        MaskSparsity(net, {})
    all_kept = MaskSparsity(net, {"1": torch.ones(6, dtype=torch.bool)})
    assert float(all_kept.penalty().detach()) == 0
    assert all_kept.masks == {}


@pytest.mark.parametrize("kind", ["L1", "smoothL1"])
def test_scales_arrive(kind: str) -> None:
    """Plain SGD, no task: |γ0| / (lr λ) steps, then within lr·λ of zero, and under smoothL1 ever nearer."""
    gamma, lr, lam = torch.tensor([1.0, -0.33], dtype=torch.float64), 0.5, 0.1
    seen = []
    for _ in range(60):
        gamma = gamma - lr * sparse_gradient(gamma, None, lam, kind, lr)
        seen.append(gamma.abs())
    after = torch.stack(seen[21:])
    assert (after <= lr * lam + 1e-12).all()
    if kind == "smoothL1":
        assert (after[1:, 1] < after[:-1, 1]).all()
        assert torch.allclose(after[1:, 1], after[:-1, 1] * (1 - lr * lam))


def brute_threshold(gamma: Tensor, energy: float) -> float:
    values = sorted(max(abs(v), 1e-18) for v in gamma.double().tolist())
    if values[-1] < 1e-3:
        return 1.0
    total, lost, i = sum(v * v for v in values), 0.0, 0
    for i, value in enumerate(values):  # noqa: B007
        lost += value * value
        if lost / total > energy:
            break
    return (values[i - 1] + values[i]) / 2 if i else 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10_000), st.sampled_from([0.0, 1e-4, 1e-2, 0.5, 1.0, 2.0]))
def test_optimal_threshold(size: int, seed: int, energy: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-5, 1, (size,), generator=generator)
    assert optimal_threshold(gamma, energy) == pytest.approx(brute_threshold(gamma, energy), rel=1e-9)


def test_masks_keep_the_last_channels() -> None:
    gamma = torch.tensor([1e-4, -5e-3, 2e-4, 3e-3])
    assert keep_mask(gamma, 0.01).tolist() == [False, True, False, False]
    assert keep_mask(gamma, 0.01, 2).tolist() == [False, True, False, True]
    assert keep_mask(gamma, 0.01, 9).all()
    assert not keep_mask(gamma, 0.01, 0).any()
    assert keep_mask(torch.zeros(3), 0.01).tolist() == [True, False, False]
    assert keep_mask(torch.tensor([0.01, 0.5]), 0.01).tolist() == [False, True]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 10_000))
def test_votes(members: int, channels: int, seed: int) -> None:
    keeps = list(torch.rand(members, channels, generator=torch.Generator().manual_seed(seed)) > 0.5)
    least = min(int((~k).sum()) for k in keeps)
    keep = vote(keeps)
    assert int((~keep).sum()) >= least
    counts = sum((~k).int() for k in keeps)
    level = min((int(counts[c]) for c in range(channels) if not keep[c]), default=members)  # type: ignore[index]
    assert level == members or int((counts > level).sum()) < least, "a stricter agreement would not have been enough"
    assert torch.equal(vote([keeps[0]] * 3), keeps[0])
    assert vote([*keeps, torch.ones(channels, dtype=torch.bool)]).all()


def test_ways_to_choose() -> None:
    net = small_net()
    net[1].weight.data = torch.tensor([0.1, 0.2, -0.3, 0.004, 0.9, -0.8])
    net[4].weight.data = torch.tensor([1.1, 1.2, 1.3, 1.4, 1.5, 1.6])
    assert channel_masks(net, threshold=0.15)["1"].tolist() == [False, True, True, False, True, True]
    layer = channel_masks(net, ratio=0.5)
    assert layer["1"].tolist() == [False, False, False, False, True, True] or int(layer["1"].sum()) == 3
    assert int(layer["4"].sum()) == 3
    everywhere = channel_masks(net, ratio=0.5, scope="global")
    assert everywhere.keys() == {"1"}, "the layer keeps its largest channel"
    assert everywhere["1"].tolist() == [False, False, False, False, True, False]
    assert channel_masks(net, energy=1e-4)["1"].tolist() == [True, True, True, False, True, True]
    assert channel_masks(net, ratio=0.0) == {}
    assert channel_masks(net, ratio=0.5, norms=["4"]).keys() == {"4"}
    assert channel_masks(net, ratio=0.5, groups=[("1", "4")], norms=["4"]) == {}
    again = prune(net, channel_masks(net, threshold=0.15), torch.zeros(1, 1, 8, 8))
    assert channel_masks(again, threshold=0.15) == {}, "once more changes nothing"


def test_members_that_disagree_do_not_lose_all() -> None:
    net = small_net(channels=4)
    net[1].weight.data = torch.tensor([0.0, 0.1, 1.0, 1.0])
    net[4].weight.data = torch.tensor([1.0, 1.2, 0.0, 0.0])
    masks = channel_masks(net, threshold=0.5, groups=[["1", "4"]])
    assert masks["1"].tolist() == masks["4"].tolist() == [False, True, False, False]


def test_bad_arguments(tmp_path: Path) -> None:
    net, keep = small_net(), torch.arange(6) > 2
    wrong: list[tuple[Any, str]] = [
        (lambda: channel_masks(net), "threshold, energy, ratio=None: give one"),
        (lambda: channel_masks(net, threshold=0.1, ratio=0.1), "give one of them"),
        (lambda: channel_masks(net, ratio=1.0), "ratio=1.0: is the share"),
        (lambda: channel_masks(net, ratio=0.5, scope="block"), "scope='block'"),
        (lambda: channel_masks(net, ratio=0.5, norms=["0"]), "norms='0': is no batch norm"),
        (lambda: keep_mask(torch.ones(3), 0.1, -1), "min_channels=-1"),
        (lambda: optimal_threshold(torch.ones(2, 2)), "gamma=.2, 2.: expected the scales"),
        (lambda: optimal_threshold(torch.ones(2), -1), "energy=-1"),
        (lambda: vote([keep, keep[:3]]), "keeps=.*masks of one size"),
        (lambda: vote([]), "keeps="),
        (lambda: sparse_gradient(torch.ones(6), keep, kind="L3"), "kind='L3'"),
        (lambda: sparse_gradient(torch.ones(6), keep, kind="smoothL1"), "lr=None"),
        (lambda: sparse_gradient(torch.ones(6), keep.float()), "keep=torch.float32"),
        (lambda: sparse_gradient(torch.ones(6), keep[:2]), "keep=.2,.: expected the shape"),
        (lambda: MaskSparsity(net, {"1": keep}, lam=-1), "lam=-1"),
        (lambda: MaskSparsity(net, {"7": keep}), "masks='7': AdaptiveAvg|masks='7': Flatten has no scales"),
        (lambda: MaskSparsity(net, {"nope": keep}), "masks='nope': the network has no such layer"),
        (lambda: MaskSparsity(net, {"1": keep[:5]}), "expected bool of shape .6,."),
        (lambda: MaskSparsity(net, {"1": keep}, kind="smoothL1").penalty(), "lr=None"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    save_file({"1": torch.ones(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"expected \(channels,\) of bool"):
        read_masks(tmp_path / "weights.safetensors")
    torch.save({"1": keep}, tmp_path / "authors.mask")
    assert torch.equal(read_masks(tmp_path / "authors.mask")["1"], keep)


def test_in_eval_mode_it_is_the_pruned_network() -> None:
    net, x = small_net(), torch.randn(3, 1, 8, 8)
    nn.init.normal_(net[1].bias)  # type: ignore[arg-type]
    sparse = MaskSparsity(net, {"1": torch.arange(6) > 2}).eval()
    pruned = prune(sparse.model, sparse.masks, x)
    assert torch.allclose(sparse(x), pruned(x), atol=1e-6)
    assert not torch.allclose(sparse(x), net(x), atol=1e-3)
    assert torch.equal(MaskSparsity(net).eval()(x), net(x))
    assert torch.equal(sparse.train()(x), net.train()(x))


def test_copies_keep_names_and_state() -> None:
    sparse = MaskSparsity(small_net(), {"4": torch.arange(6) > 2}, lam=0.1).double()
    for again in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        again.load_state_dict(sparse.state_dict())
        assert torch.equal(again.penalty(), sparse.penalty())
        assert again.scales()[0] is again.model[4].weight
    assert {n.removeprefix("model.") for n in sparse.state_dict()} == {*small_net().state_dict(), "keep"}
    assert "3 of 6 channels pulled" in repr(sparse)


def test_fit_pulls_masked_channels_alone() -> None:
    data = load("digits")
    net = small_net()
    keep = torch.arange(6) > 2
    sparse = MaskSparsity(net, {"1": keep, "4": keep}, lam=0.2)
    config = FitConfig(epochs=3, lr=0.05, min_lr=0.05, optimizer="sgd", warmup_epochs=0, device="cpu", batch_size=128)
    result = fit(sparse, data, config)
    for index in (1, 4):
        scales = net[index].weight.detach().abs()
        assert scales[~keep].max() < 0.1 < scales[keep].min()
    small: Any = prune(net, sparse.masks, torch.zeros(2, 1, 8, 8))
    x = normalise(data.val.x, torch.tensor(data.mean), torch.tensor(data.std))
    accuracy = float((small.eval()(x).argmax(1) == data.val.y).double().mean())
    assert result.history[result.best_epoch - 1].val_accuracy == pytest.approx(accuracy, abs=1e-6), "that of the pruned"
    assert small.prune_report.channels == {"1": (6, 3), "4": (6, 3)}


def test_counts_of_a_uniformly_pruned_resnet50() -> None:
    """A third of every batch norm goes, of the residual trunk as well: in closed form, from the kept widths."""
    net = timm.create_model("resnet50")
    dense = count(copy.deepcopy(net).to("meta"), torch.empty(1, 3, 224, 224, device="meta"))
    assert (dense.macs, dense.params) == (4_089_184_256, 25_557_032)
    example = torch.zeros(1, 3, 32, 32)
    masks = channel_masks(net, ratio=1 / 3, groups=channel_groups(net, example))
    small = count(prune(net, masks, example).to("meta"), torch.empty(1, 3, 224, 224, device="meta"))
    kept = {n: round(n - n / 3) for n in (64, 128, 256, 512, 1024, 2048)}
    macs, into = 3 * kept[64] * 49 * 112**2, kept[64]
    for stage, (blocks, side) in enumerate(zip((3, 4, 6, 3), (56, 28, 14, 7), strict=True)):
        inner, trunk = kept[64 << stage], kept[256 << stage]
        for block in range(blocks):
            before = side * (2 if stage and not block else 1)
            macs += into * inner * before**2 + 9 * inner**2 * side**2 + inner * trunk * side**2
            macs += 0 if block else into * trunk * side**2
            into = trunk
    assert small.macs == macs + into * 1000
    assert 0.45 < small.macs / dense.macs < 0.46


def test_tables_are_what_is_found() -> None:
    """The groups of a residual network by name, as the authors list them, are those read off its run."""
    case = read_case(GOLDEN / "prune_residual.safetensors")
    adapted = adapt(case)
    assert adapted.module is not None
    found = {frozenset(g.norms): g for g in channel_groups(adapted.module, case.inputs["x"])}
    config = case.config
    for norm in config["prec"]:
        group = found[frozenset([norm])]
        assert (list(group.producers), set(group.consumers)) == (config["prec"][norm], set(config["succ"][norm]))
    together = config["groups"]
    for norms, before, behind in zip(together["norm"], together["prec"], together["succ"], strict=True):
        group = found[frozenset(norms)]
        assert (set(group.producers), set(group.consumers)) == (set(before), set(behind))
