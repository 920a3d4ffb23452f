"""Every registered layer answers the same questions; its ``probe`` says how to build and call it.

Layers are the parts that cannot stand for a convolution (they take two inputs, change the rank, work on tokens …), so
that the questions of ``test_conformance.py`` about strides and channels do not apply; all the others are asked here.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.harness import copies, randomise
from torchconv.catalog import Part, load, parts

LAYERS = [p for p in parts() if p.kind == "layer"]
every = pytest.mark.parametrize("announced", LAYERS, ids=lambda p: p.name)


def build(announced: Part) -> nn.Module:
    torch.manual_seed(0)
    return load(announced)(**announced.probe["build"])


def sample(announced: Part, batch: int | None = None, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [list(shape) for shape in announced.probe["inputs"]]
    if batch is not None:
        shapes = [[batch, *shape[1:]] for shape in shapes]
    return [torch.randn(shape, generator=generator, **options) for shape in shapes]


def leaves(announced: Part, module: nn.Module) -> list[Tensor]:
    """Inputs of a backward pass; they ask for a gradient themselves where the layer has no parameters."""
    return sample(announced, requires_grad=not any(True for _ in module.parameters()))


def run(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs as a list, whatever the layer returns."""
    y = module(*inputs)
    return [y] if isinstance(y, Tensor) else [t for t in y if isinstance(t, Tensor)]


def close(ours: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    pairs = list(zip(ours, expected, strict=True))
    return all(
        (a.float() - b.float()).abs().max() <= tolerance * max(1.0, float(b.detach().float().abs().max()))
        for a, b in pairs
    )


@pytest.mark.parametrize("announced", [p for p in parts() if p.kind == "layer"], ids=lambda p: p.name)
def test_layer_can_be_built(announced: Part) -> None:
    assert {"build", "inputs"} <= set(announced.probe), f"{announced.module}: give @part a probe"
    y = run(randomise(build(announced)).eval(), sample(announced))
    assert y
    assert all(torch.isfinite(t).all() for t in y)


@every
def test_gradcheck(announced: Part) -> None:
    module = randomise(build(announced)).double().eval()
    inputs = [x.requires_grad_() for x in sample(announced, dtype=torch.float64)]
    parameters = [p for p in module.parameters() if p.requires_grad]

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(module, list(tensors[: len(inputs)])))

    assert torch.autograd.gradcheck(forward, (*inputs, *parameters), fast_mode=True, atol=1e-6)


@every
def test_every_parameter_gets_a_gradient(announced: Part) -> None:
    module = randomise(build(announced)).train()
    sum(y.square().sum() for y in run(module, leaves(announced, module))).backward()  # type: ignore[union-attr]
    without = [n for n, p in module.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


@every
def test_bfloat16(announced: Part) -> None:
    module = randomise(build(announced)).eval()
    inputs = sample(announced)
    expected = run(module, inputs)
    y = run(module.bfloat16(), [x.bfloat16() for x in inputs])
    assert all(t.dtype == torch.bfloat16 for t in y)
    assert close(y, expected, 0.15)


@every
def test_autocast(announced: Part) -> None:
    module = randomise(build(announced)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(module, leaves(announced, module))
    sum(t.float().sum() for t in y).backward()  # type: ignore[union-attr]
    assert all(torch.isfinite(t).all() for t in y)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())


@every
def test_layouts(announced: Part) -> None:
    """Channels-last and strided inputs give the same numbers."""
    module = randomise(build(announced)).eval()
    inputs = sample(announced)
    expected = run(module, inputs)
    last = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
    spread = [torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x) for x in inputs]
    assert close(run(module, last), expected, 1e-5)
    assert close(run(module, spread), expected, 1e-5)


@every
def test_compile_without_graph_breaks(announced: Part) -> None:
    module = randomise(build(announced)).eval()
    inputs = leaves(announced, module)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    y = run(compiled, inputs)
    assert close(y, run(module, inputs), 1e-5)
    sum(t.sum() for t in y).backward()  # type: ignore[union-attr]


@every
def test_export(announced: Part) -> None:
    module = randomise(build(announced)).eval()
    shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in announced.probe["inputs"])
    program = torch.export.export(module, tuple(sample(announced)), dynamic_shapes=shapes)
    other = sample(announced, batch=3)
    assert close(run(program.module(), other), run(module, other), 1e-5)


@every
def test_copies(announced: Part) -> None:
    module = randomise(build(announced)).eval()
    inputs = sample(announced)
    expected = run(module, inputs)
    for twin in copies(module, build(announced)):
        assert all(torch.equal(a, b) for a, b in zip(run(twin, inputs), expected, strict=True))


@every
def test_determinism_and_global_state(announced: Part) -> None:
    first, second = build(announced), build(announced)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    inputs = sample(announced)
    before = torch.get_rng_state()
    once, again = run(first.eval(), inputs), run(first, inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert torch.equal(before, torch.get_rng_state()), "forward must not draw random numbers in eval mode"


@every
def test_merge_is_exact(announced: Part) -> None:
    module = randomise(build(announced)).eval()
    if not announced.merges:
        assert not hasattr(module, "merge"), "declare what merge() returns"
        return
    inputs = sample(announced)
    expected = run(module, inputs)
    fold: Any = module.merge
    merged = fold()
    assert close(run(merged, inputs), expected, 1e-5)
    owned = {p.data_ptr() for p in module.parameters()}
    assert not any(p.data_ptr() in owned for p in merged.parameters()), "merged weights are copies"
